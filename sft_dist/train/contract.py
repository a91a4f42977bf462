"""What a resumed run must share with the checkpoint it continues, and the exact difference where it does not.

Every checkpoint's manifest holds `facts` of the run that wrote it. What changes the numbers or the samples of a step is
a difference under a key of the run file, and is refused unless checkpoint.allow_changed names that key; what changes
only rounding or is not read again is said. Files are compared by content: a run may move.
"""

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from sft_dist import __version__
from sft_dist.config import AdapterConfig, HeadConfig, RunConfig, flatten, may_change
from sft_dist.data.plan import Plan
from sft_dist.data.store import PreparedDataset
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError
from sft_dist.model.engine import compute_dtype, states_dtype
from sft_dist.model.loading import load_config, weights_fingerprint
from sft_dist.train.checkpoint import MANIFEST, Checkpoint, step_folders

# Of the model's configuration, what describes the file and not the function.
_NOT_MATHEMATICS = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
_PACKAGES = ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "numpy")
# Of those, the ones whose next minor version may round otherwise.
_ARITHMETIC = ("torch", "deepspeed", "transformers")
# Keys of the run file that decide what a record becomes.
_RENDERING = ("model.control_tokens", "data.template_kwargs", "data.date")
# Of tokenizer.json, what every text that is encoded here ignores.
_NOT_ENCODING = {"truncation", "padding", "version"}
_NAMED = 5  # labels in a message

Difference = tuple[str, str]  # key of the run file that may allow it, the line that names it


def facts(
    config: RunConfig, dataset: PreparedDataset, heldout: PreparedDataset | None, model_config: Any, plan: Plan
) -> dict[str, Any]:
    """What goes into every checkpoint's manifest about the run that wrote it, as JSON gives it back."""
    tree = model_config.to_dict()
    found = {
        "config": flatten(config.model_dump(mode="json")),
        "dtype": str(compute_dtype(config.model)).removeprefix("torch."),
        "states": str(states_dtype(config)).removeprefix("torch."),
        "data": {
            "samples": samples_digest(dataset),
            "sources": [
                {"path": item["path"], "sha256": item["sha256"], "repeat": source.repeat, "weight": source.weight}
                for item, source in zip(dataset.manifest["sources"], config.data.train, strict=True)
            ],
        },
        "first_step": _digest(repr([tuple(map(int, pack)) for pack in plan.packs(0)]).encode()),
        "heldout": None if heldout is None else samples_digest(heldout),
        "tokenizer": _tokenizer(config),
        "template": dataset.manifest["template"],
        "stop_ids": dataset.manifest["stop_ids"],
        "model": {key: value for key, value in tree.items() if key not in _NOT_MATHEMATICS},
        "weights": weights_fingerprint(config.model.path, model_config),
        "initial": _initial(config.model.init_from),
        "trust_remote_code": config.model.trust_remote_code,
        "versions": {"sft_dist": __version__, "python": platform.python_version()}
        | {package: version(package) for package in _PACKAGES}
        | ({} if config.adapter.kind == "none" else {"peft": version("peft")}),
    }
    as_json: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return as_json


def check(
    checkpoint: Checkpoint, now: Mapping[str, Any], *, world_size: int, allow_changed: Sequence[str]
) -> list[str]:
    """What else is worth saying. Raises ConfigError that names every difference which is not allowed."""
    before = checkpoint.manifest
    if unknown := sorted(now.keys() - before.keys()):
        raise ConfigError(
            f"{checkpoint.folder}: its manifest says nothing of {', '.join(unknown)}: written by another version of "
            "sft-dist; go on with that one, or take its weights with model.init_from"
        )
    changed = [line for key, line in differences(before, now) if key not in allow_changed]
    if changed:
        lines = "".join(f"\n  {line}" for line in changed)
        raise ConfigError(
            f"{checkpoint.folder} was written under another run file:{lines}\n"
            "  restore these, or start anew (checkpoint.resume=never with another run_dir), or name the keys in "
            "checkpoint.allow_changed"
        )
    return notes(before, now, world_size=world_size)


def check_base(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises ConfigError where model.path has other weights than those that a checkpoint's adapters stand beside.

    Checkpoints of adapters hold nothing else; all others hold every weight, and fit.
    """
    if config.adapter.kind == "none":
        return
    before = checkpoint.manifest["weights"]
    now = weights_fingerprint(config.model.path, load_config(config.model, max_length=2))
    if before != now:
        raise ConfigError(f"{checkpoint.folder}: {_other_base(before, now)} ({config.model.path}); restore them")


def check_language_model(config: RunConfig, run_dir: str) -> None:
    """Raises ConfigError where a run, of which this is the saved run file, trained a head that writes no answers."""
    if config.head.is_in_place:
        raise ConfigError(
            f"{run_dir}: trained a prediction head (head.kind: {config.head.kind}) in the place of the language "
            "model's: there is nothing that answers or scores tokens; see predict and export"
        )


def check_initial(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raises ConfigError where a checkpoint cannot give this run its initial weights."""
    before, source = checkpoint.manifest["config"], config.model.init_from
    tokens = tuple(before.get("model.control_tokens") or ())
    if tokens != config.model.control_tokens:
        raise ConfigError(
            f"model.init_from: {source} was trained with model.control_tokens: {list(tokens)}, this run file has "
            f"{list(config.model.control_tokens)}: rows of the embeddings would change their tokens; use the same, or "
            "export that run and make the export this run's model.path"
        )
    head = config.head
    old_head = HeadConfig.model_validate(
        {key.removeprefix("head."): value for key, value in before.items() if key.startswith("head.")}
    )
    # One head beside the language model's may be new.
    if old_head.is_in_place or head.is_in_place or (old_head.is_beside and head.is_beside):
        for key, old, now in (
            ("head.kind", old_head.kind, head.kind),
            ("head.labels", old_head.labels, head.labels),
            ("head.language_model_weight above 0", str(old_head.is_beside), str(head.is_beside)),
        ):
            if old != now:
                raise ConfigError(
                    f"model.init_from: {source} was trained with {key}: {_named(old)}, this run has {_named(now)}: "
                    "what the outputs of its head mean would change; use the same, or make a model without that head "
                    "this run's model.path"
                )
    for key, now in flatten({"adapter": config.adapter.model_dump(mode="json")}).items():
        old = before.get(key, AdapterConfig.model_fields[key.removeprefix("adapter.")].default)
        if key != "adapter.dropout" and json.loads(json.dumps(old)) != now:
            raise ConfigError(
                f"model.init_from: {source} was trained with {key}: {old}, this run file has {now}: its weights are "
                "those of another network; use the same, or export that run (with --merge, if it has adapters) and "
                "make the export this run's model.path"
            )
    check_base(config, checkpoint)


def _other_base(before: str, now: str) -> str:
    return f"model.path: other weights than the adapters were trained beside ({before} in the checkpoint, {now} now)"


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Everything that would change the samples or the numbers of the steps to come."""
    old, new = before["config"], now["config"]
    found = [
        (key, _pair(key, old.get(key), new[key]))
        for key in sorted(new)
        if not may_change(key) and key != "model.dtype" and old.get(key) != new[key]
    ]
    for key, name, fact in (
        ("model.dtype", "model.dtype (resolved)", "dtype"),  # auto is another one on another machine
        ("deepspeed", "deepspeed (master weights and moments)", "states"),
    ):
        if before[fact] != now[fact]:
            found.append((key, _pair(name, before[fact], now[fact])))
    lost = start_lost(before, now)
    needed_by = [key for key in ("anchor.decay", "anchor.kl") if new[key]]
    if lost is not None and needed_by:
        found.append((lost[0], f"{lost[1]}, and {needed_by[0]} needs the weights that training started from"))
    if new["adapter.kind"] != "none" and before["weights"] != now["weights"]:
        found.append(("model.path", _other_base(before["weights"], now["weights"])))
    rendering = _of_tokenizer(before["tokenizer"], now["tokenizer"]) + _of_template(before["template"], now["template"])
    is_explained = bool(rendering) or any(key in _RENDERING for key, _ in found)
    found += _of_model(before, now) + rendering + _of_data(before, now, is_explained=is_explained)
    if not found and before["first_step"] != now["first_step"]:
        # The same of everything, and yet another order: of another numpy, or packed by other code.
        found.append(("seed", f"the order of samples: other ones in step 1 than before ({_versions(before, now)})"))
    return found


def start_lost(before: Mapping[str, Any], now: Mapping[str, Any]) -> Difference | None:
    """Why the weights at step 0, which no checkpoint holds, cannot be had again; None where they can."""
    if before["initial"] != now["initial"]:
        pair = _pair("model.init_from (its newest checkpoint, sha256)", before["initial"], now["initial"])
        return "model.init_from", pair
    if now["initial"] is None and before["weights"] != now["weights"]:
        return "model.path", _pair("model.path (weights, sampled sha256)", before["weights"], now["weights"])
    return None


def notes(before: Mapping[str, Any], now: Mapping[str, Any], *, world_size: int) -> list[str]:
    """What changes no sample, and numbers at most in their last bits."""
    found = []
    if before["world_size"] != world_size:
        found.append(
            f"note: written by {before['world_size']} ranks, going on with {world_size}: the same samples in every "
            "step, sums in another order, other draws of dropout"
        )
    minor = {
        name: (before["versions"].get(name), now["versions"].get(name))
        for name in _ARITHMETIC
        if _minor(before["versions"].get(name)) != _minor(now["versions"].get(name))
    }
    if minor:
        listed = ", ".join(f"{name} {old} -> {new}" for name, (old, new) in minor.items())
        found.append(f"note: other versions than in the checkpoint ({listed}): results may differ in rounding")
    if now["config"]["adapter.kind"] == "none" and before["weights"] != now["weights"]:
        found.append(
            "note: model.path holds other weights than this run started from; they are not used: all weights, frozen "
            "ones too, come from the checkpoint"
        )
    if (lost := start_lost(before, now)) is not None:
        found.append(f"note: the drift from the start of the run is not known any more: {lost[1]}")
    return found


def _of_model(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    old, new = flatten(before["model"]), flatten(now["model"])
    names = old.keys() | new.keys()
    if before["versions"].get("transformers") != now["versions"].get("transformers"):
        names = old.keys() & new.keys()  # a version writes keys that another does not know
    return [
        ("model.path", _pair(f"model.path (config.json {name})", old.get(name), new.get(name)))
        for name in sorted(names)
        if old.get(name) != new.get(name)
    ]


def _of_tokenizer(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    return [
        ("model.path", _pair(f"model.path (tokenizer: {name})", before.get(name), now.get(name)))
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _of_template(before: str | None, now: str | None) -> list[Difference]:
    if before == now:
        return []
    pairs = zip_longest((before or "").splitlines(), (now or "").splitlines())
    number, (old, new) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
    return [("data.chat_template", _pair(f"data.chat_template (line {number} of the template)", old, new))]


def _of_data(before: Mapping[str, Any], now: Mapping[str, Any], *, is_explained: bool) -> list[Difference]:
    old, new = before["data"], now["data"]
    pairs = list(zip_longest(old["sources"], new["sources"]))
    found = []
    for number, (was, source) in enumerate(pairs):
        name = f"data.train[{number}]"
        if was is None or source is None:
            found.append(_pair(name, was and was["path"], source and source["path"]))
            continue
        found += [
            _pair(f"{name}.{key} ({source['path']})", was[key], source[key])
            for key in ("repeat", "weight")
            if was[key] != source[key]
        ]
        if old["samples"] != new["samples"] and was["sha256"] != source["sha256"]:
            found.append(
                _pair(f"{name} ({source['path']}): content, sha256", was["sha256"][:16], source["sha256"][:16])
            )
    if not found and not is_explained and old["samples"] != new["samples"]:
        found.append(f"data.train: the same files become other samples than before ({_versions(before, now)})")
    return [("data.train", line) for line in found]


def _pair(name: str, old: Any, new: Any) -> str:
    return f"{name}: {_shown(old)} in the checkpoint, {_shown(new)} now"


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)


def _named(value: str | Sequence[str]) -> str:
    """A kind of head, or the first of its labels."""
    if isinstance(value, str):
        return value
    return f"{len(value)} ({', '.join(value[:_NAMED])}{' ...' if len(value) > _NAMED else ''})"


def _versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = before["versions"], now["versions"]
    changed = [f"{name} {old.get(name)} -> {new[name]}" for name in new if old.get(name) != new[name]]
    return ", ".join(changed) or "other code of the same versions"


def _minor(text: str | None) -> tuple[str, ...]:
    return tuple((text or "").split(".")[:2])


def samples_digest(dataset: PreparedDataset) -> str:
    """Of what the plan and the targets follow from: contents, lengths, order, spans, weights; not the tokens.

    With the tokenizer's and the template's identity it stands for the tokens, and costs some 60 bytes a sample to read.
    """
    spans = dataset.spans
    columns = [dataset.column(name) for name in ("digest", "index", "weight")]
    columns += [dataset.lengths, spans.sample, spans.output_start, spans.output_end, spans.train, spans.weight]
    return _digest(*(np.ascontiguousarray(column).view(np.uint8) for column in columns))


def _tokenizer(config: RunConfig) -> dict[str, Any]:
    """Its parts by name: digests of the sections of tokenizer.json, and special tokens as they are."""
    tokenizer = load_tokenizer(config.model)
    sections = json.loads(tokenizer.backend_tokenizer.to_str())
    parts: dict[str, Any] = {
        name: _digest(json.dumps(section, sort_keys=True).encode())
        for name, section in sections.items()
        if name not in _NOT_ENCODING
    }
    return parts | {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}


def _initial(run_dir: str | None) -> str | None:
    """Identity of the checkpoint that model.init_from names: its manifest, which holds the digests of its files."""
    for folder in reversed(step_folders(Path(run_dir)).values()) if run_dir is not None else ():
        if (folder / MANIFEST).exists():
            return _digest((folder / MANIFEST).read_bytes())
    return None


def _digest(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]
