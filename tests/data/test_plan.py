import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft_dist.data.plan import Plan, distribute


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
