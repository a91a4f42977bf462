import numpy as np
import pytest
from hypothesis import given
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
    assert distribute(packs, 0, 2, 2) == [(0, 2), (4, 6)]
    assert distribute(packs, 1, 2, 2) == [(1, 3), (5,)]
