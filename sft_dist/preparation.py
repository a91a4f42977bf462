"""The verb `prepare`, and what train, inspect and score share: data sets with the policies of the run file applied."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sft_dist.config import RunConfig
from sft_dist.data.packing import best_fit_decreasing
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import prepare, summarise
from sft_dist.data.store import REFUSED, PreparedDataset
from sft_dist.errors import ConfigError, DataError, ExitCode, say

_NAMED = 10


def run(config: RunConfig) -> ExitCode:
    """Prepare all sources of a run file and say what is in them."""
    for name, sources in (("train", config.data.train), ("heldout", config.data.heldout)):
        if sources:
            dataset = prepare(sources, config.model, config.data)
            print(f"{name}:", describe(dataset, config), sep="\n")
    if not config.data.train and not config.data.heldout:
        raise ConfigError("data.train and data.heldout are both empty: nothing to prepare")
    return ExitCode.DONE


def training_set(config: RunConfig) -> tuple[PreparedDataset, Plan]:
    """The prepared training data and the plan over it. Raises DataError when nothing is left to train on."""
    if not config.data.train:
        raise ConfigError("data.train: required for training, but empty")
    dataset = prepare(config.data.train, config.model, config.data)
    _apply_overflow(dataset, config)
    try:
        plan = Plan(
            dataset.lengths,
            dataset.num_targets(config.objective.train_on),
            max_length=config.data.max_length,
            global_packs=config.batch.global_packs,
            seed=config.seed,
            epochs=config.schedule.epochs,
            max_steps=config.schedule.max_steps,
        )
    except ValueError as error:
        raise DataError(
            f"data.train: nothing is left to train on: {error} data.max_length ({config.data.max_length:,})"
        ) from None
    return dataset, plan


def heldout_set(config: RunConfig) -> PreparedDataset | None:
    """The prepared held-out data, under the same policies. Raises DataError when none of it fits."""
    if not config.data.heldout:
        return None
    dataset = prepare(config.data.heldout, config.model, config.data)
    _apply_overflow(dataset, config)
    if len(too_long(dataset, config.data.max_length)) == len(dataset):
        raise DataError(f"data.heldout: no sample fits into data.max_length ({config.data.max_length:,})")
    return dataset


def too_long(dataset: PreparedDataset, max_length: int) -> list[int]:
    """Numbers of the samples that do not fit into a pack."""
    return [int(number) for number in (dataset.lengths > max_length).nonzero()[0]]


def describe(dataset: PreparedDataset, config: RunConfig) -> str:
    """Counts, lengths and what is left out, for people."""
    manifest, lengths = dataset.manifest, dataset.lengths
    num_targets = dataset.num_targets(config.objective.train_on)
    fitting = lengths[lengths <= config.data.max_length]
    packs = best_fit_decreasing(fitting, config.data.max_length)
    fill = fitting.sum() / (len(packs) * config.data.max_length) if packs else 0.0
    percentiles = ", ".join(f"p{q} {int(np.percentile(lengths, q)):,}" for q in (50, 90, 99))
    lines = [
        f"  folder         {dataset.folder}",
        f"  conversations  {manifest['num_records']:,} read, {manifest['num_samples']:,} rendered and verified",
        f"  tokens         {int(lengths.sum()):,}, of which {int(num_targets.sum()):,} targets "
        f"({num_targets.sum() / lengths.sum():.1%})",
        f"  lengths        {percentiles}, longest {int(lengths.max()):,}",
        f"  packs          {len(packs):,} of {config.data.max_length:,} tokens, fill {fill:.1%}",
    ]
    if manifest["num_refused"]:
        reasons = summarise(Counter(manifest["num_refused"]))
        lines.append(f"  refused        {reasons} (listed in {dataset.folder / REFUSED})")
        lines += [f"    {item['where']}: {item['detail']}" for item in _refused(dataset)[:_NAMED]]
    long = too_long(dataset, config.data.max_length)
    if long:
        lines.append(f"  too long       {len(long):,} for data.max_length, overflow: {config.data.overflow}")
        lines += [f"    {dataset[number].conversation_id}: {lengths[number]:,} tokens" for number in long[:_NAMED]]
    return "\n".join(lines)


def write_left_out(datasets: Mapping[str, PreparedDataset], config: RunConfig, path: Path) -> None:
    """Every conversation that takes no part, one JSON line each with the reason."""
    with open(path, "w", encoding="utf-8") as file:
        for name, dataset in datasets.items():
            for item in _refused(dataset):
                file.write(json.dumps({"set": name} | item, ensure_ascii=False) + "\n")
            for number in too_long(dataset, config.data.max_length):
                sample = dataset[number]
                detail = f"{len(sample.ids):,} tokens, data.max_length is {config.data.max_length:,}"
                entry = {"set": name, "id": sample.conversation_id, "reason": "too long", "detail": detail}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def say_left_out(datasets: Mapping[str, PreparedDataset], config: RunConfig) -> None:
    for name, dataset in datasets.items():
        reasons = Counter(dataset.manifest["num_refused"])
        if number := len(too_long(dataset, config.data.max_length)):
            reasons["too long"] = number
        if reasons:
            total = dataset.manifest["num_records"]
            say(
                f"{name}: left out {sum(reasons.values()):,} of {total:,} conversations: {summarise(reasons)} "
                f"(listed in {Path(config.run_dir) / 'left_out.jsonl'})"
            )


def _apply_overflow(dataset: PreparedDataset, config: RunConfig) -> None:
    long = too_long(dataset, config.data.max_length)
    if long and config.data.overflow == "error":
        first: Sequence[str] = [f"  {dataset[n].conversation_id}: {dataset.lengths[n]:,} tokens" for n in long[:_NAMED]]
        raise DataError(
            f"{len(long):,} conversation(s) are longer than data.max_length ({config.data.max_length:,}):\n"
            + "\n".join(first)
            + "\n  raise data.max_length, or set data.overflow: drop to leave them out, counted and listed"
        )


def _refused(dataset: PreparedDataset) -> list[dict[str, str]]:
    with open(dataset.folder / REFUSED, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
