"""A step that is not taken leaves nothing behind on any rank, and what is said about its cause is what was the case."""

from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

LAYOUTS = [
    {"fault": "step.gradient", "reduce_once": True},
    {"fault": "step.gradient", "reduce_once": False},
    {"fault": "step.loss", "reduce_once": True},
    {"fault": "step.gradient", "dtype": "bfloat16", "reduce_once": True},
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("guard")
    records = make_records(40, max_words=8)
    for number in (3, 17):
        records[number]["messages"][0]["content"] += " K"
    common = {
        "model": str(build_model(folder / "model", "qwen2")),
        "data": str(write_jsonl(folder / "train.jsonl", records)),
        "global_packs": 3,
    }
    token = AutoTokenizer.from_pretrained(folder / "model").convert_tokens_to_ids("K")
    cases = [common | {"case": "discarded_step"} | layout for layout in LAYOUTS]
    return run_world(2, [*cases, common | {"case": "offenders_found", "token": token}], folder / "world")


@pytest.mark.parametrize("number", range(len(LAYOUTS)))
def test_a_step_that_is_not_taken_changes_no_bit_and_leaves_clean_buffers(answers: list[Any], number: int) -> None:
    answer, layout = answers[number], LAYOUTS[number]
    if layout["fault"] == "step.gradient":
        assert answer["loss"] == pytest.approx(6, abs=3), "the loss itself is finite"
        assert (answer["is_applied"], answer["norm"]) == (False, float("inf"))
    else:
        assert answer["loss"] != answer["loss"]
    for first, second in (
        ("broken: before", "broken: after"),
        ("broken: before", "never: before"),
        ("broken: gradient", "never: gradient"),
        ("broken: end", "never: end"),
    ):
        assert answer[first].keys() == answer[second].keys() and len(answer[first]) > 10
        for name, value in answer[first].items():
            assert torch.equal(value, answer[second][name]), (first, second, name)
    assert answer["broken: norm"] == answer["never: norm"] > 0
    assert not all(torch.equal(value, answer["broken: end"][name]) for name, value in answer["broken: after"].items())


def test_numbers_that_are_finite_when_computed_again_point_to_the_hardware(answers: list[Any]) -> None:
    said = answers[-1]["finite again"]
    assert said.startswith("the loss; rank 1, micro-batch 1; computed again it is finite") and "hardware" in said
    assert "of a rank that cannot be told" in answers[-1]["finite heldout"]


def test_heldout_conversations_are_named_one_by_one(answers: list[Any]) -> None:
    assert sorted(answers[-1]["ids"]) == ["c17", "c3"]
    assert "c17" in answers[-1]["heldout"] and "heldout-00000004.json" in answers[-1]["heldout"]


def test_broken_weights_are_named_and_no_conversation_is_blamed(answers: list[Any]) -> None:
    said = answers[-1]["weights"]
    assert f"the weights themselves are not finite any more ({answers[-1]['name']})" in said and "c3" not in said
