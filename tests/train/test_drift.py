"""How a drift is put into numbers and words, from sums of squares."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.model.places import KINDS, Place
from sft_dist.train.drift import as_dict, ratio, table

PLACES = st.builds(Place, st.none() | st.integers(0, 60), st.sampled_from(KINDS))
SQUARES = st.dictionaries(PLACES, st.tuples(st.floats(0, 1e6), st.floats(1e-3, 1e6)), min_size=1)


@given(SQUARES)
def test_parts_together_are_the_root_of_their_sums(squares: dict[Place, tuple[float, float]]) -> None:
    found = as_dict(squares)

    def expected(keys: list[Place]) -> float:
        return math.sqrt(sum(squares[key][0] for key in keys) / sum(squares[key][1] for key in keys))

    assert found["all"] == pytest.approx(expected(list(squares)))
    kinds, layers = found["kinds"], found["layers"]
    assert isinstance(kinds, dict) and isinstance(layers, dict)
    for kind, value in kinds.items():
        assert value == pytest.approx(expected([place for place in squares if place.kind == kind]))
    assert set(kinds) == {place.kind for place in squares}
    for place in squares:
        name = "outside" if place.layer is None else str(place.layer)
        assert layers[name][place.kind] == pytest.approx(expected([place]))
        assert layers[name]["all"] == pytest.approx(
            expected([other for other in squares if other.layer == place.layer])
        )


def test_nothing_and_a_start_at_zero_have_no_share() -> None:
    assert ratio([]) is None
    assert ratio([(1.0, 0.0)]) is None
    assert ratio([(0.0, 0.0)]) == 0.0


@pytest.mark.parametrize("num_layers", [1, 24, 25, 80])
def test_the_table_names_every_layer_once_in_a_bounded_number_of_rows(num_layers: int) -> None:
    squares = {Place(layer, "mlp"): (1.0, 4.0) for layer in range(num_layers)}
    squares |= {Place(None, "embeddings"): (0.0, 1.0)}
    _, header, outside, *rows, every = table(squares)
    assert header.split() == ["layer", "embeddings", "mlp", "all"]
    assert outside.split() == ["outside", "0.00e+00", "-", "0.00e+00"]
    covered = []
    for row in rows:
        name, embeddings, mlp, share = row.split()
        first, _, last = name.partition("-")
        covered += list(range(int(first), int(last or first) + 1))
        assert (embeddings, mlp, share) == ("-", "5.00e-01", "5.00e-01")
    assert covered == list(range(num_layers)) and len(rows) <= 24
    assert every.split()[0] == "all" and len({len(line) for line in (header, outside, *rows, every)}) == 1
