import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.packing import best_fit_decreasing

lengths_and_capacity = st.integers(1, 60).flatmap(
    lambda capacity: st.tuples(st.lists(st.integers(1, capacity), max_size=80), st.just(capacity))
)


@given(lengths_and_capacity)
def test_every_sample_is_in_exactly_one_pack_and_no_pack_overflows(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    packs = best_fit_decreasing(lengths, capacity)
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in pack) <= capacity for pack in packs)


@given(lengths_and_capacity)
def test_equals_the_plain_quadratic_algorithm(case: tuple[list[int], int]) -> None:
    lengths, capacity = case
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    found = [capacity - sum(lengths[i] for i in pack) for pack in best_fit_decreasing(lengths, capacity)]
    assert sorted(found) == sorted(rooms)


def test_conversation_lengths_fill_packs_almost_wholly() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(5.5, 1.0, 5_000).astype(int), 1, 4096)
    packs = best_fit_decreasing(lengths, 4096)
    assert lengths.sum() / (len(packs) * 4096) > 0.995


@pytest.mark.parametrize("lengths", [[0], [5], [-1, 2]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError):
        best_fit_decreasing(lengths, 4)
