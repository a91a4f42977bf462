"""Adapters under ZeRO-3 with real ranks: their gradient, their start, what a checkpoint holds, and how it goes on.

The oracle is plain PEFT around plain transformers in float64, one conversation at a time, at a state that training
reached: at the start the gradient of one of the two matrices is zero.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from sft_dist.config import AdapterConfig, ModelConfig
from sft_dist.errors import ConfigError
from sft_dist.model import adapters, loading
from sft_dist.model.zero import safe_load
from tests.helpers import oracle
from tests.helpers.bare import CHATML_TOKENS, build_bare_model
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import FAMILIES, build_model
from tests.helpers.worlds import run_world

pytestmark = pytest.mark.slow

SAVED, LAST = 3, 7
_TARGETS = {
    "llama": ((), ("*.q_proj", "*.v_proj"), ("*layers.1.*",), ("*mlp.down_proj",)),
    "qwen2": ((), ("*.self_attn.*",), ("*up_proj", "*.o_proj")),
    "gpt2": ((), ("*.c_attn",), ("*.mlp.*",)),
}


def _draw(number: int) -> dict[str, Any]:
    """Kinds, scales and families in turn, all else at random."""
    rng = random.Random(number)
    family = FAMILIES[number % 3]
    return {
        "family": family,
        "adapter": {
            "kind": "dora" if number % 2 else "lora",
            "rank": rng.choice([1, 2, 3, 5, 8]),
            "alpha": rng.choice([1.0, 4.0, 7.5, 16.0]),
            "rank_stabilised": number % 4 > 1,
            "targets": rng.choice(_TARGETS[family]),
        },
    }


DRAWS = [_draw(number) for number in range(6)]
DROPOUT = {"kind": "dora", "rank": 4, "dropout": 0.2}
TINY = {"kind": "lora", "rank": 2, "targets": ["*.q_proj"]}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two ranks train and write; 1, 2 and 3 ranks read that, say the gradient there, and train on."""
    folder = tmp_path_factory.mktemp("adapters")
    models = {family: str(build_model(folder / family, family)) for family in FAMILIES}
    noisy = str(build_model(folder / "noisy", "gpt2", dropout=0.1))
    records = make_records(40, max_words=6)
    data = str(write_jsonl(folder / "data.jsonl", records))
    answers: dict[Any, Any] = {}

    def case(kind: str, draw: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"case": kind, "data": data, "model": models[draw["family"]], "adapter": draw["adapter"]} | more

    for size in (2, 1, 3):
        cases: dict[Any, dict[str, Any]] = {}
        for number, draw in enumerate(DRAWS):
            saved = str(folder / f"saved-{number}")
            if size == 2:
                cases["train", number] = case("train", draw, steps=[0, SAVED], save=saved)
            cases["gradient", number, size] = case("gradient", draw, resume=saved)
        tiny = {"family": "llama", "adapter": TINY}
        cases["start", size] = case("start", DRAWS[0])
        cases["continued", size] = case("train", DRAWS[0], resume=str(folder / "saved-0"), steps=[SAVED, LAST])
        if size == 2:
            cases["whole"] = case("train", DRAWS[0], steps=[0, LAST])
            cases["bfloat16"] = case("gradient", DRAWS[0], resume=str(folder / "saved-0"), dtype="bfloat16")
            offload = {"dtype": "bfloat16", "deepspeed": "zero3_offload_all"}
            cases["offloaded"] = case("train", DRAWS[1], steps=[0, SAVED], save=str(folder / "offloaded")) | offload
            cases["tiny"] = case("train", tiny, steps=[0, 1], save=str(folder / "tiny"))
            cases["exact"] = case("exact", DRAWS[0], name="exact", epochs=1, global_packs=3) | {
                "adapter": DROPOUT,
                "model": noisy,
            }
        if size == 1:
            cases["compiled"] = case("gradient", DRAWS[0], resume=str(folder / "saved-0"), compile=True)
            cases["refused"] = case("refused", tiny, resume=str(folder / "saved-0"))
            cases["full"] = case("refused", tiny, resume=str(folder / "saved-0")) | {"adapter": {}}
            for pattern in ("lm_head", "*embed_tokens", "*.qproj"):
                cases["targets", pattern] = case("start", tiny) | {"adapter": TINY | {"targets": [pattern]}}
        found = run_world(size, list(cases.values()), folder / f"world-{size}", module="tests.helpers.adapter_cases")
        answers |= dict(zip(cases, found, strict=True))
    return {"folder": folder, "models": models, "records": records, "answers": answers}


def _plain(model: Any, adapter: dict[str, Any]) -> Any:
    """The same adapters by plain PEFT, described anew: every linear layer of a block is named by hand."""
    layers = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D") and n != "lm_head"]
    import fnmatch

    chosen = [n for n in layers if not adapter["targets"] or any(fnmatch.fnmatch(n, p) for p in adapter["targets"])]
    config = LoraConfig(
        r=adapter["rank"],
        lora_alpha=adapter["alpha"],
        use_rslora=adapter["rank_stabilised"],
        use_dora=adapter["kind"] == "dora",
        target_modules=chosen,
    )
    return inject_adapter_in_model(config, model).double()


def _largest_relative_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    return max(float((found[name] - value).abs().max()) / scale for name, value in expected.items())


@pytest.mark.parametrize("number", range(len(DRAWS)))
def test_gradient_equals_plain_peft_conversation_by_conversation(worlds: dict[str, Any], number: int) -> None:
    draw, answers = DRAWS[number], worlds["answers"]
    model, tokenizer = oracle.load(Path(worlds["models"][draw["family"]]))
    model = _plain(model, draw["adapter"])
    stored = answers["train", number]["stored"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert stored.keys() == trained.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(stored[name])
    assert all(float(p.detach().abs().max()) > 0 for p in trained.values()), "training has moved all of them"
    answer = answers["gradient", number, 1]
    chosen = [worlds["records"][index]["messages"] for index in answer["samples"]]
    loss = oracle.loss(model, tokenizer, chosen)
    loss.backward()
    expected = {name: parameter.grad for name, parameter in trained.items()}
    for size in (1, 2, 3):
        found = answers["gradient", number, size]
        assert found["loss"] == pytest.approx(float(loss.detach()), rel=1e-6)
        assert _largest_relative_difference(found["gradients"], expected) < 1e-5, size


def test_draws_are_of_all_kinds() -> None:
    kinds = {(draw["adapter"]["kind"], draw["adapter"]["rank_stabilised"]) for draw in DRAWS}
    assert len(kinds) == 4 and {draw["family"] for draw in DRAWS} == set(FAMILIES)
    assert any(draw["adapter"]["targets"] for draw in DRAWS) and not all(draw["adapter"]["targets"] for draw in DRAWS)


@pytest.mark.parametrize("size", [2, 3])
def test_everything_is_sharded_layer_by_layer_and_only_adapters_have_states(worlds: dict[str, Any], size: int) -> None:
    for number in range(len(DRAWS)):
        found = worlds["answers"]["gradient", number, size]
        assert found["unsharded"] == [] and found["leaves"] == 3
        assert found["gathered"] == [], "and everything is released after the backward, frozen embeddings or not"
        assert found["num_states"] == sum(gradient.numel() for gradient in found["gradients"].values())


def test_adapters_start_from_the_seed_on_any_number_of_ranks(worlds: dict[str, Any]) -> None:
    one, two, three = (worlds["answers"]["start", size] for size in (1, 2, 3))
    assert len(one) == 2 * len({name.rpartition(".lora_")[0] for name in one})
    for name, value in one.items():
        assert torch.equal(value, two[name]) and torch.equal(value, three[name])
        assert bool(value.any()) == ("lora_B" not in name), "one matrix of two is zero"


def test_a_checkpoint_holds_adapters_and_not_the_base(worlds: dict[str, Any]) -> None:
    """Weights and two moments of what is trained, and of the base not a byte."""
    stored = worlds["answers"]["tiny"]["stored"]
    assert all("lora_" in name for name in stored)
    trained_bytes = 3 * 4 * sum(value.numel() for value in stored.values())
    files = sorted((worlds["folder"] / "tiny").rglob("*.pt"))
    assert len(files) == 4
    base_bytes = sum(path.stat().st_size for path in Path(worlds["models"]["llama"]).glob("*.safetensors"))
    held = sum(_tensor_bytes(safe_load(path)) for path in files)
    assert trained_bytes <= held < trained_bytes + 1_000 < base_bytes / 4
    names = {name for path in files for name in safe_load(path).get("frozen_param_shapes") or {}}
    assert not names


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    values = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (list, tuple)) else ()
    return sum(map(_tensor_bytes, values))


def test_resuming_is_exact_with_dropout_in_model_and_adapters(worlds: dict[str, Any]) -> None:
    found = worlds["answers"]["exact"]
    assert found["differing"] == [[], []] and found["undisturbed"] == found["rewound"] == [True, True]
    assert found["num_steps"] > 2 and found["num_micro_batches"] > 1


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_goes_on_with_another_number_of_ranks(worlds: dict[str, Any], size: int) -> None:
    whole, found = worlds["answers"]["whole"], worlds["answers"]["continued", size]
    assert found["losses"] == pytest.approx(whole["losses"][SAVED:], abs=1e-6, rel=0)
    state = worlds["answers"]["train", 0]["state"]
    for kind, values in state.items():
        for name, value in values.items():
            assert torch.equal(found["loaded"][kind][name], value), (kind, name)
    for name, value in whole["state"]["weight"].items():
        close = torch.allclose(found["state"]["weight"][name], value, atol=1e-5)
        assert close and ("lora_" in name or torch.equal(found["state"]["weight"][name], value)), name


def test_the_base_never_moves(worlds: dict[str, Any]) -> None:
    model, _ = oracle.load(Path(worlds["models"]["llama"]))
    weights = worlds["answers"]["whole"]["state"]["weight"]
    own = {name.replace(".base_layer", ""): value for name, value in weights.items()}
    for name, parameter in model.named_parameters():
        assert torch.equal(own[name].double(), parameter.detach()), name


def test_gradient_in_bfloat16_stays_within_its_rounding(worlds: dict[str, Any]) -> None:
    exact, rounded = worlds["answers"]["gradient", 0, 2], worlds["answers"]["bfloat16"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    assert 1e-5 < _largest_relative_difference(rounded["gradients"], exact["gradients"]) < 0.1


def test_compiled_layers_have_the_same_gradient(worlds: dict[str, Any]) -> None:
    eager, compiled = worlds["answers"]["gradient", 0, 1], worlds["answers"]["compiled"]
    assert compiled["loss"] == pytest.approx(eager["loss"], rel=1e-6)
    assert _largest_relative_difference(compiled["gradients"], eager["gradients"]) < 1e-5
    assert compiled["graph_breaks"] == {}


def test_offloaded_weights_and_states_train_alike(worlds: dict[str, Any]) -> None:
    exact, found = worlds["answers"]["train", 1], worlds["answers"]["offloaded"]
    assert found["losses"] == pytest.approx(exact["losses"], rel=2e-2)
    assert found["stored"].keys() == exact["stored"].keys()
    assert all(bool(value.any()) for value in found["stored"].values()), "also those that start at zero have moved"


def test_a_checkpoint_of_other_adapters_or_of_none_is_refused_by_name(worlds: dict[str, Any]) -> None:
    (other,), (full,) = worlds["answers"]["refused"], worlds["answers"]["full"]
    assert other.startswith("ConfigError") and "holds other parameters than this run" in other
    assert full.startswith("ConfigError") and "lora_A.default.weight: in the checkpoint, not in the model" in full


@pytest.mark.parametrize("pattern", ["lm_head", "*embed_tokens", "*.qproj"])
def test_targets_that_are_none_are_refused_by_name(worlds: dict[str, Any], pattern: str) -> None:
    (told,) = worlds["answers"]["targets", pattern]
    assert told.startswith(f"ConfigError: adapter.targets: {pattern}: ")
    assert ("only linear layers of decoder layers can" in told) == (pattern != "*.qproj")
    assert ("nothing has such a name" in told) == (pattern == "*.qproj")


def test_control_tokens_that_need_new_embeddings_are_refused(tmp_path: Path) -> None:
    bare = ModelConfig(path=str(build_bare_model(tmp_path / "bare", "llama")), control_tokens=CHATML_TOKENS)
    with pytest.raises(ConfigError, match=r"control_tokens: <\|im_start\|>, <\|im_end\|> would need embeddings"):
        adapters.check_tokens(loading.new_tokens(bare))
    known = ModelConfig(path=str(build_model(tmp_path / "known", "llama")), control_tokens=CHATML_TOKENS)
    adapters.check_tokens(loading.new_tokens(known))


def test_four_bits_without_bitsandbytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"adapter.quantise: nf4 needs bitsandbytes, which is not installed"):
        adapters.quantisation(AdapterConfig(kind="lora", quantise="nf4"), torch.bfloat16)
    assert adapters.quantisation(AdapterConfig(kind="lora"), torch.bfloat16) is None
