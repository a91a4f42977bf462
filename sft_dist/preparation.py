"""The verb `prepare`, and what train, inspect and score share: data sets with the policies of the run file applied."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from sft_dist.config import RunConfig
from sft_dist.data import formats
from sft_dist.data.manifest import summarise
from sft_dist.data.packing import best_fit_decreasing
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import ALONE, Share, prepare
from sft_dist.data.selection import LeftOut, Policy, Selection
from sft_dist.data.store import REFUSED, PreparedDataset
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, DataError, ExitCode, say

_NAMED = 10
# What tells one start of a job from another, as far as launchers say it.
_STARTS = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")


def run(config: RunConfig, env: Mapping[str, str]) -> ExitCode:
    """Prepare all sources of a run file, together with the other ranks if there are any, and say what is in them."""
    world = find_world(env)
    share = share_of(world, env)
    for name, sources in (("train", config.data.train), ("heldout", config.data.heldout)):
        if sources:
            dataset = prepare(sources, config.model, config.data, share)
            if world.is_main:
                print(f"{name}:", describe(dataset, config), sep="\n")
    if not config.data.train and not config.data.heldout:
        raise ConfigError("data.train and data.heldout are both empty: nothing to prepare")
    return ExitCode.DONE


def share_of(world: World, env: Mapping[str, str]) -> Share:
    """What this rank does of a preparation."""
    start = (world.master_addr, str(world.master_port), *(env.get(name, "") for name in _STARTS))
    return Share(world.rank, world.size, world.local_size, attempt=crc32("|".join(start).encode()))


def policy(config: RunConfig) -> Policy:
    """What the run file says about targets, weights, lengths and duplicates."""
    data, objective = config.data, config.objective
    return Policy(
        max_length=data.max_length,
        train_on=objective.train_on,
        normalise=objective.normalise,
        overflow="truncate_turns" if data.overflow == "truncate_turns" else "drop",
        deduplicate=data.deduplicate,
        source_weights={formats.source_name(source): source.weight for source in data.train},
    )


def repeats(config: RunConfig) -> dict[str, float]:
    """How often an epoch holds the conversations of each source of training data, by name."""
    return {formats.source_name(source): source.repeat for source in config.data.train}


def training_set(config: RunConfig, share: Share = ALONE) -> tuple[Selection, Plan]:
    """The training data and the plan over it. Raises DataError when nothing is left to train on."""
    if not config.data.train:
        raise ConfigError("data.train: required for training, but empty")
    selection = Selection(prepare(config.data.train, config.model, config.data, share), policy(config))
    _refuse_overflow(selection, config)
    repeat_of = repeats(config)
    try:
        plan = Plan(
            selection.lengths,
            selection.num_targets,
            mass=selection.mass,
            repeats=np.array([repeat_of[name] for name in selection.sources], np.float64),
            conversations=selection.indices,
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
    return selection, plan


def heldout_set(config: RunConfig, share: Share = ALONE) -> Selection | None:
    """The held-out data, under the same policies. Raises DataError when nothing of it can be scored."""
    if not config.data.heldout:
        return None
    selection = Selection(prepare(config.data.heldout, config.model, config.data, share), policy(config))
    _refuse_overflow(selection, config)
    if not selection.num_targets.any():
        raise DataError(
            f"data.heldout: no sample has a target token (objective.train_on: {config.objective.train_on}) and fits "
            f"into data.max_length ({config.data.max_length:,})"
        )
    return selection


def describe(dataset: PreparedDataset, config: RunConfig) -> str:
    """Counts, lengths and what is left out, for people."""
    manifest, lengths = dataset.manifest, dataset.lengths
    selection = Selection(dataset, policy(config))
    packs = best_fit_decreasing(selection.lengths, config.data.max_length)
    fill = selection.lengths.sum() / (len(packs) * config.data.max_length) if packs else 0.0
    percentiles = ", ".join(f"p{q} {int(np.percentile(lengths, q)):,}" for q in (50, 90, 99))
    num_targets = int(selection.num_targets.sum())
    lines = [
        f"  folder         {dataset.folder}",
        f"  conversations  {manifest['num_records']:,} read, {manifest['num_rendered']:,} rendered and verified"
        + (f" in {len(dataset):,} samples" if len(dataset) != manifest["num_rendered"] else ""),
        f"  tokens         {int(lengths.sum()):,}, of which {num_targets:,} targets "
        f"({num_targets / lengths.sum():.1%})",
        f"  lengths        {percentiles}, longest {int(lengths.max()):,}",
        f"  packs          {len(packs):,} of {config.data.max_length:,} tokens, fill {fill:.1%}",
    ]
    if manifest["num_split"]:
        lines.append(f"  split          {manifest['num_split']:,} conversations lie in several samples each")
    if manifest["num_duplicates"]:
        what = "left out" if config.data.deduplicate else "kept; data.deduplicate leaves them out"
        lines.append(f"  duplicates     {manifest['num_duplicates']:,} conversations are exact repetitions ({what})")
    lines += _by_source(selection, repeats(config))
    if manifest["num_refused"]:
        reasons = summarise(Counter(manifest["num_refused"]))
        lines.append(f"  refused        {reasons} (listed in {dataset.folder / REFUSED})")
        lines += [f"    {item['where']}: {item['detail']}" for item in _refused(dataset)[:_NAMED]]
    if selection.left_out:
        lines.append(f"  left out       {_summary(selection.left_out)} (overflow: {config.data.overflow})")
        lines += [f"    {_line(dataset, item)}" for item in selection.left_out[:_NAMED]]
    return "\n".join(lines)


def say_overlap(train: Selection, heldout: Selection) -> None:
    """Say how many held-out conversations are trained on too: their NLL says nothing about unseen ones."""
    trained, held_out = (set(s.dataset.column("digest")[s.samples].tolist()) for s in (train, heldout))
    if shared := len(trained & held_out):
        say(f"warning: {shared:,} of {len(held_out):,} held-out conversations are in the training data as well")


def write_left_out(selections: Mapping[str, Selection], path: Path) -> None:
    """Everything that takes no part, one JSON line each with the reason."""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        for name, selection in selections.items():
            for item in _refused(selection.dataset):
                file.write(json.dumps({"set": name} | item, ensure_ascii=False) + "\n")
            for left in selection.left_out:
                sample = selection.dataset[left.sample]
                entry: dict[str, Any] = {
                    "set": name,
                    "id": sample.conversation_id,
                    "source": sample.source,
                    "reason": left.reason,
                    "num_tokens": left.num_tokens,
                    "num_targets": left.num_targets,
                    "detail": f"{len(sample.ids):,} tokens, data.max_length is {selection.policy.max_length:,}",
                }
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def say_left_out(selections: Mapping[str, Selection], config: RunConfig) -> None:
    for name, selection in selections.items():
        refused = Counter(selection.dataset.manifest["num_refused"])
        parts = [summarise(refused)] if refused else []
        parts += [_summary(selection.left_out)] if selection.left_out else []
        if parts:
            total = selection.dataset.manifest["num_records"]
            say(
                f"{name}: of {total:,} conversations are left out: {', '.join(parts)} "
                f"(listed in {Path(config.run_dir) / 'left_out.jsonl'})"
            )


def _by_source(selection: Selection, repeat_of: Mapping[str, float]) -> list[str]:
    names = sorted(set(selection.sources))
    if len(names) < 2:
        return []
    mass = selection.mass * [repeat_of.get(name, 1.0) for name in selection.sources]
    lines = []
    for name in names:
        mine = selection.sources == name
        tokens, targets = int(selection.lengths[mine].sum()), int(selection.num_targets[mine].sum())
        share = mass[mine].sum() / max(mass.sum(), 1e-300)
        lines.append(
            f"  source         {name}: {tokens:,} tokens, {targets:,} targets, {share:.1%} of an epoch's weight"
        )
    return lines


def _summary(left_out: Sequence[LeftOut]) -> str:
    """`3 too long (9,120 tokens, 512 targets), 1 duplicate (…)`"""
    parts = []
    for reason, count in Counter(item.reason for item in left_out).most_common():
        mine = [item for item in left_out if item.reason == reason]
        tokens, targets = sum(item.num_tokens for item in mine), sum(item.num_targets for item in mine)
        parts.append(f"{count:,} {reason} ({tokens:,} tokens, {targets:,} targets)")
    return ", ".join(parts)


def _line(dataset: PreparedDataset, item: LeftOut) -> str:
    sample = dataset[item.sample]
    return f"{sample.conversation_id}: {item.reason}: {item.num_tokens:,} of {len(sample.ids):,} tokens"


def _refuse_overflow(selection: Selection, config: RunConfig) -> None:
    long = [item for item in selection.left_out if item.reason == "too long"]
    if long and config.data.overflow == "error":
        named = "\n".join(f"  {_line(selection.dataset, item)}" for item in long[:_NAMED])
        raise DataError(
            f"{len(long):,} conversation(s) are longer than data.max_length ({config.data.max_length:,}):\n{named}\n"
            "  raise data.max_length, or set data.overflow: drop to leave them out, counted and listed, or "
            "truncate_turns to keep the turns that fit"
        )


def _refused(dataset: PreparedDataset) -> list[dict[str, str]]:
    with open(dataset.folder / REFUSED, encoding="utf-8") as file:
        return [json.loads(line) for line in file]
