"""The invariances of the design, over real worlds of 1, 2 and 3 ranks, against plain transformers in float64."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import oracle
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import FAMILIES, build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

# 5 packs a step on 2 and 3 ranks: no rank count divides it, so empty forwards take part.
GLOBAL_PACKS = 5
LAYOUTS = [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)]  # (ranks, packs per forward)


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models, data, and what worlds of 1, 2 and 3 ranks compute from them."""
    folder = tmp_path_factory.mktemp("invariances")
    models = {family: str(build_model(folder / family, family)) for family in FAMILIES}
    records = make_records(24, max_words=8)
    data = str(write_jsonl(folder / "train.jsonl", records))
    answers: dict[tuple[Any, ...], Any] = {}
    for size in (1, 2, 3):
        keys, cases = [], []
        for family in FAMILIES:
            common = {"model": models[family], "data": data, "global_packs": GLOBAL_PACKS}
            for ranks, per_forward in LAYOUTS:
                if ranks == size and (family == "llama" or per_forward == 1):
                    keys.append(("gradient", family, size, per_forward))
                    cases.append(common | {"case": "gradient", "per_forward": per_forward})
            if size < 3:
                keys.append(("scores", family, size))
                cases.append(common | {"case": "scores"})
        if size == 2:
            keys.append(("full disk",))
            cases.append({"model": models["llama"], "data": data, "global_packs": 1, "case": "full_disk"})
        if size < 3:
            keys.append(("gradient", "llama", "bfloat16", size))
            cases.append(
                {"model": models["llama"], "data": data, "global_packs": GLOBAL_PACKS}
                | {"case": "gradient", "dtype": "bfloat16"}
            )
        if size == 1:
            common = {"model": models["llama"], "data": data, "global_packs": GLOBAL_PACKS, "case": "gradient"}
            keys += [("gradient", "llama", "sdpa"), ("gradient", "llama", "without checkpointing")]
            cases += [common | {"attention": "sdpa"}, common | {"gradient_checkpointing": False}]
        answers |= dict(zip(keys, run_world(size, cases, folder / f"world-{size}"), strict=True))
    return {"folder": folder, "models": models, "records": records, "answers": answers}


def _largest_relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) / scale for name, value in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_equals_plain_transformers_conversation_by_conversation(setting: dict[str, Any], family: str) -> None:
    answer = setting["answers"][("gradient", family, 1, 1)]
    model, tokenizer = oracle.load(Path(setting["models"][family]))
    chosen = [setting["records"][index]["messages"] for index in answer["samples"]]
    loss = oracle.loss(model, tokenizer, chosen)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert answer["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
    assert _largest_relative_difference(answer["gradients"], expected) < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_gradient_does_not_depend_on_ranks_packs_and_accumulation(
    setting: dict[str, Any], layout: tuple[int, int]
) -> None:
    reference = setting["answers"][("gradient", "llama", 1, 1)]
    answer = setting["answers"][("gradient", "llama", *layout)]
    assert answer["samples"] == reference["samples"]
    assert answer["loss"] == pytest.approx(reference["loss"], rel=1e-6)
    assert _largest_relative_difference(answer["gradients"], reference["gradients"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_is_that_of_one_rank_for_every_family(setting: dict[str, Any], family: str) -> None:
    reference = setting["answers"][("gradient", family, 1, 1)]
    for size in (2, 3):
        answer = setting["answers"][("gradient", family, size, 1)]
        assert _largest_relative_difference(answer["gradients"], reference["gradients"]) < 1e-5


def test_a_rank_that_cannot_write_fails_the_save_on_all_and_harms_nothing(setting: dict[str, Any]) -> None:
    answer = setting["answers"][("full disk",)]
    assert len(answer["raised"]) == 2
    assert all("on rank 1" in text and "No space left" in text for text in answer["raised"])
    assert answer["steps"] == {1: None, 3: None}, "the checkpoint before stays, and the next save works"


def test_layouts_are_really_different(setting: dict[str, Any]) -> None:
    forwards = {layout: setting["answers"][("gradient", "llama", *layout)]["num_forwards"] for layout in LAYOUTS}
    assert forwards == {(1, 1): 5, (1, 3): 2, (2, 1): 3, (2, 2): 2, (3, 1): 2}


@pytest.mark.parametrize("variant", ["sdpa", "without checkpointing"])
def test_gradient_is_the_same_with_other_kernels_and_without_recomputation(
    setting: dict[str, Any], variant: str
) -> None:
    reference = setting["answers"][("gradient", "llama", 1, 1)]
    answer = setting["answers"][("gradient", "llama", variant)]
    assert _largest_relative_difference(answer["gradients"], reference["gradients"]) < 1e-5


@pytest.mark.parametrize("size", [1, 2])
def test_bfloat16_gradient_stays_within_its_rounding(setting: dict[str, Any], size: int) -> None:
    """8 bits of mantissa: single products are off by up to 0.4 %, sums over three layers by a few per cent."""
    reference = setting["answers"][("gradient", "llama", 1, 1)]
    answer = setting["answers"][("gradient", "llama", "bfloat16", size)]
    assert answer["loss"] == pytest.approx(reference["loss"], rel=5e-3)
    assert 1e-5 < _largest_relative_difference(answer["gradients"], reference["gradients"]) < 0.05


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2])
def test_packed_turn_scores_equal_separate_passes(setting: dict[str, Any], family: str, size: int) -> None:
    """Packing and decomposition: log Pr(y_k | x_1, y_1, ..., x_k) from one packed pass and from K passes."""
    model, tokenizer = oracle.load(Path(setting["models"][family]))
    found: dict[int, list[tuple[int, float]]] = {}
    for sample, _, num_tokens, logprob in setting["answers"][("scores", family, size)]:
        found.setdefault(sample, []).append((num_tokens, logprob))
    assert sorted(found) == list(range(len(setting["records"])))
    for number, record in enumerate(setting["records"]):
        expected = oracle.turn_logprobs(model, tokenizer, record["messages"])
        assert [count for count, _ in found[number]] == [count for count, _ in expected]
        for (_, value), (_, reference) in zip(found[number], expected, strict=True):
            assert value == pytest.approx(reference, abs=1e-3, rel=1e-5), json.dumps(record)
