"""What a run would take: from shapes and integers alone, and no more than what a real forward and a real run show."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    LlamaConfig,
    T5Config,
)

from sft_dist import estimate
from sft_dist.config import AdapterConfig, RunConfig, load_config
from sft_dist.data.prepare import is_prepared
from sft_dist.errors import ConfigError, ExitCode
from sft_dist.estimate import GIB, Hardware
from sft_dist.model import attention, memory
from sft_dist.preparation import training_set
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import FAMILIES, build_model, build_tokenizer

EIGHT = Hardware("H200", True, 8, 989e12, 140 * GIB, 350e9)
# As config.json of Llama 3.1 8B has them.
LLAMA_8B = {
    "vocab_size": 128_256, "hidden_size": 4_096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8_192, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B_PARAMETERS = 8_030_261_248


def run_file(folder: Path, model: Path, **changes: Any) -> RunConfig:
    write_jsonl(folder / "train.jsonl", make_records(40, max_words=6))
    tree: dict[str, Any] = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(model)},
        "data": {
            "train": str(folder / "train.jsonl"),
            "max_length": 384,
            "cache_dir": str(folder / "prepared"),
            "num_processes": 1,
        },
        "batch": {"global_packs": 3},
        "schedule": {"epochs": 2},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values if isinstance(values, dict) else values
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return load_config(folder / "run.yaml")


@pytest.fixture
def tiny(tmp_path: Path) -> RunConfig:
    """A tiny model without its weights: only config.json and tokenizer are there."""
    model = build_model(tmp_path / "model", "llama")
    for file in model.glob("*.safetensors"):
        file.unlink()
    return run_file(tmp_path, model)


@pytest.fixture
def large(tmp_path: Path) -> RunConfig:
    model = tmp_path / "large"
    LlamaConfig(**LLAMA_8B).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    return run_file(tmp_path, model, data={"max_length": 4_096}, batch={"global_packs": 16})


def printed(capsys: pytest.CaptureFixture[str], config: RunConfig, **options: Any) -> str:
    chosen = {"num_gpus": None, "gpu_memory_gib": None, "device_name": "H200"} | options
    assert estimate.run(config, **chosen) is ExitCode.DONE
    return capsys.readouterr().out


def test_a_model_of_another_kind_is_refused_by_name(tmp_path: Path) -> None:
    model = tmp_path / "other"
    T5Config(vocab_size=300).save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    config = run_file(tmp_path, model)
    with pytest.raises(ConfigError, match=r"model.path: no causal language model follows from its config\.json"):
        estimate.checkpoint_bytes(config)


def test_unprepared_data_stay_so_and_what_is_unknown_is_said(
    tiny: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    told = printed(capsys, tiny)
    assert "not prepared" in told and "number of steps unknown" in told and "at most 1,152 tokens" in told
    assert not Path(tiny.data.cache_dir).exists()
    assert not is_prepared(tiny.data.train, tiny.model, tiny.data)


def test_prepared_data_are_counted_as_the_plan_counts_them(tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    selection, plan = training_set(tiny)
    assert is_prepared(tiny.data.train, tiny.model, tiny.data)
    told = printed(capsys, tiny)
    assert f"{plan.num_samples:,} samples, {plan.num_tokens:,} tokens, {plan.num_target_tokens:,} targets" in told
    assert f"run        {plan.num_steps:,} steps, {2 * plan.num_tokens:,} tokens" in told
    load = estimate.estimate(tiny, EIGHT, (selection, plan)).load
    assert load is not None and load.targets_per_step * plan.steps_per_epoch == plan.num_target_tokens
    largest = max(
        selection.num_targets[list(pack)].sum() for s in range(plan.steps_per_epoch) for pack in plan.packs(s)
    )
    assert load.targets_per_forward == largest


def test_states_of_8_gpus_are_eighths_of_what_zero_counts(large: RunConfig) -> None:
    """2 bytes of weights and 4 each of master weight, two moments and accumulated gradient; ZeRO, section 3.1."""
    found = estimate.estimate(large, EIGHT, None)
    assert found.sizes.num_parameters == LLAMA_8B_PARAMETERS
    assert found.memory is not None
    states = [found.memory.parts[name] for name in ("weights", "master weights", "Adam moments", "gradients")]
    assert sum(states) == pytest.approx(18 * LLAMA_8B_PARAMETERS / 8, rel=1e-6)
    assert found.checkpoint_bytes == 12 * LLAMA_8B_PARAMETERS


def test_frozen_weights_have_no_states_and_every_copy_of_the_start_is_counted(large: RunConfig) -> None:
    def asked(freeze: tuple[str, ...] = (), **anchor: Any) -> estimate.Estimate:
        sections = {
            "model": large.model.model_copy(update={"freeze": freeze}),
            "anchor": large.anchor.model_copy(update=anchor),
        }
        return estimate.estimate(large.model_copy(update=sections), EIGHT, None)

    def parts(found: estimate.Estimate) -> dict[str, int]:
        assert found.memory is not None
        return found.memory.parts

    plain, frozen = asked(), asked(freeze=("*.layers.*", "lm_head*"))
    trained = 128_256 * 4_096 + 4_096  # embeddings and the last norm
    assert parts(frozen)["weights"] == parts(plain)["weights"]
    assert parts(frozen)["Adam moments"] == 8 * trained // 8
    assert frozen.checkpoint_bytes == 12 * trained + 2 * (LLAMA_8B_PARAMETERS - trained)
    on_host, on_device, compared = asked(decay=1.0), asked(decay=1.0, device="device", dtype="float32"), asked(kl=1.0)
    assert plain.host_bytes == 0 and on_host.host_bytes == 2 * LLAMA_8B_PARAMETERS // 8
    assert parts(on_host) == parts(plain)
    assert parts(on_device) == parts(plain) | {"copy of θ̂": 4 * LLAMA_8B_PARAMETERS // 8}
    kept, both = asked(kl=1.0, kl_top_k=64), asked(kl=1.0, kl_top_k=64, decay=1.0, device="device", dtype="float32")
    assert parts(kept) == parts(plain) and kept.floor == plain.floor and kept.load == plain.load
    assert parts(both) == parts(on_device), "the decay has no frozen model to look at"
    assert compared.load is not None and plain.load is not None
    assert compared.load.hardware_flops > plain.load.hardware_flops
    more = {name: size - parts(plain).get(name, 0) for name, size in parts(compared).items()}
    assert more["frozen model"] == 2 * LLAMA_8B_PARAMETERS // 8 and more["frozen model, gathered"] > 0
    assert more["head"] > 0 and not any(more[name] for name in ("weights", "master weights", "gradients"))
    assert plain.floor is not None and compared.floor is not None
    assert compared.floor.compute_s == pytest.approx(plain.floor.compute_s * 10 / 8, rel=0.03)


def test_what_is_frozen_is_called_so(large: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    frozen = large.model_copy(update={"model": large.model.model_copy(update={"freeze": ("*.layers.*",)})})
    assert re.search(r"frozen +by model\.freeze: [0-9,]+ parameters are trained", printed(capsys, frozen))


def test_a_checkpoint_of_a_prediction_head_is_counted_for_models_without_a_language_model(tmp_path: Path) -> None:
    model = tmp_path / "encoder"
    shape = {"vocab_size": 300, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4, "num_labels": 5}
    config = DistilBertConfig(**shape)
    config.save_pretrained(model)
    build_tokenizer().save_pretrained(model)
    head = {"kind": "single_label", "labels": list("abcde")}
    whole = AutoModelForSequenceClassification.from_config(config)
    assert estimate.checkpoint_bytes(run_file(tmp_path, model, head=head)) == 12 * whole.num_parameters()
    frozen = whole.distilbert.num_parameters()
    found = estimate.checkpoint_bytes(run_file(tmp_path, model, head=head | {"freeze_backbone": True}))
    assert found == 12 * (whole.num_parameters() - frozen) + 2 * frozen


def test_adapters_need_states_for_themselves_alone(large: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    """16 (n + m) for every matrix [n, m] of the layers, written out; the base takes its 2 bytes and nothing else."""
    config = large.model_copy(update={"adapter": AdapterConfig(kind="lora", rank=16)})
    square, grouped, mlp = 2 * (4_096 + 4_096), 2 * (4_096 + 1_024), 3 * (4_096 + 14_336)
    num_trained = 32 * 16 * (square + grouped + mlp)
    assert estimate.checkpoint_bytes(config) == 12 * num_trained
    found, full = (estimate.estimate(one, EIGHT, None) for one in (config, large))
    assert found.sizes.num_trained == num_trained
    assert found.sizes.num_parameters == LLAMA_8B_PARAMETERS + num_trained
    assert found.memory is not None and full.memory is not None
    parts = found.memory.parts
    assert parts["weights"] == pytest.approx(2 * (LLAMA_8B_PARAMETERS + num_trained) / 8, rel=1e-6)
    states = [parts[name] for name in ("master weights", "Adam moments", "gradients")]
    assert sum(states) == pytest.approx(16 * num_trained / 8, rel=1e-6)
    assert parts["gradients of the step, whole"] <= 4 * num_trained
    assert found.memory.total(recomputes_layers=True) < full.memory.total(recomputes_layers=True) / 2
    assert found.checkpoint_bytes == 12 * num_trained
    assert found.floor is not None and full.floor is not None and found.floor.communication_s is not None
    moved = 2 * (2 * (LLAMA_8B_PARAMETERS + num_trained) + num_trained) * 2
    assert found.floor.communication_s == pytest.approx(moved * 7 / 8 / 350e9)
    assert f"lora of rank 16: {num_trained:,} parameters are trained" in printed(capsys, config, num_gpus=8)


@pytest.mark.parametrize(("recomputes", "factors"), [(True, (8, 9)), (False, (6, 7))])
def test_the_floor_of_full_packs_is_that_of_the_formula(
    large: RunConfig, recomputes: bool, factors: tuple[int, int]
) -> None:
    """Two forwards of one pack of 4,096 tokens on each of 8 ranks, written out here a second time."""
    config = large.model_copy(update={"model": large.model.model_copy(update={"gradient_checkpointing": recomputes})})
    floor = estimate.estimate(config, EIGHT, None).floor
    assert floor is not None and floor.communication_s is not None
    matrices = 32 * (2 * 4_096 * 4_096 + 2 * 4_096 * 1_024 + 3 * 4_096 * 14_336)
    tokens = 16 * 4_096
    linear, square = factors
    flops = (linear * matrices + 6 * 4_096 * 128_256 + square * 32 * 4_096 * 4_097) * tokens
    assert floor.compute_s == pytest.approx(flops / (8 * 989e12))
    assert floor.communication_s == pytest.approx(2 * 3 * 2 * LLAMA_8B_PARAMETERS * 7 / 8 / 350e9)
    assert floor.step_s == max(floor.compute_s, floor.communication_s)


def test_it_says_whether_it_fits(large: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    line = "total with recomputation of layers .*<- this run file"
    fits = re.search(line, printed(capsys, large, num_gpus=8))
    assert fits and "of 140.0: fits" in fits[0]
    alone = re.search(line, printed(capsys, large, num_gpus=1))
    assert alone and "DOES NOT FIT" in alone[0]
    small = re.search(line, printed(capsys, large, num_gpus=8, gpu_memory_gib=16))
    assert small and "of 16.0: DOES NOT FIT" in small[0]


def test_more_ranks_need_less_each_and_recomputation_saves_activations(large: RunConfig) -> None:
    totals = []
    for ranks in (2, 8, 64):
        needed = estimate.estimate(large, Hardware("H200", True, ranks, 989e12, 140 * GIB, 350e9), None).memory
        assert needed is not None
        assert needed.activations_recomputed < needed.activations_whole / 4
        totals.append(needed.total(recomputes_layers=True))
    assert totals == sorted(totals, reverse=True) and totals[0] > 2 * totals[-1]


def test_ranks_that_do_not_divide_the_packs_wait_and_that_is_said(
    tiny: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    told = printed(capsys, tiny, num_gpus=2)
    assert "batch.global_packs (3) fill 75% of what 2 ranks compute in 2 forward(s)" in told


def test_waiting_ranks_are_part_of_the_floor(tiny: RunConfig) -> None:
    """Three packs of one cost: two ranks need the time of two, not of one and a half."""
    times = []
    for ranks in (1, 2, 3):
        floor = estimate.estimate(tiny, Hardware("H200", True, ranks, 989e12, 140 * GIB, 350e9), None).floor
        assert floor is not None
        times.append(floor.compute_s)
    assert [time / times[2] for time in times] == pytest.approx([3, 2, 1])


def test_unknown_devices_are_refused_with_those_that_are_known(tiny: RunConfig) -> None:
    with pytest.raises(ConfigError, match=r"--device: H2000 is not known; known are CPU, .*H200.*A100"):
        estimate.run(tiny, num_gpus=None, gpu_memory_gib=None, device_name="H2000")


def test_a_cpu_is_measured_and_its_ranks_share_its_memory(tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, tiny, device_name="cpu", num_gpus=2, gpu_memory_gib=8)
    assert "2 rank(s) on the CPU of this machine" in told and "the matrix rate measured now" in told
    assert "of 4.0: fits" in told and "communication unknown" in told


def test_a_run_that_was_measured_is_set_beside_the_floor(tiny: RunConfig, capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate.estimate(tiny, EIGHT, training_set(tiny)).load
    assert found is not None
    peak = 2 * 50e9
    floor = peak * found.tokens_per_step / found.hardware_flops  # tokens/s
    summary = {"ranks": 2, "tokens_per_s": 0.8 * floor, "peak_flops_per_s": peak, "memory_gib": 0.75}
    Path(tiny.run_dir).mkdir()
    (Path(tiny.run_dir) / "summary.json").write_text(json.dumps(summary))
    told = printed(capsys, tiny)
    assert "on 2 rank(s): 80% of the floor of its devices" in told
    assert "on 2 rank(s): 0.75" in told


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_forward_keeps_is_what_autograd_keeps_of_a_real_one(tmp_path: Path, family: str) -> None:
    """Distinct storages behind saved tensors, without parameters; the kernel of a CPU keeps log-sums as well."""
    folder, num_tokens = build_model(tmp_path, family), 256
    config = AutoConfig.from_pretrained(folder)
    counted = memory.saved_by_forward(
        memory.model_without_weights(config, torch.float32, trust_remote_code=False), num_tokens
    )
    assert counted is not None
    attention.register()
    real = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.SPLIT).train()
    seen = {parameter.untyped_storage().data_ptr(): parameter for parameter in real.parameters()}
    total = 0

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor
            total += storage.nbytes()
        return tensor

    ids = torch.arange(num_tokens)[None] % 300
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        real.base_model(input_ids=ids, position_ids=torch.arange(num_tokens)[None], use_cache=False)
    assert counted.all_layers + counted.outside == pytest.approx(total, rel=0.1)
    assert counted.largest_layer * 3 == pytest.approx(counted.all_layers, rel=0.05), "three layers alike"


def test_what_a_forward_keeps_grows_with_its_tokens_and_knows_no_square(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(build_model(tmp_path, "llama"))
    model = memory.model_without_weights(config, torch.bfloat16, trust_remote_code=False)
    one, four = memory.saved_by_forward(model, 100), memory.saved_by_forward(model, 400)
    assert one is not None and four is not None
    assert four.all_layers == 4 * one.all_layers
