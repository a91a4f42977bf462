import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.cost import CostModel
from sft_dist.data.plan import Plan, distribute

# Llama 3.1 8B; the numbers are checked in test_cost.py.
COST_8B = CostModel(
    linear_per_token=6 * 32 * 218_103_808, attention_per_pair=12 * 32 * 4096, head_per_target=6 * 4096 * 128_256
)


def make_plan(
    num: int = 57, *, global_packs: int = 6, epochs: int = 2, seed: int = 0, max_steps: int | None = None
) -> Plan:
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 40, num)
    targets = np.minimum(rng.integers(0, 10, num), lengths - 1)
    return Plan(
        lengths, targets, max_length=64, global_packs=global_packs, seed=seed, epochs=epochs, max_steps=max_steps
    )


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9), st.integers(0, 3))
def test_every_conversation_is_seen_exactly_once_an_epoch_on_any_layout(
    ranks: int, per_forward: int, global_packs: int, seed: int
) -> None:
    plan = make_plan(global_packs=global_packs, seed=seed)
    seen = []
    for step in range(plan.steps_per_epoch, plan.num_steps):
        forwards = [
            plan.micro_batches(step, data_rank=rank, data_size=ranks, packs_per_micro_batch=per_forward)
            for rank in range(ranks)
        ]
        assert len({len(of_rank) for of_rank in forwards}) == 1, "every rank runs the same number of forwards"
        seen += [index for of_rank in forwards for forward in of_rank for index in forward]
    rng = np.random.default_rng(1)
    lengths = rng.integers(3, 40, 57)
    targets = np.minimum(rng.integers(0, 10, 57), lengths - 1)
    assert sorted(seen) == [i for i in range(57) if targets[i] > 0]


@given(st.integers(1, 5), st.integers(1, 3))
def test_samples_of_a_step_do_not_depend_on_the_layout(ranks: int, per_forward: int) -> None:
    plan = make_plan()
    for step in (0, plan.num_steps - 1):
        dealt = [
            index
            for rank in range(ranks)
            for forward in plan.micro_batches(step, data_rank=rank, data_size=ranks, packs_per_micro_batch=per_forward)
            for index in forward
        ]
        assert sorted(dealt) == sorted(index for pack in plan.packs(step) for index in pack)


def test_denominator_counts_the_targets_of_the_whole_step() -> None:
    lengths, targets = np.array([5, 6, 7, 8]), np.array([1, 2, 3, 0])
    plan = Plan(lengths, targets, max_length=16, global_packs=9, seed=0, epochs=1)
    assert plan.denominator(0) == 6
    assert plan.num_samples == 3


def test_order_follows_from_the_seed_and_differs_between_epochs() -> None:
    first, again, other = make_plan(), make_plan(), make_plan(seed=7)
    assert [first.packs(s) for s in range(first.num_steps)] == [again.packs(s) for s in range(again.num_steps)]
    assert first.packs(0) != other.packs(0)
    assert first.packs(0) != first.packs(first.steps_per_epoch)


def test_a_plan_is_stateless() -> None:
    plan = make_plan()
    forwards = [plan.packs(step) for step in range(plan.num_steps)]
    fresh = make_plan()
    assert [fresh.packs(step) for step in reversed(range(plan.num_steps))] == forwards[::-1]


def test_max_steps_ends_a_plan_and_never_extends_it() -> None:
    assert make_plan(max_steps=1).num_steps == 1
    assert make_plan(max_steps=10_000).num_steps == make_plan().num_steps


def test_nothing_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sample"):
        Plan(np.array([5, 90]), np.array([0, 3]), max_length=16, global_packs=1, seed=0, epochs=1)


def test_distribute_gives_neighbours_to_one_micro_step() -> None:
    packs = [(i,) for i in range(7)]
    assert distribute(packs, 0, 2, 2) == [(0, 3), (4,)]
    assert distribute(packs, 1, 2, 2) == [(1, 2), (5, 6)]


def repeated_plan(
    repeats: list[float], *, conversations: list[int] | None = None, epochs: int = 1, seed: int = 0
) -> tuple[Plan, np.ndarray]:
    """A plan over samples of one conversation each (or as given), and the masses of the samples."""
    num = len(repeats)
    rng = np.random.default_rng(5)
    lengths, mass = rng.integers(3, 20, num), rng.random(num) + 0.1
    plan = Plan(
        lengths,
        np.ones(num, np.int64),
        mass=mass,
        repeats=np.array(repeats),
        conversations=np.arange(num) if conversations is None else np.array(conversations),
        max_length=32,
        global_packs=3,
        seed=seed,
        epochs=epochs,
    )
    return plan, mass


def seen_by_epoch(plan: Plan) -> list[Counter[int]]:
    """How often each sample is in each epoch."""
    bounds = plan._first_steps.tolist()
    return [
        Counter(index for step in range(first, last) for pack in plan.packs(step) for index in pack)
        for first, last in itertools.pairwise(bounds)
    ]


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.25, 2.0, 3.0]), min_size=1, max_size=40), st.integers(0, 50))
def test_a_sample_is_in_an_epoch_as_often_as_it_is_repeated(repeats: list[float], seed: int) -> None:
    if not any(repeats):
        with pytest.raises(ValueError, match="no sample"):
            repeated_plan(repeats)
        return
    plan, mass = repeated_plan(repeats, epochs=3, seed=seed)
    epochs = seen_by_epoch(plan)
    assert len(epochs) == 3
    for seen in epochs:
        assert all(seen[index] in (int(repeat), -int(-repeat // 1)) for index, repeat in enumerate(repeats)) or (
            max(repeats) < 1 and all(seen[index] == (repeat > 0) for index, repeat in enumerate(repeats))
        )
        assert all(seen[index] == 0 for index, repeat in enumerate(repeats) if repeat == 0)
    for step in range(plan.num_steps):
        members = [index for pack in plan.packs(step) for index in pack]
        assert members, "no step is empty"
        assert plan.denominator(step) == pytest.approx(sum(mass[index] for index in members))
        assert plan.num_step_targets(step) == len(members)
        fresh, _ = repeated_plan(repeats, epochs=3, seed=seed)
        assert fresh.packs(step) == plan.packs(step), "a run that resumes here takes the same step"


def test_half_a_repeat_draws_about_half_and_anew_in_every_epoch() -> None:
    plan, _ = repeated_plan([0.5] * 400 + [1.5] * 400, epochs=8)
    epochs = seen_by_epoch(plan)
    for seen in epochs:
        # Six standard deviations of 400 fair coins are 60.
        assert abs(sum(seen[index] for index in range(400)) - 200) < 60
        assert abs(sum(seen[index] for index in range(400, 800)) - 600) < 60
    drawn = [{index for index in range(400) if seen[index]} for seen in epochs]
    assert len({frozenset(members) for members in drawn}) == 8
    # A conversation is missing in all of 8 epochs with probability 1/256.
    assert len(set.union(*drawn)) > 380


def test_samples_of_one_conversation_are_drawn_together() -> None:
    conversations = [index // 3 for index in range(120)]
    plan, _ = repeated_plan([0.5] * 120, conversations=conversations, epochs=4)
    for seen in seen_by_epoch(plan):
        assert all(len({seen[3 * number + branch] for branch in range(3)}) == 1 for number in range(40))


def test_an_epoch_of_which_chance_took_nothing_takes_all_but_what_is_never_wanted() -> None:
    plan, _ = repeated_plan([0.001, 0.0], epochs=3)
    assert seen_by_epoch(plan) == [Counter({0: 1})] * 3


def test_samples_without_weight_take_no_part() -> None:
    lengths, targets = np.array([5, 6, 7]), np.array([1, 2, 3])
    plan = Plan(lengths, targets, mass=np.array([0.0, 0.5, 4.0]), max_length=16, global_packs=9, seed=0, epochs=1)
    assert sorted(plan.packs(0)) == [(2, 1)] and plan.denominator(0) == 4.5


lengths_of_samples = st.lists(st.integers(2, 100), min_size=1, max_size=120)
COSTS = CostModel(1.0, 0.3, 2.0)


@settings(deadline=None)
@given(
    lengths_of_samples,
    st.integers(100, 130),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(0, 3),
)
def test_any_plan_takes_every_sample_once_an_epoch_whatever_the_ranks(
    lengths: list[int], capacity: int, global_packs: int, balance_steps: int, ranks: int, per_forward: int, seed: int
) -> None:
    plan = Plan(
        np.array(lengths),
        np.ones(len(lengths), np.int64),
        cost_model=COSTS,
        max_length=capacity,
        global_packs=global_packs,
        balance_steps=balance_steps,
        seed=seed,
        epochs=2,
    )
    assert plan.num_steps == 2 * plan.steps_per_epoch == 2 * -(-plan.num_packs // global_packs)
    for epoch in range(2):
        seen: list[int] = []
        for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch):
            packs = plan.packs(step)
            is_last = step % plan.steps_per_epoch == plan.steps_per_epoch - 1
            assert len(packs) == (plan.num_packs - 1) % global_packs + 1 if is_last else global_packs
            assert all(sum(lengths[index] for index in pack) <= capacity for pack in packs)
            costs = [COSTS.flops([lengths[index] for index in pack], len(pack)) for pack in packs]
            assert costs == pytest.approx(sorted(costs, reverse=True)), "neighbours are of near-equal cost"
            forwards = [
                plan.micro_batches(step, data_rank=rank, data_size=ranks, packs_per_micro_batch=per_forward)
                for rank in range(ranks)
            ]
            assert len({len(of_rank) for of_rank in forwards}) == 1, "every rank runs the same number of forwards"
            dealt = [index for of_rank in forwards for forward in of_rank for index in forward]
            assert sorted(dealt) == sorted(index for pack in packs for index in pack)
            assert plan.num_step_tokens(step) == sum(lengths[index] for index in dealt)
            assert plan.num_step_targets(step) == plan.denominator(step) == len(dealt)
            seen += dealt
        assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_a_window_deals_the_packs_of_its_steps_anew_and_no_others(
    global_packs: int, balance_steps: int, seed: int
) -> None:
    lengths = np.random.default_rng(seed).integers(2, 60, 150)
    plans = [
        Plan(
            lengths,
            np.ones(150, np.int64),
            cost_model=COSTS,
            max_length=100,
            global_packs=global_packs,
            balance_steps=window,
            seed=seed,
            epochs=1,
        )
        for window in (1, balance_steps)
    ]
    alone, balanced = ([plan.packs(step) for step in range(plan.num_steps)] for plan in plans)
    num_whole = plans[0].num_packs // global_packs
    assert alone[num_whole:] == balanced[num_whole:], "a step that is not full is what is left at random"
    for first in range(0, num_whole, balance_steps):
        last = min(first + balance_steps, num_whole)
        window = balanced[first:last]
        assert sorted(pack for step in window for pack in step) == sorted(
            pack for step in alone[first:last] for pack in step
        )
        costs = [[COSTS.flops(lengths[list(pack)], len(pack)) for pack in step] for step in window]
        costs.sort(key=lambda step: (step[0], step[-1]), reverse=True)
        flat = [cost for step in costs for cost in step]
        assert flat == pytest.approx(sorted(flat, reverse=True)), "steps of a window share no range of costs"


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 20))
def test_balance_is_the_mean_over_the_maximum_of_the_forwards_as_they_are_dealt(
    ranks: int, per_forward: int, global_packs: int
) -> None:
    rng = np.random.default_rng(global_packs)
    lengths = rng.integers(3, 60, 90)
    targets = rng.integers(1, 3, 90)
    plan = Plan(
        lengths, targets, cost_model=COSTS, max_length=64, global_packs=global_packs, seed=1, epochs=2, max_steps=7
    )
    mean = longest = 0.0
    for step in range(min(plan.num_steps, plan.steps_per_epoch)):
        forwards = [
            plan.micro_batches(step, data_rank=rank, data_size=ranks, packs_per_micro_batch=per_forward)
            for rank in range(ranks)
        ]
        for at_a_time in zip(*forwards, strict=True):
            costs = [COSTS.flops(lengths[list(forward)], int(targets[list(forward)].sum())) for forward in at_a_time]
            mean += sum(costs) / ranks
            longest += max(costs)
    assert plan.balance(ranks, per_forward) == pytest.approx(mean / longest)


def conversation_lengths(num: int, max_length: int) -> np.ndarray:
    """Lognormal around 600 tokens, as conversations are; what is longer than a pack is cut to it."""
    lengths = np.random.default_rng(0).lognormal(np.log(600), 1.5, num).astype(np.int64)
    return np.clip(lengths, 8, max_length)


def plan_of_conversations(
    num: int, max_length: int, global_packs: int, *, balance_steps: int = 1, seed: int = 0
) -> Plan:
    lengths = conversation_lengths(num, max_length)
    return Plan(
        lengths,
        lengths * 2 // 5,
        cost_model=COST_8B,
        max_length=max_length,
        global_packs=global_packs,
        balance_steps=balance_steps,
        seed=seed,
        epochs=1,
    )


@pytest.mark.parametrize(
    ("max_length", "expected"), [(8192, [0.94, 0.97, 0.98, 0.99]), (32_768, [0.73, 0.86, 0.93, 0.97])]
)
def test_balance_of_64_ranks_is_what_sorting_within_a_step_can_reach(max_length: int, expected: list[float]) -> None:
    found = [plan_of_conversations(200_000, max_length, 64 * each).balance(64, 1) for each in (1, 2, 4, 8)]
    assert all(round(balance, 2) >= target for balance, target in zip(found, expected, strict=True)), found


def test_a_window_of_steps_takes_most_of_the_waiting_away() -> None:
    found = [1 - plan_of_conversations(100_000, 32_768, 64, balance_steps=w).balance(64, 1) for w in (1, 2, 4, 8)]
    assert found[0] > 1.5 * found[1] > 2 * found[2] > 2.5 * found[3], found


def correlations(plans: list[Plan], of_step: Callable[[Plan, int], float]) -> np.ndarray:
    """For each plan, the correlation of a step's mean sample length with a number, in standard deviations of chance."""
    found = []
    for plan in plans:
        steps = range(plan.num_steps)
        lengths = [plan.num_step_tokens(step) / plan.num_step_targets(step) for step in steps]
        numbers = [of_step(plan, step) for step in steps]
        found.append(float(np.corrcoef(numbers, np.log(lengths))[0, 1]) * np.sqrt(len(steps)))
    return np.array(found)


@pytest.mark.parametrize("balance_steps", [1, 4])
@pytest.mark.parametrize("global_packs", [2, 16])
def test_lengths_do_not_follow_the_number_of_the_step(global_packs: int, balance_steps: int) -> None:
    """Neither over the epoch, nor within windows of four steps, beyond chance."""
    lengths = conversation_lengths(4_000, 2048)
    plans = [
        Plan(
            lengths,
            np.ones(len(lengths), np.int64),
            cost_model=COST_8B,
            max_length=2048,
            global_packs=global_packs,
            balance_steps=balance_steps,
            seed=seed,
            epochs=1,
        )
        for seed in range(25)
    ]
    for number in (lambda _, step: step, lambda _, step: step % 4):
        found = correlations(plans, number)
        assert np.abs(found).max() < 4, found
        assert abs(found.mean()) < 4 / len(plans) ** 0.5, found


@pytest.mark.parametrize("seed", range(3))
def test_a_step_holds_short_and_long_samples(seed: int) -> None:
    """Best fit puts samples of like lengths together, so single packs are narrow; the packs of a step are not."""
    plan = plan_of_conversations(50_000, 8192, 64, seed=seed)
    lengths = np.log(conversation_lengths(50_000, 8192))
    packs = [pack for step in range(plan.num_steps) for pack in plan.packs(step)]
    steps = [[index for pack in plan.packs(step) for index in pack] for step in range(plan.num_steps)]
    assert within(lengths, packs) < 0.45 < 0.8 < within(lengths, steps)


def within(values: np.ndarray, groups: Sequence[Sequence[int]]) -> float:
    """Share of the variance that lies within groups."""
    squares = sum(((values[list(group)] - values[list(group)].mean()) ** 2).sum() for group in groups)
    return float(squares / ((values - values.mean()) ** 2).sum())
