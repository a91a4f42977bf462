"""What `export` writes of a run with adapters: a folder that plain PEFT loads beside the base, or both as one model.

The base is read from model.path by plain transformers, in the precision of training, and the adapters from the
checkpoint. What is written is loaded again and compared: values, and the log-probs that the sharded model gave a probe.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft_dist.config import RunConfig
from sft_dist.errors import ConfigError, StorageError
from sft_dist.train.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

_SHARD_SIZE = "4GB"


def write(config: RunConfig, checkpoint: Checkpoint, folder: Path, dtype: str, *, merge: bool) -> float:
    """Write to `folder`, where configuration and tokenizer are already; the largest difference of a probe token.

    Raises StorageError when verification fails, ConfigError for what cannot be merged.
    """
    if not merge:
        (folder / "config.json").unlink()  # that of the base counts
        return _write_adapters(config, checkpoint, folder, dtype)
    quantise = config.adapter.quantise
    if quantise != "none":
        raise ConfigError(
            f"--merge: the adapters were trained beside weights in 4 bits (adapter.quantise: {quantise}); merged into "
            "others they would be another model; export without --merge"
        )
    return _write_merged(config, checkpoint, folder, dtype)


def _write_adapters(config: RunConfig, checkpoint: Checkpoint, folder: Path, dtype: str) -> float:
    import torch
    from peft import PeftModel

    model = _with_adapters(config, checkpoint, dtype)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    del model
    loaded = PeftModel.from_pretrained(_base(config, checkpoint), folder).eval()
    values = dict(loaded.base_model.model.named_parameters())
    for name, value in _stored(checkpoint):
        if not torch.equal(values[name], value.to(getattr(torch, dtype)).to(values[name].dtype)):
            raise StorageError(f"export: {name} does not have the checkpoint's values after loading")
    as_exported = _difference(loaded, checkpoint)
    return _judged(checkpoint, dtype, as_exported, _as_trained(loaded, checkpoint))


def _write_merged(config: RunConfig, checkpoint: Checkpoint, folder: Path, dtype: str) -> float:
    import torch
    from transformers import AutoModelForCausalLM

    # In float32, so that the sum of a weight and its update is rounded once.
    merged = _with_adapters(config, checkpoint, str(checkpoint.manifest["dtype"])).float().merge_and_unload()
    as_trained = _difference(merged, checkpoint)
    merged = merged.to(getattr(torch, dtype))
    merged.config.dtype = getattr(torch, dtype)
    merged.save_pretrained(folder, max_shard_size=_SHARD_SIZE)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        output_loading_info=True,
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=True,
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise StorageError(f"export: transformers reports {kind}: {sorted(map(str, report[kind]))[:5]}")
    values = dict(loaded.named_parameters())
    for name, value in merged.named_parameters():
        if not torch.equal(values[name], value):
            raise StorageError(f"export: {name} does not have the merged values after loading")
    del merged
    return _judged(checkpoint, dtype, _difference(loaded, checkpoint), as_trained)


def _base(config: RunConfig, checkpoint: Checkpoint) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from sft_dist.model import adapters

    dtype = getattr(torch, checkpoint.manifest["dtype"])
    quantisation = adapters.quantisation(config.adapter, dtype)
    base = AutoModelForCausalLM.from_pretrained(
        config.model.path,
        dtype=dtype,
        trust_remote_code=config.model.trust_remote_code,
        use_safetensors=None if config.model.trust_remote_code else True,
        **({} if quantisation is None else {"quantization_config": quantisation}),
    )
    adapters.keep_layout(base)
    return base


def _with_adapters(config: RunConfig, checkpoint: Checkpoint, dtype: str) -> Any:
    """PEFT's model around the base, with the checkpoint's adapters in `dtype`."""
    import torch
    from peft import PeftModel

    from sft_dist.model import adapters, zero

    base = _base(config, checkpoint)
    described = adapters.lora_config(base, config.adapter)
    described.base_model_name_or_path = config.model.path
    described.inference_mode = True
    model = PeftModel(base, described, autocast_adapter_dtype=False)
    to = getattr(torch, dtype)
    for name, _ in _stored(checkpoint):
        parameter = base.get_parameter(name)
        parameter.data = parameter.data.to(to)
    frozen = frozenset(dict(base.named_parameters())) - {name for name, _ in _stored(checkpoint)}
    zero.assign(base, ((name, value.to(to)) for name, value in _stored(checkpoint)), but=frozen)
    return model.eval()


def _stored(checkpoint: Checkpoint) -> "Iterator[tuple[str, Tensor]]":
    from sft_dist.model.engine import stored_parameters

    return stored_parameters(checkpoint.folder)


def _as_trained(loaded: Any, checkpoint: Checkpoint) -> float:
    """The difference with adapters in the precision that the sharded model computed with."""
    import torch

    trained_in = getattr(torch, checkpoint.manifest["dtype"])
    parameters = dict(loaded.base_model.model.named_parameters())
    with torch.no_grad():
        for name, value in _stored(checkpoint):
            parameters[name].copy_(value.to(trained_in))
    return _difference(loaded, checkpoint)


def _difference(model: Any, checkpoint: Checkpoint) -> float:
    """The largest of a probe token's log-prob from what the sharded model said of it."""
    from sft_dist.model.probe import plain_logprobs

    recorded = checkpoint.manifest["probe"]
    model = model.eval() if getattr(model, "is_quantized", False) else model.eval().float()
    now = [value for ids in recorded["samples"] for value in plain_logprobs(model, ids)]
    return max(abs(a - b) for a, b in zip(now, recorded["logprobs"], strict=True))


def _judged(checkpoint: Checkpoint, dtype: str, as_exported: float, as_trained: float) -> float:
    import torch

    from sft_dist.model.probe import ROUNDING

    trained_in = checkpoint.manifest["dtype"]
    bound = ROUNDING[getattr(torch, trained_in)]
    if not as_trained <= bound:
        raise StorageError(
            f"export: the probe's log-probs differ from the sharded model's by {as_trained:.3g} (allowed {bound:.3g})"
        )
    if dtype != trained_in:
        print(
            f"note: rounding from {trained_in} to {dtype} moves a probe token by up to {as_exported:.2g} nats",
            file=sys.stderr,
        )
    return as_trained
