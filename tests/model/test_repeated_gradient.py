"""Gradients without a step: what a rank holds of them, and forgetting them."""

from pathlib import Path

import pytest
import torch

from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow


def test_a_gradient_is_forgotten_and_the_parts_of_three_ranks_are_the_whole(tmp_path: Path) -> None:
    """Not every parameter's size divides by three: the last rank then holds less."""
    case = {
        "case": "repeated_gradient",
        "model": str(build_model(tmp_path / "model", "qwen2")),
        "data": str(write_jsonl(tmp_path / "train.jsonl", make_records(12, max_words=8))),
        "global_packs": 5,
    }
    (answer,) = run_world(3, [case], tmp_path / "world")
    assert not answer["has_compiler"], "loading it takes longer than a second, and nothing is compiled"
    for name in ("first", "cleared", "added"):
        for key, value in answer[name].items():
            assert torch.equal(answer[f"{name} in parts"][key].view_as(value), value), (name, key)
    for key, value in answer["first"].items():
        assert value.abs().max() > 0
        assert torch.equal(answer["cleared"][key], value)
        assert torch.allclose(answer["added"][key], 2 * value, rtol=1e-4, atol=1e-6), "what forgetting prevents"
