import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.packing import Pack, best_fit_decreasing, pack_table

# Few distinct lengths among many samples, and many; capacities on both sides of powers of two.
lengths_and_capacity = st.integers(1, 300).flatmap(
    lambda capacity: st.tuples(
        st.one_of(
            st.lists(st.integers(1, capacity), max_size=80),
            st.lists(st.sampled_from(sorted({1, capacity // 5 + 1, capacity // 3 + 1, capacity})), max_size=80),
        ),
        st.just(capacity),
    )
)


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[Pack]:
    """One sample at a time, looking at every pack: the smallest room, of equal ones the pack that was changed last."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    changed: list[int] = []
    for time, index in enumerate(sorted(range(len(lengths)), key=lambda index: -lengths[index])):
        fitting = [pack for pack, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            pack = min(fitting, key=lambda pack: (rooms[pack], -changed[pack]))
        else:
            pack = len(packs)
            packs.append([])
            rooms.append(capacity)
            changed.append(time)
        packs[pack].append(index)
        rooms[pack] -= lengths[index]
        changed[pack] = time
    return [tuple(pack) for pack in packs]


@given(lengths_and_capacity)
def test_every_sample_is_in_exactly_one_pack_and_no_pack_overflows(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = best_fit_decreasing(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)


@given(lengths_and_capacity)
def test_packs_are_those_of_the_plain_quadratic_algorithm(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    assert best_fit_decreasing(lengths, capacity) == plain_best_fit_decreasing(lengths, capacity)


@pytest.mark.parametrize("capacity", [2048, 131_072])
def test_packs_are_those_of_the_plain_algorithm_for_lengths_of_conversations(capacity: int) -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(6.0, 1.5, 1_200).astype(int), 1, capacity).tolist()
    assert best_fit_decreasing(lengths, capacity) == plain_best_fit_decreasing(lengths, capacity)


def test_conversation_lengths_fill_packs_almost_wholly() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 5_000).astype(int), 1, 4096)
    packs = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / (len(packs) * 4096) > 0.995


@pytest.mark.parametrize("lengths", [[0], [5], [-1, 2]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError):
        best_fit_decreasing(lengths, 4)


def test_nothing_makes_no_pack() -> None:
    assert best_fit_decreasing([], 4) == [] and len(pack_table([], 4)) == 0


@given(lengths_and_capacity, st.randoms(use_true_random=False))
def test_a_table_in_another_order_holds_the_same_packs(case: tuple[list[int], int], random) -> None:
    lengths, capacity = case
    table = pack_table(lengths, capacity)
    packs = table.packs(0, len(table))
    order = random.sample(range(len(packs)), len(packs))
    other = table.ordered(np.array(order, np.int64))
    assert other.packs(0, len(other)) == [packs[place] for place in order]
    names = np.array(random.sample(range(1000), len(lengths)), np.int64)
    renamed = table.renamed(names)
    assert renamed.packs(0, len(renamed)) == [tuple(int(names[index]) for index in pack) for pack in packs]
    if packs:
        assert table.sums(np.array(lengths, np.float64)).tolist() == [sum(lengths[i] for i in pack) for pack in packs]
        half = len(packs) // 2
        assert table.packs(half, len(packs)) == packs[half:]
