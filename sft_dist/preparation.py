"""The verb `prepare`, and what train, inspect and score share: data sets with the policies of the run file applied."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, TextIO
from zlib import crc32

import numpy as np

from sft_dist.config import ModelConfig, RecordFormat, RunConfig, SourceConfig
from sft_dist.data import formats, labels
from sft_dist.data.cost import BY_TOKENS, CostModel, cost_of_model
from sft_dist.data.labels import LabelSet
from sft_dist.data.manifest import summarise
from sft_dist.data.plan import Plan
from sft_dist.data.prepare import ALONE, Share, prepare
from sft_dist.data.selection import Float64, LeftOut, LeftOutTable, Policy, Selection
from sft_dist.data.store import REFUSED, PreparedDataset
from sft_dist.distributed.world import World, find_world
from sft_dist.errors import ConfigError, DataError, ExitCode, StorageError, say

_NAMED = 10
# What tells one start of a job from another, as far as launchers say it.
_STARTS = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")


def run(config: RunConfig, env: Mapping[str, str]) -> ExitCode:
    """Prepare all sources of a run file, together with the other ranks if there are any, and say what is in them.

    Raises DataError, as training would, where nothing is left of them or something is longer than it may be.
    """
    world = find_world(env)
    share = share_of(world, env)
    config = with_labels(config, share)
    _check_uniform(config)
    for name, sources, policy_of, check in (
        ("train", config.data.train, policy, _check_trainable),
        ("heldout", config.data.heldout, policy, _check_scorable),
        ("retention", config.data.retention, _retention_policy, _check_retained),
    ):
        if sources:
            selection = Selection(prepare(sources, config.model, config.data, share), policy_of(config, sources))
            if world.is_main:
                print(f"{name}:", describe(selection, config), sep="\n", flush=True)
            check(selection, config)
    if not (config.data.train or config.data.heldout or config.data.retention):
        raise ConfigError("data.train, data.heldout and data.retention are all empty: nothing to prepare")
    return ExitCode.DONE


def share_of(world: World, env: Mapping[str, str]) -> Share:
    """What this rank does of a preparation."""
    start = (world.master_addr, str(world.master_port), *(env.get(name, "") for name in _STARTS))
    return Share(world.rank, world.size, world.local_size, attempt=crc32("|".join(start).encode()))


def policy(config: RunConfig, sources: Sequence[SourceConfig]) -> Policy:
    """What the run file says about targets, weights, repeats, lengths and duplicates of these sources."""
    data, objective = config.data, config.objective
    return Policy(
        max_length=data.max_length,
        train_on=objective.train_on,
        normalise=objective.normalise,
        overflow="truncate_turns" if data.overflow == "truncate_turns" else "drop",
        deduplicate=data.deduplicate,
        source_weights={formats.source_name(source): source.weight for source in sources},
        repeats={formats.source_name(source): source.repeat for source in sources},
        labels=label_set(config),
        is_beside=config.head.is_beside,
    )


def with_labels(config: RunConfig, share: Share = ALONE) -> RunConfig:
    """A run file with a head, with its sources as labelled records, and head.labels as the training data have them.

    Any other run file as it is. Raises DataError where the training data hold no label of head.kind.
    """
    kind = config.head.kind
    if kind == "none":
        return config
    named: RecordFormat = "labelled_chat" if config.head.is_beside else "labelled"
    data = config.data.model_copy(
        update={"train": _labelled(config.data.train, named), "heldout": _labelled(config.data.heldout, named)}
    )
    config = config.model_copy(update={"data": data})
    if config.head.labels or not data.train:
        return config
    dataset = prepare(data.train, config.model, data, share)
    distinct, codes = dataset.texts("label")
    names = labels.find_names(kind, (), distinct, np.bincount(codes, minlength=len(distinct)).tolist())
    if len(names) < (2 if kind == "single_label" else 1):
        shown = ", ".join(distinct[:_NAMED])
        raise DataError(
            f"data.train: labels for {len(names)} output(s) of a head of kind {kind} were found (such as "
            f"{shown}); mend `label`, or choose another head.kind"
        )
    return config.model_copy(update={"head": config.head.model_copy(update={"labels": names})})


def _labelled(sources: Sequence[SourceConfig], named: RecordFormat) -> tuple[SourceConfig, ...]:
    return tuple(
        source.model_copy(update={"format": named}) if source.format == "auto" else source for source in sources
    )


def label_set(config: RunConfig) -> LabelSet | None:
    """What the head of a run file, with its labels, reads in records; None without a head."""
    return None if config.head.kind == "none" else LabelSet(config.head.kind, config.head.labels)


def training_set(config: RunConfig, share: Share = ALONE) -> tuple[Selection, Plan]:
    """The training data and the plan over it. Raises DataError when nothing is left to train on."""
    if not config.data.train:
        raise ConfigError("data.train: required for training, but empty")
    sources = config.data.train
    selection = Selection(prepare(sources, config.model, config.data, share), policy(config, sources))
    _refuse_overflow(selection, config)
    _check_labels(selection, config, "data.train", sources)
    _say_missing_labels(selection, config, is_main=share.rank == 0)
    if config.head.is_beside:
        _say_who_trains_what(selection, is_main=share.rank == 0)
    cost = training_cost(config, is_main=share.rank == 0)
    if config.head.is_in_place:
        cost = replace(cost, head_per_target=0.0)  # a few outputs, not the vocabulary
    try:
        plan = _plan(selection, config, config.schedule.epochs, cost)
    except ValueError as error:
        raise _nothing_left(selection, config, str(error)) from None
    return selection, plan


def _check_trainable(selection: Selection, config: RunConfig) -> None:
    """Raise the DataError that a plan over this would end in."""
    _refuse_overflow(selection, config)
    if not len(selection):
        raise _nothing_left(selection, config, "no sample has a target token and fits")


def _nothing_left(selection: Selection, config: RunConfig, why: str) -> DataError:
    return DataError(
        f"data.train: nothing is left to train on: {why} data.max_length ({config.data.max_length:,})"
        + (f"; left out are {_summary(selection.left_out)}" if len(selection.left_out) else "")
    )


def heldout_set(config: RunConfig, share: Share = ALONE) -> Selection | None:
    """The held-out data, under the same policies. Raises DataError when nothing of it can be scored."""
    if not config.data.heldout:
        return None
    _check_uniform(config)
    sources = config.data.heldout
    selection = Selection(prepare(sources, config.model, config.data, share), policy(config, sources))
    _check_labels(selection, config, "data.heldout", sources)
    _check_scorable(selection, config)
    return selection


def _check_labels(selection: Selection, config: RunConfig, name: str, sources: Sequence[SourceConfig]) -> None:
    """Raise DataError for labels that the head has no number for, as for bad records in general."""
    if selection.labels is None:
        return
    faulty = np.flatnonzero(selection.labels.is_faulty)
    num = int(selection.labels.is_there.sum())
    if not len(faulty) or (config.data.on_bad_record == "refuse" and len(faulty) <= config.data.max_refused * num):
        return
    reasons = Counter(selection.labels.fault(int(sample)).reason for sample in faulty)
    indices = selection.dataset.column("index")
    places = formats.places(sources, {int(indices[sample]) for sample in faulty[:_NAMED]})
    named = "\n".join(
        f"  {places.get(int(indices[sample])) or selection.dataset[int(sample)].conversation_id}: "
        f"{selection.labels.fault(int(sample))}"
        for sample in faulty[:_NAMED]
    )
    more = f"\n  and {len(faulty) - _NAMED:,} more" if len(faulty) > _NAMED else ""
    raise DataError(
        f"{name}: {len(faulty):,} of {num:,} labels cannot be used: {summarise(reasons)}\n{named}{more}\n"
        "  mend them, or set data.on_bad_record: refuse (and data.max_refused) to leave such records out, counted and "
        "listed"
    )


def _say_missing_labels(selection: Selection, config: RunConfig, *, is_main: bool) -> None:
    """Say which outputs of a classifier no training record has: nothing can be learned of them."""
    if selection.labels is None or config.head.kind == "regression" or not is_main:
        return
    targets = selection.label_targets  # [m, width]
    if config.head.kind == "single_label":
        counts = np.bincount(targets[:, 0].astype(np.int64), minlength=len(config.head.labels))
    else:
        counts = targets.sum(0)
    if missing := [name for name, count in zip(config.head.labels, counts, strict=True) if not count]:
        named = ", ".join(missing[:_NAMED]) + (" ..." if len(missing) > _NAMED else "")
        say(f"warning: {len(missing):,} of {len(counts):,} labels have no training example: {named}")


def _say_who_trains_what(selection: Selection, *, is_main: bool) -> None:
    """How many conversations have labels, answers or both. Raises DataError where none has a label."""
    has_label = selection.label_mass > 0
    if not has_label.any():
        raise DataError(
            "data.train: no conversation that takes part has a `label` (head.language_model_weight); give them labels, "
            "or take the section head out"
        )
    answered, labelled = (set(selection.indices[chosen].tolist()) for chosen in (selection.num_targets > 0, has_label))
    if is_main:
        say(
            f"data.train: {len(answered & labelled):,} conversations train the language model and the head; "
            f"{len(answered - labelled):,} without a label train the language model alone, "
            f"{len(labelled - answered):,} without a target token the head alone"
        )


def _check_scorable(selection: Selection, config: RunConfig) -> None:
    _refuse_overflow(selection, config)
    if not len(selection):
        raise DataError(
            f"data.heldout: no sample has a target token (objective.train_on: {config.objective.train_on}) and fits "
            f"into data.max_length ({config.data.max_length:,})"
        )


def retention_set(config: RunConfig, share: Share = ALONE) -> Selection | None:
    """The data that tell what is forgotten: all answers and every token of plain texts, whatever is trained.

    Texts longer than data.max_length become windows, longer conversations end after the last answer that fits. Raises
    DataError for a source of which nothing can be scored.
    """
    if not config.data.retention:
        return None
    _check_uniform(config)
    sources = config.data.retention
    selection = Selection(prepare(sources, config.model, config.data, share), _retention_policy(config, sources))
    _check_retained(selection, config)
    return selection


def _retention_policy(config: RunConfig, sources: Sequence[SourceConfig]) -> Policy:
    """The run's own choice of targets would measure another thing in every run, and leave out what does not fit it."""
    return Policy(config.data.max_length, overflow="truncate_turns")


def _check_retained(selection: Selection, config: RunConfig) -> None:
    scored = {selection.source_names[code] for code in np.unique(selection.source_codes)}
    for source in config.data.retention:
        name = formats.source_name(source)
        if name not in scored:
            raise DataError(
                f"data.retention: {name} ({source.path}): holds no answer and no text that can be scored within "
                f"data.max_length ({config.data.max_length:,}); take it out, or name another file"
            )


def training_cost(config: RunConfig, *, is_main: bool) -> CostModel:
    """As `cost_model`, of what this run trains."""
    cost = cost_model(config.model, is_main=is_main)
    return cost if config.adapter.kind == "none" or cost == BY_TOKENS else cost.frozen()


def cost_model(model: ModelConfig, *, is_main: bool) -> CostModel:
    """What packs of this model cost, by its config.json; by their tokens where that does not tell, which is said.

    Raises ConfigError for a file that cannot be read.
    """
    try:
        return cost_of_model(_model_config(model.path))
    except FileNotFoundError:
        reason = "there is none"
    except ValueError as error:
        reason = str(error)
    if is_main:
        say(f"{model.path}: config.json: {reason}; costs of packs are taken to be their tokens")
    return BY_TOKENS


def _model_config(path: str) -> dict[str, Any]:
    """config.json of a model folder or Hub id. Raises FileNotFoundError where there is none."""
    if Path(path).is_dir():
        file = Path(path) / "config.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            file = Path(hf_hub_download(path, "config.json"))
        except Exception as error:
            if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
                raise FileNotFoundError from None
            # Going on by tokens on a rank that cannot reach the Hub just now would give ranks different plans.
            raise ConfigError(f"model.path: {path}: config.json cannot be had from the Hub: {error}") from error
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {file} cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"model.path: {file} is no JSON object")
    return tree


def _plan(selection: Selection, config: RunConfig, epochs: int, cost: CostModel) -> Plan:
    """Raises ValueError when nothing is left."""
    return Plan(
        selection.lengths,
        selection.num_targets,
        mass=selection.mass,
        label_mass=selection.label_mass,
        repeats=_repeats(selection)[selection.source_codes],
        conversations=selection.indices,
        cost_model=cost,
        max_length=config.data.max_length,
        global_packs=config.batch.global_packs,
        balance_steps=config.batch.balance_steps,
        seed=config.seed,
        epochs=epochs,
        max_steps=config.schedule.max_steps,
    )


def _repeats(selection: Selection) -> Float64:
    """[num_sources]"""
    return np.array([selection.policy.repeats.get(name, 1.0) for name in selection.source_names], np.float64)


def _check_uniform(config: RunConfig) -> None:
    for key, sources in (("data.heldout", config.data.heldout), ("data.retention", config.data.retention)):
        for source in sources:
            if source.repeat != 1 or source.weight != 1:
                raise ConfigError(
                    f"{key}: {formats.source_name(source)}: repeat {source.repeat:g}, weight {source.weight:g}: every "
                    f"{'held-out' if key == 'data.heldout' else 'retention'} conversation counts once; leave both out"
                )


def describe(selection: Selection, config: RunConfig) -> str:
    """Counts, lengths, the first epoch and what is left out, for people."""
    dataset = selection.dataset
    manifest, lengths = dataset.manifest, dataset.lengths
    packs = "none"
    if len(selection):
        plan = _plan(selection, config, epochs=1, cost=BY_TOKENS)
        packs = (
            f"{plan.num_packs:,} of {config.data.max_length:,} tokens, fill {plan.fill:.1%}: an epoch of "
            f"{plan.num_samples:,} samples, {plan.num_tokens:,} tokens"
        )
    percentiles = ", ".join(f"p{q} {int(np.percentile(lengths, q)):,}" for q in (50, 90, 99))
    num_tokens, num_targets, num_read = (
        int(counts.sum()) for counts in (selection.lengths, selection.num_targets, lengths)
    )
    lines = [
        f"  folder         {dataset.folder}",
        f"  conversations  {manifest['num_records']:,} read, {manifest['num_rendered']:,} rendered and verified"
        + (f" in {len(dataset):,} samples" if len(dataset) != manifest["num_rendered"] else ""),
        f"  tokens         {num_tokens:,}, of which {num_targets:,} targets ({num_targets / max(num_tokens, 1):.1%})"
        + (f"; {num_read:,} are prepared, with those left out" if len(selection.left_out) else ""),
        f"  lengths        {percentiles}, longest {int(lengths.max()):,}",
        f"  packs          {packs}",
    ]
    if manifest["num_split"]:
        lines.append(f"  split          {manifest['num_split']:,} conversations lie in several samples each")
    if manifest["num_duplicates"]:
        what = "left out" if config.data.deduplicate else "kept; data.deduplicate leaves them out"
        lines.append(f"  duplicates     {manifest['num_duplicates']:,} conversations are exact repetitions ({what})")
    lines += _by_source(selection)
    if manifest["num_refused"]:
        reasons = summarise(Counter(manifest["num_refused"]))
        lines.append(f"  refused        {reasons} (listed in {dataset.folder / REFUSED})")
        lines += [f"    {item['where']}: {item['detail']}" for item in islice(_refused(dataset), _NAMED)]
    if len(selection.left_out):
        lines.append(f"  left out       {_summary(selection.left_out)} (overflow: {config.data.overflow})")
        lines += [f"    {_line(dataset, item)}" for item in islice(selection.left_out.listed(), _NAMED)]
    return "\n".join(lines)


def say_overlap(train: Selection, heldout: Selection) -> None:
    """Say how many held-out conversations are trained on too: their NLL says nothing about unseen ones."""
    held_out = _contents(heldout)
    if shared := len(np.intersect1d(_contents(train), held_out, assume_unique=True)):
        say(f"warning: {shared:,} of {len(held_out):,} held-out conversations are in the training data as well")


def say_retention_overlap(train: Selection, retention: Selection) -> None:
    """Say of every retention source how much is trained on too: what is rehearsed tells not what is forgotten."""
    trained = _contents(train)
    for code, name in enumerate(retention.source_names):
        own = _contents(retention, retention.source_codes == code)
        if shared := len(np.intersect1d(trained, own, assume_unique=True)):
            say(
                f"warning: {shared:,} of {len(own):,} records of retention source {name} are in the training data as "
                "well: keep apart what is trained on to be kept and what tells whether it was"
            )


def _contents(selection: Selection, chosen: Any = slice(None)) -> Any:
    """The digests of the conversations that take part, each once, ascending."""
    return np.unique(selection.dataset.column("digest").view("S16")[selection.samples[chosen]])


@contextmanager
def _written(path: Path) -> Iterator[TextIO]:
    try:
        with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def write_left_out(selections: Mapping[str, Selection], path: Path) -> None:
    """Everything that takes no part though its source does, one JSON line each with the reason."""
    with _written(path) as file:
        for name, selection in selections.items():
            for item in _refused(selection.dataset):
                file.write(json.dumps({"set": name} | item, ensure_ascii=False) + "\n")
            for left in selection.left_out.listed():
                sample = selection.dataset[left.sample]
                entry: dict[str, Any] = {
                    "set": name,
                    "id": sample.conversation_id,
                    "source": sample.source,
                    "reason": left.reason,
                    "num_tokens": left.num_tokens,
                    "num_targets": left.num_targets,
                    "detail": _detail(left, len(sample.ids), selection),
                }
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def say_left_out(selections: Mapping[str, Selection], config: RunConfig) -> None:
    for name, selection in selections.items():
        refused = Counter(selection.dataset.manifest["num_refused"])
        parts = [summarise(refused)] if refused else []
        parts += [_summary(selection.left_out)] if len(selection.left_out) else []
        if parts:
            total = selection.dataset.manifest["num_records"]
            say(
                f"{name}: of {total:,} conversations are left out: {', '.join(parts)} "
                f"(listed in {Path(config.run_dir) / 'left_out.jsonl'})"
            )


def _by_source(selection: Selection) -> list[str]:
    if len(selection.source_names) < 2:
        return []
    mass = selection.mass * _repeats(selection)[selection.source_codes]
    lines = []
    for code, name in sorted(enumerate(selection.source_names), key=lambda item: item[1]):
        mine = selection.source_codes == code
        tokens, targets = int(selection.lengths[mine].sum()), int(selection.num_targets[mine].sum())
        share = mass[mine].sum() / max(mass.sum(), 1e-300)
        lines.append(
            f"  source         {name}: {tokens:,} tokens, {targets:,} targets, {share:.1%} of an epoch's weight"
        )
    return lines


def _summary(left_out: LeftOutTable) -> str:
    """`3 too long (9,120 tokens, 512 targets), 1 duplicate (…)`"""
    return ", ".join(
        f"{count:,} {reason} ({tokens:,} tokens, {targets:,} targets)"
        for reason, (count, tokens, targets) in left_out.summary().items()
    )


def _detail(left: LeftOut, length: int, selection: Selection) -> str:
    policy = selection.policy
    limit = f"data.max_length is {policy.max_length:,}"
    match left.reason:
        case "too long":
            return f"{length:,} tokens, {limit}"
        case "end cut off":
            return (
                f"ends after {length - left.num_tokens:,} of {length:,} tokens, with its last answer that fits: {limit}"
            )
        case "duplicate":
            return "another conversation of exactly this content takes part (data.deduplicate)"
        case "bad label" if selection.labels is not None:
            return str(selection.labels.fault(left.sample))
        case "no target":
            and_label = ", and it has no label" if policy.is_beside else ""
            return f"objective.train_on is {policy.train_on}; its marks and weights leave no token to train{and_label}"
    raise AssertionError(left.reason)


def _line(dataset: PreparedDataset, item: LeftOut) -> str:
    sample = dataset[item.sample]
    return f"{sample.conversation_id}: {item.reason}: {item.num_tokens:,} of {len(sample.ids):,} tokens"


def _refuse_overflow(selection: Selection, config: RunConfig) -> None:
    num_long = selection.left_out.summary().get("too long", (0,))[0]
    if num_long and config.data.overflow == "error":
        long = (item for item in selection.left_out.listed() if item.reason == "too long")
        named = "\n".join(f"  {_line(selection.dataset, item)}" for item in islice(long, _NAMED))
        raise DataError(
            f"{num_long:,} conversation(s) are longer than data.max_length ({config.data.max_length:,}):\n{named}\n"
            "  raise data.max_length, or set data.overflow: drop to leave them out, counted and listed, or "
            "truncate_turns to keep the turns that fit"
        )


def _refused(dataset: PreparedDataset) -> Iterator[dict[str, str]]:
    """Read as far as they are asked for: there may be millions."""
    with open(dataset.folder / REFUSED, encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
