"""Settings that follow from the model: what they must satisfy for any model, and that they reach DeepSpeed."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.config import ModelConfig, RunConfig
from sft_dist.errors import ConfigError
from sft_dist.model import engine as engines
from sft_dist.model import sharding
from sft_dist.model.engine import deepspeed_folder
from sft_dist.model.sharding import Shapes, training_settings
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import build_model
from tests.helpers.worlds import run_world

GIB = 2**30
OFFLOADING = ("zero3_offload_optimizer", "zero3_offload_all")


@st.composite
def shapes(draw: st.DrawFn) -> Shapes:
    layers = tuple(draw(st.lists(st.integers(10**3, 10**9), min_size=0, max_size=100)))
    outside = draw(st.lists(st.integers(1, 2 * 10**9), min_size=1, max_size=4))
    largest = max([*(layer // 3 + 1 for layer in layers), *outside])
    total = sum(layers) + sum(outside)
    return Shapes(layers, total, draw(st.integers(1, total)), largest, draw(st.integers(0, largest)))


BUDGETS = st.one_of(st.none(), st.integers(0, 10**12))


@given(shapes(), st.integers(1, 1024), st.sampled_from([2, 4]), BUDGETS)
def test_settings_hold_what_is_at_work_and_stay_in_the_budget(
    model: Shapes, world_size: int, element_bytes: int, budget: int | None
) -> None:
    found = training_settings(model, world_size=world_size, element_bytes=element_bytes, memory_budget_bytes=budget)
    values = found.values
    layer = max(model.layers, default=model.largest)
    assert found.reasons.keys() == values.keys()
    assert values["stage3_prefetch_bucket_size"] >= layer, "the next layer is on its way while this one is computed"
    assert values["stage3_max_live_parameters"] >= min(2 * layer, model.total), "prefetching is never starved"
    assert values["reduce_bucket_size"] >= min(layer, model.trained)
    assert values["stage3_max_reuse_distance"] <= values["stage3_max_live_parameters"] <= model.total
    assert found.kept_bytes <= (budget or 0)
    assert (found.kept == 1.0) == ((budget or 0) // element_bytes >= model.total)
    if model.layers:
        assert values["stage3_param_persistence_threshold"] == 0
    assert values["sub_group_size"] * world_size >= model.largest


@given(shapes(), st.integers(1, 64), BUDGETS, BUDGETS)
def test_the_layout_of_checkpoint_files_does_not_follow_the_memory(
    model: Shapes, world_size: int, budget: int | None, other: int | None
) -> None:
    first, second = (
        training_settings(model, world_size=world_size, element_bytes=2, memory_budget_bytes=b).values
        for b in (budget, other)
    )
    assert first["sub_group_size"] == second["sub_group_size"]


@given(shapes(), st.integers(0, 10**12), st.integers(0, 10**12))
def test_more_memory_never_keeps_less(model: Shapes, budget: int, more: int) -> None:
    little, much = (
        training_settings(model, world_size=8, element_bytes=2, memory_budget_bytes=b).kept
        for b in (budget, budget + more)
    )
    assert little <= much


def test_an_8b_model_on_one_and_on_64_ranks() -> None:
    """Llama 3.1 8B: 32 layers of 218 M, embeddings and head of 525 M each, on devices of 139 GiB."""
    model = Shapes((218_112_000,) * 32, 8_030_261_248, 8_030_261_248, 525_336_576, 4_096)
    answers = {}
    for ranks in (1, 64):
        budget = sharding.memory_budget(139 * GIB, sharding.state_bytes(model, world_size=ranks, element_bytes=2))
        settings = training_settings(model, world_size=ranks, element_bytes=2, memory_budget_bytes=budget)
        once = sharding.reduces_once("auto", model, settings, num_micro_batches=4, memory_budget_bytes=budget)
        answers[ranks] = (round(budget / GIB), settings.kept, once)
    # 18 bytes a parameter leave 4 GiB on one rank: half of that is not enough to keep anything.
    assert answers == {1: (2, 0.0, False), 64: (68, 1.0, True)}


def test_a_gradient_is_reduced_once_only_where_there_is_something_to_save() -> None:
    model = Shapes((100,), 150, 150, 50, 10)
    settings = training_settings(model, world_size=2, element_bytes=4, memory_budget_bytes=600)

    def ask(wanted: object, num_micro_batches: int, budget: int) -> bool:
        return sharding.reduces_once(
            wanted,  # type: ignore[arg-type]
            model,
            settings,
            num_micro_batches=num_micro_batches,
            memory_budget_bytes=budget,
        )

    assert settings.kept == 1.0
    assert [ask("auto", 2, 1200), ask("auto", 2, 1199), ask("auto", 1, 9999)] == [True, False, False]
    assert [ask(True, 2, 0), ask(True, 1, 9999), ask(False, 2, 9999)] == [True, False, False]


def test_what_the_file_says_wins() -> None:
    tree = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7}, "data_types": {}}
    values = {"reduce_bucket_size": 1, "sub_group_size": 2}
    assert sharding.filled(tree, values) == {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "sub_group_size": 2},
        "data_types": {},
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, object]]:
    """The gradient of one step of three micro-batches on two ranks, and of one rank, in several layouts of memory."""
    folder = tmp_path_factory.mktemp("settings")
    own_file = json.loads((deepspeed_folder() / "cpu.json").read_text())
    own_file["zero_optimization"] |= {
        "sub_group_size": 3_000,
        "stage3_max_reuse_distance": 0,
        "reduce_bucket_size": 999,
    }
    (folder / "own.json").write_text(json.dumps(own_file))
    common = {
        "model": str(build_model(folder / "model", "qwen2")),
        "data": str(write_jsonl(folder / "train.jsonl", make_records(24, max_words=8))),
        "global_packs": 5,
        "case": "gradient",
    }
    same = {"case": "same_again", "dtype": "bfloat16", "global_packs": 32}
    cases = {
        "each": {"reduce_once": False},
        "once": {"reduce_once": True},
        "own file": {"deepspeed": str(folder / "own.json")},
        "own file each": {"deepspeed": str(folder / "own.json"), "reduce_once": False},
        "bf16 each": same | {"reduce_once": False},
        "bf16 once": same | {"reduce_once": True},
        "bf16 once, small buckets": same | {"reduce_once": True, "deepspeed": str(folder / "own.json")},
        "parameters": {"case": "parameters", "deepspeed": str(folder / "own.json")},
        "steps each": {"case": "stepped", "steps": 2, "reduce_once": False},
        "steps once": {"case": "stepped", "steps": 2, "reduce_once": True},
        "steps zero3": {"case": "stepped", "steps": 2, "reduce_once": False, "deepspeed": "zero3"},
    }
    for layout in OFFLOADING:
        cases[f"steps {layout} each"] = cases["steps each"] | {"deepspeed": layout}
        cases[f"steps {layout} once"] = cases["steps once"] | {"deepspeed": layout}
    found = run_world(2, [common | case for case in cases.values()], folder / "world")
    return dict(zip(cases, found, strict=True))


def difference(found: dict[str, object], expected: dict[str, object]) -> float:
    ours, theirs = found["gradients"], expected["gradients"]
    assert isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys()
    scale = max(float(value.abs().max()) for value in theirs.values())
    return max(float((ours[name] - value).abs().max()) / scale for name, value in theirs.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["once", "own file", "own file each"])
def test_the_gradient_is_the_same_reduced_once_and_with_any_settings(answers: dict[str, dict], name: str) -> None:
    assert answers[name]["loss"] == answers["each"]["loss"]
    assert difference(answers[name], answers["each"]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16 once", "bf16 once, small buckets"])
def test_in_bfloat16_a_gradient_reduced_once_is_summed_in_float32(answers: dict[str, dict], name: str) -> None:
    """Sixteen times a number is exact in float32, and in bfloat16 after it; summed in bfloat16, it is rounded."""
    each, once = answers["bf16 each"], answers[name]
    for key, value in each.items():
        assert value.abs().max() > 0, key
        assert torch.equal(once[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["steps once", "steps zero3", *(f"steps {layout} {how}" for layout in OFFLOADING for how in ("each", "once"))],
)
def test_the_same_steps_are_taken_reduced_once_and_offloaded(answers: dict[str, dict], name: str) -> None:
    each, once = answers["steps each"], answers[name]
    assert once["norms"] == pytest.approx(each["norms"], rel=1e-4) and min(each["norms"]) > 0
    for name, value in each["parameters"].items():
        assert torch.allclose(once["parameters"][name], value, rtol=1e-3, atol=1e-3), name


@pytest.mark.slow
def test_settings_reach_deepspeed_and_the_record(answers: dict[str, dict]) -> None:
    each, once, own = (answers[name]["settings"] for name in ("each", "once", "own file"))
    assert (each["reduce_once"], once["reduce_once"], own["reduce_once"]) == (False, True, True)
    assert (own["sub_group_size"], own["reduce_bucket_size"], own["stage3_max_reuse_distance"]) == (3_000, 999, 0)
    assert each["decoder_layers"] == 3 and each["weights_kept"] == 1.0
    assert each["stage3_prefetch_bucket_size"] == own["stage3_prefetch_bucket_size"] > 0


@pytest.mark.slow
def test_a_checkpoint_of_many_optimizer_tiles_holds_the_parameters(answers: dict[str, dict]) -> None:
    whole, saved = answers["parameters"]["parameters"], answers["parameters"]["saved"]
    assert whole.keys() == saved.keys()
    assert all(torch.equal(saved[name], value.float()) for name, value in whole.items())


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
def test_states_outside_the_checkpoints_are_refused_before_a_run_that_could_not_be_resumed(
    tmp_path: Path, part: str
) -> None:
    file = tmp_path / "nvme.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, part: {"device": "nvme", "nvme_path": "/x"}}}))
    config = RunConfig(run_dir="unused", model=ModelConfig(path="unused"), deepspeed=str(file))
    with pytest.raises(ConfigError, match=f"{part}.device: nvme leaves states outside the checkpoints"):
        engines.resolve_deepspeed_config(config)
