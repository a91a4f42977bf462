"""What a resumed run must share with the checkpoint it continues, and the exact difference where it does not."""

import hashlib
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from sft_dist import __version__
from sft_dist.config import RunConfig, flatten
from sft_dist.data.store import PreparedDataset
from sft_dist.errors import ConfigError
from sft_dist.model.engine import compute_dtype
from sft_dist.train.checkpoint import Checkpoint

# Keys of the run file that change which numbers a run computes. All others may change between stop and resume.
_MATHEMATICS = (
    "seed",
    "model.dtype",
    "model.control_tokens",
    "data.max_length",
    "data.overflow",
    "data.deduplicate",
    "objective.",
    "batch.global_packs",
    "batch.balance_steps",
    "optimizer.",
    "schedule.",
)
# Of the model's configuration, what describes the file and not the function.
_NOT_MATHEMATICS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"}
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")


def facts(
    config: RunConfig, dataset: PreparedDataset, heldout: PreparedDataset | None, model_config: Any
) -> dict[str, Any]:
    """What goes into every checkpoint's manifest about the run that wrote it."""
    tree = model_config.to_dict()
    model = {key: value for key, value in tree.items() if key not in _NOT_MATHEMATICS}
    return {
        "config": flatten(config.model_dump(mode="json")),
        "dtype": str(compute_dtype(config.model)).removeprefix("torch."),
        "data": dataset.folder.name,  # content-addressed
        "mixture": [[source.repeat, source.weight] for source in config.data.train],
        "heldout": None if heldout is None else heldout.folder.name,
        "template": dataset.manifest["template"],
        "stop_ids": dataset.manifest["stop_ids"],
        "model": hashlib.sha256(json.dumps(model, sort_keys=True, default=str).encode()).hexdigest()[:16],
        "trust_remote_code": config.model.trust_remote_code,
        "versions": {"sft_dist": __version__, "python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES},
    }


def check(checkpoint: Checkpoint, now: dict[str, Any], *, allow_changed: Sequence[str]) -> None:
    """Raise ConfigError that names every difference which would change the mathematics."""
    before = checkpoint.manifest
    pairs = {
        key: (before["config"].get(key), now["config"].get(key))
        for key in sorted(before["config"].keys() | now["config"].keys())
        if key.startswith(_MATHEMATICS)
    }
    pairs["data.train (repeat, weight)"] = (before["mixture"], now["mixture"])
    pairs["data"] = (before["data"], now["data"])
    pairs["model"] = (before["model"], now["model"])
    pairs["model.dtype (resolved)"] = (before["dtype"], now["dtype"])  # auto is another one on another machine
    changed = [
        f"  {key}: {old!r} in the checkpoint, {new!r} now"
        for key, (old, new) in pairs.items()
        if old != new and not {key, key.partition(" (")[0]} & set(allow_changed)
    ]
    if changed:
        raise ConfigError(
            f"{checkpoint.folder} was written under another run file:\n" + "\n".join(changed) + "\n"
            "  restore these, or start anew (checkpoint.resume=never with another run_dir), or name the keys in "
            "checkpoint.allow_changed"
        )


def check_world_size(checkpoint: Checkpoint, world_size: int) -> None:
    written_by = checkpoint.manifest["world_size"]
    if written_by != world_size:
        raise ConfigError(
            f"{checkpoint.folder} was written by {written_by} ranks, this run has {world_size}; resuming on another "
            "number of ranks is not built yet: start as many, or take the weights alone with model.init_from"
        )
