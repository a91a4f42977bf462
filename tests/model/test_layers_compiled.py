"""Compiled decoder layers under ZeRO-3: one graph for all layers and packs, and the numbers of the plain run."""

from typing import Any

import pytest

from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

# Number and lengths of the conversations change with every pack; one is empty, as where packs do not go round.
PACKS = [[9, 17], [12, 5, 30], [], [21, 22, 4, 11], [40, 7]]
CASES = [("sdpa", True), ("sdpa", False), ("auto", True), ("auto", False)]  # (attention, recompute)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool, bool], dict[str, Any]]:
    folder = tmp_path_factory.mktemp("compiled")
    common = {"case": "compiled", "data": "unused", "global_packs": 2, "packs": PACKS}
    common["model"] = str(build_model(folder / "llama", "llama"))
    keys = [(*case, compiled) for case in CASES for compiled in (False, True)]
    cases = [
        common | {"attention": attention, "gradient_checkpointing": recompute, "compile": compiled}
        for attention, recompute, compiled in keys
    ]
    return dict(zip(keys, run_world(2, cases, folder / "world"), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_compiled_layers_compute_what_plain_ones_do(answers: dict[Any, dict[str, Any]], case: tuple[str, bool]) -> None:
    plain, compiled = answers[(*case, False)], answers[(*case, True)]
    assert plain["graphs"] == [0] * len(PACKS)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    assert compiled["norms"] == pytest.approx(plain["norms"], rel=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_all_layers_and_packs_share_one_graph_without_breaks(
    answers: dict[Any, dict[str, Any]], case: tuple[str, bool]
) -> None:
    answer = answers[(*case, True)]
    assert answer["breaks"] == {}
    # The empty pack is one conversation, for which sdpa needs no mask: another graph, once.
    last = 2 if case[0] == "sdpa" else 1
    assert answer["graphs"] == [1, 1, last, last, last]
