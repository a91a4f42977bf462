"""The verb `export`: a checkpoint as safetensors, tokenizer and template that plain transformers loads, verified.

Parameters are streamed one at a time from the shards, so memory stays at one file of the export; between the
pre-trained weights and those of the checkpoint, both sides are (model/interpolation.py). What is written is loaded
again and compared: names, shapes, values, ties, and the log-probs that the sharded model gave a probe.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sft_dist import __version__, adapter_export, faults
from sft_dist.config import RunConfig
from sft_dist.data.tokenizer import load_tokenizer
from sft_dist.errors import ConfigError, ExitCode, StorageError, say
from sft_dist.train import contract, rundir
from sft_dist.train.checkpoint import Checkpoint, find

_FILE_BYTES = 4 * 2**30
RECORD = "sft_dist.json"  # what the export is, for those who find it

Values = Callable[[], Iterator[tuple[str, Any]]]  # (name, tensor) of every parameter, from the first one again


def run(
    run_dir: Path, output: Path, *, which: str, dtype: str | None, coefficient: float = 1.0, merge: bool = False
) -> ExitCode:
    """Export a checkpoint of `run_dir` to the new folder `output`. Raises StorageError when verification fails.

    With a coefficient a below 1 its weights are θ̂ + a (θ̃ − θ̂), with θ̂ the pre-trained and θ̃ those of the checkpoint;
    ConfigError where θ̂ is no longer what the run started from. Of a run with adapters these alone are written, or with
    `merge` the model that they and their base are together.
    """
    from transformers.utils import logging

    from sft_dist.model.engine import set_environment
    from sft_dist.model.loading import load_config

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # each class passes over the other's head; what it misses is looked at below
    set_environment()
    config = rundir.saved_config(run_dir)
    checkpoint = find(run_dir, which)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"--output: {output} exists and is not an empty folder")
    load_config(config.model, max_length=2)  # a base model that moved is told before anything is written
    contract.check_base(config, checkpoint)
    has_adapters = config.adapter.kind != "none"
    if merge and not has_adapters:
        raise ConfigError(f"--merge: {run_dir} has trained all weights: there are no adapters to merge; leave it out")
    values = _values(config, checkpoint, coefficient)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as private:
            written = Path(private) / output.name  # with the modes that a new folder has, which the private one has not
            written.mkdir()
            chosen = _write_companions(config, checkpoint, written, dtype)
            if has_adapters:
                difference = adapter_export.write(config, checkpoint, written, chosen, merge=merge)
            else:
                _write_weights(checkpoint, values, written, chosen)
                difference = _verify(config, checkpoint, values, written, chosen, coefficient)
            _write_record(config, checkpoint, coefficient, written)
            num_bytes = sum(file.stat().st_size for file in written.glob("*.safetensors"))
            if output.exists():
                output.rmdir()
            faults.reach("export.before_rename", rank=0)
            os.replace(written, output)
    except OSError as error:
        raise StorageError(f"--output: {output}: cannot be written: {error}") from error
    is_tuned = coefficient == 1.0
    place = "" if is_tuned else f", {coefficient:g} of the way from the pre-trained weights,"
    compared = "logits" if config.head.is_in_place else "log-probs"
    compared += " and logits" if config.head.is_beside else ""
    print(
        f"exported step {checkpoint.step:,}{place} ({num_bytes / 2**20:,.0f} MiB, {chosen}) to {output}: names, "
        f"shapes, values and ties verified; probe {compared} {'' if is_tuned else 'at coefficient 1 '}equal the "
        f"sharded model's to {difference:.1e}"
    )
    return ExitCode.DONE


def check_pretrained(config: RunConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError unless the checkpoint is of the same parameters as the pre-trained model, and model.path holds
    the weights that its run started from.
    """
    from sft_dist.model.loading import load_config, weights_fingerprint

    has_adapters = config.adapter.kind != "none"
    if has_adapters or config.head.kind != "none":
        raise ConfigError(
            f"--interpolate: {checkpoint.folder} holds {'adapters' if has_adapters else 'a head'}, which the "
            "pre-trained model lacks: nothing lies between"
        )
    found = weights_fingerprint(config.model.path, load_config(config.model, max_length=2))
    if found != checkpoint.manifest["weights"]:
        raise ConfigError(
            f"--interpolate: {config.model.path} holds other weights ({found}) than the run started from "
            f"({checkpoint.manifest['weights']}), so nothing lies between them; put the original ones back there"
        )
    if init_from := checkpoint.manifest["config"].get("model.init_from"):
        say(
            f"note: the run started from {init_from}, which was itself tuned; coefficient 0 is the pre-trained model "
            f"in {config.model.path}"
        )


def _values(config: RunConfig, checkpoint: Checkpoint, coefficient: float) -> Values:
    from sft_dist.model.engine import stored_parameters
    from sft_dist.model.interpolation import Pretrained, interpolated

    if coefficient == 1.0:
        return lambda: stored_parameters(checkpoint.folder)
    check_pretrained(config, checkpoint)
    pretrained = Pretrained(config.model, seed=config.seed)
    return lambda: interpolated(pretrained, stored_parameters(checkpoint.folder), coefficient)


def _write_record(config: RunConfig, checkpoint: Checkpoint, coefficient: float, folder: Path) -> None:
    record = {
        "sft_dist": __version__,
        "base": config.model.path,
        "base_weights": checkpoint.manifest["weights"],
        "step": checkpoint.step,
        "interpolate": coefficient,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _write_companions(run: RunConfig, checkpoint: Checkpoint, folder: Path, dtype: str | None) -> str:
    """Configuration, generation settings, tokenizer and template; returns the name of the export's dtype."""
    import torch
    from transformers import GenerationConfig

    from sft_dist.model.classifier import configuration
    from sft_dist.model.loading import load_config, new_tokens

    model = run.model
    config = load_config(model, max_length=2)
    chosen = dtype or str(checkpoint.manifest["dtype"])
    config.dtype = getattr(torch, chosen)
    added = new_tokens(model)
    if added is not None:
        config.get_text_config().vocab_size = added.num_rows(config)
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = checkpoint.manifest["template"]
    tokenizer.save_pretrained(folder)
    if run.head.kind != "none":
        configuration(run, config).architectures = checkpoint.manifest["architectures"]
    config.save_pretrained(folder)
    if run.head.is_in_place:
        return chosen
    try:
        generation = GenerationConfig.from_pretrained(model.path)
    except OSError:
        generation = GenerationConfig.from_model_config(config)
    # A tuned model must stop at the token it was trained to stop at, also where that is not the base model's eos.
    known = generation.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    stops = list(dict.fromkeys([*known, *checkpoint.manifest["stop_ids"]]))
    generation.eos_token_id = stops[0] if len(stops) == 1 else stops
    generation.save_pretrained(folder)
    return chosen


def _write_weights(checkpoint: Checkpoint, values: Values, folder: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import save_file

    from sft_dist.model.engine import stored_numel

    to = getattr(torch, dtype)
    files = _assign_files(stored_numel(checkpoint.folder), to.itemsize)
    names = sorted(set(files.values()))
    pending: dict[str, Any] = {}
    total = 0
    left = {name: list(files.values()).count(name) for name in names}
    for name, value in values():
        pending[name] = value.to(to).contiguous()
        total += pending[name].nbytes
        left[files[name]] -= 1
        if not left[files[name]]:
            save_file(pending, folder / files[name], metadata={"format": "pt"})
            pending = {}
    if len(names) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _assign_files(numel: dict[str, int], item_bytes: int) -> dict[str, str]:
    """Parameter -> file, in order, files of at most 4 GiB."""
    number, filled, numbers = 1, 0, {}
    for name, count in numel.items():
        if filled and filled + count * item_bytes > _FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += count * item_bytes
    if number == 1:
        return dict.fromkeys(numel, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


def _verify(
    run: RunConfig, checkpoint: Checkpoint, values: Values, folder: Path, dtype: str, coefficient: float
) -> float:
    """Load as a user would and compare; returns the largest difference of a probe token's log-prob, or logit."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from sft_dist.model.probe import plain_logits, plain_logprobs

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=run.model.trust_remote_code)
    if tokenizer.get_vocab() != load_tokenizer(run.model).get_vocab():
        raise StorageError("export: the tokenizer does not have the run's vocabulary after loading")
    uses: list[tuple[Any, Any, str]] = [(AutoModelForCausalLM, plain_logprobs, "logprobs")]
    if run.head.is_in_place:
        uses = [(AutoModelForSequenceClassification, plain_logits, "logprobs")]
    if run.head.is_beside:
        uses.append((AutoModelForSequenceClassification, plain_logits, "logits"))
    return max(_verify_as(run, checkpoint, values, folder, dtype, coefficient, *use) for use in uses)


def _verify_as(
    run: RunConfig,
    checkpoint: Checkpoint,
    values: Values,
    folder: Path,
    dtype: str,
    coefficient: float,
    loader: Any,
    plain: Callable[[Any, list[int]], list[float]],
    recorded_as: str,
) -> float:
    """The same with one class of transformers; `recorded_as`: what the probe is to answer, in the manifest."""
    import torch

    from sft_dist.model import zero
    from sft_dist.model.engine import stored_parameters
    from sft_dist.model.probe import ROUNDING

    model, report = loader.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=run.model.trust_remote_code
    )
    loaded = dict(model.named_parameters())
    # Of two heads in one folder each class reads its own.
    unread = {name for name, _ in values() if name not in loaded} if run.head.is_beside else set()
    lost = {name for name in unread if name.startswith(f"{model.base_model_prefix}.")}
    report["unexpected_keys"] = lost | set(report["unexpected_keys"]) - unread
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise StorageError(f"export: transformers reports {kind}: {sorted(map(str, report[kind]))[:5]}")
    for name, value in values():
        if name not in unread and not torch.equal(loaded[name], value.to(loaded[name].dtype)):
            raise StorageError(f"export: {name} does not have the values it was written with after loading")
    head = model.get_output_embeddings() if recorded_as == "logprobs" and not run.head.is_in_place else None
    tied = head is None or head.weight is model.get_input_embeddings().weight
    if model.config.get_text_config().tie_word_embeddings and not tied:
        raise StorageError("export: the output embedding is no longer tied to the input embedding")
    recorded = checkpoint.manifest["probe"]

    def difference() -> float:
        now = [value for ids in recorded["samples"] for value in plain(model, ids)]
        return max(abs(a - b) for a, b in zip(now, recorded[recorded_as], strict=True))

    model.eval().float()
    as_exported = difference()
    trained_in = getattr(torch, checkpoint.manifest["dtype"])
    # The sharded model computed with weights in the precision of training: against those the bound is tight.
    stored = ((name, value) for name, value in stored_parameters(checkpoint.folder) if name not in unread)
    zero.assign(model, ((name, value.to(trained_in)) for name, value in stored))
    as_trained = difference()
    if not as_trained <= ROUNDING[trained_in]:
        raise StorageError(
            f"export: the probe's {'logits' if recorded_as == 'logits' else 'log-probs'} differ from the sharded "
            f"model's by {as_trained:.3g} (allowed {ROUNDING[trained_in]:.3g})"
        )
    if coefficient == 1.0 and getattr(torch, dtype) != trained_in:
        print(
            f"note: rounding from {checkpoint.manifest['dtype']} to {dtype} moves a probe token by up to "
            f"{as_exported:.2g} nats",
            file=sys.stderr,
        )
    return as_trained
