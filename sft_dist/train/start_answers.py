"""What θ̂ says at the targets of the training data, computed once by all ranks and kept beside the prepared data.

    DATA.CACHE_DIR/top-KEY/                KEY follows from θ̂, the data with their targets, and k: runs share it
    DATA.CACHE_DIR/.top-KEY-RUN.tmp/       in the making, of one run; its next start begins anew with an empty one

The engine holds θ̂ at every start, also of a resumed run before it takes its checkpoint's weights.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sft_dist import faults
from sft_dist.config import RunConfig
from sft_dist.data.packing import Pack, best_fit_decreasing
from sft_dist.data.plan import Plan, distribute
from sft_dist.data.progress import duration
from sft_dist.data.selection import Int64, Selection
from sft_dist.data.top_logprobs import MANIFEST, PartWriter, TopTable, bytes_per_target, seal
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import ConfigError, StorageError, TrainingError, UserError
from sft_dist.model.batch import collate
from sft_dist.model.engine import Engine
from sft_dist.model.fused_head import TopReference
from sft_dist.paths import sync
from sft_dist.train import out_of_memory

_GIB = 2**30
_SAY_EVERY_S = 10.0
# Keys of the run file that decide what the weights at step 0 are, beside the files they come from.
_OF_START = ("model.control_tokens", "model.allow_new_parameters", "adapter.quantise")

T = TypeVar("T")
SayOnce = Callable[[str], None]


def kept(
    selection: Selection,
    plan: Plan,
    engine: Engine,
    config: RunConfig,
    facts: Mapping[str, Any],
    world: World,
    say_once: SayOnce,
) -> Selection:
    """The selection with the anchor.kl_top_k likeliest tokens of `engine`, which holds θ̂. A collective.

    `facts` of the run as its checkpoints' manifests have them. Raises ConfigError for more tokens than there are,
    StorageError, on every rank, where files cannot be written or are not what they should be.
    """
    k = config.anchor.kl_top_k
    assert k is not None
    if k > engine.vocab_size:
        raise ConfigError(f"anchor.kl_top_k: {k:,} of {engine.vocab_size:,} tokens that the model's head knows")
    wanted = _drawn(selection, plan)
    identity = _identity(selection, wanted, facts, k)
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.data.cache_dir) / f"top-{key}"
    num_targets = int(selection.num_targets[wanted].sum())
    size = (
        f"{num_targets:,} targets x {bytes_per_target(k):,} bytes, {num_targets * bytes_per_target(k) / _GIB:,.2f} GiB"
    )
    if not collectives.on_main(lambda: os.path.exists(folder)):  # False where it cannot be told: making it tells why
        say_once(
            f"anchor.kl_top_k: computing the {k:,} likeliest tokens of the model at its start ({size}) in {folder}"
        )
        _make(folder, selection, wanted, engine, config, identity, k, world, say_once)
    table = _together(lambda: TopTable(folder, identity))
    say_once(
        f"anchor.kl_top_k: outside its {k:,} likeliest tokens the model at its start has {table.mean_tail_mass:.3g} of "
        f"the mass, in the mean over targets ({size}; {folder})"
    )
    return selection.with_top(table)


def _drawn(selection: Selection, plan: Plan) -> Int64:
    """Numbers of the examples with targets that any step trains on, ascending; looked for until all are known."""
    is_drawn = np.zeros(len(selection), np.bool_)
    for step in range(plan.num_steps):
        is_drawn[[index for pack in plan.packs(step) for index in pack]] = True
        if step >= plan.steps_per_epoch - 1 and is_drawn[selection.mass > 0].all():
            break
    return np.flatnonzero(is_drawn & (selection.num_targets > 0))


def _identity(selection: Selection, wanted: Int64, facts: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Everything that the files follow from, but for rounding."""
    start = {name: facts[name] for name in ("weights", "initial", "dtype")}
    config = {key: facts["config"][key] for key in _OF_START}
    if config["model.allow_new_parameters"]:
        config["seed"] = facts["config"]["seed"]
    return {
        "k": k,
        **start,
        "start": config,
        "model": _digest(json.dumps(facts["model"], sort_keys=True).encode()),
        "data": selection.dataset.folder.name,  # follows from contents, tokenizer and template
        "targets": selection.digest(),
        "examples": _digest(wanted.tobytes()),
    }


def _make(
    folder: Path,
    selection: Selection,
    wanted: Int64,
    engine: Engine,
    config: RunConfig,
    identity: Mapping[str, Any],
    k: int,
    world: World,
    say_once: SayOnce,
) -> None:
    """Every rank writes the rows of its share of the packs, which are the same for any number of ranks."""
    run = _digest(str(Path(config.run_dir).resolve()).encode())  # the run's lock keeps others out of it
    temporary = folder.with_name(f".{folder.name}-{run}.tmp")
    num_bytes = int(selection.num_targets[wanted].sum()) * bytes_per_target(k)
    collectives.on_main(lambda: _begin(temporary, num_bytes))
    packs = _packs(selection, wanted, config.data.max_length)
    per_forward = config.batch.packs_per_micro_batch
    dealt = [distribute(packs, rank, world.size, per_forward) for rank in range(world.size)]
    engine.train(False)
    started = said = time.monotonic()
    with _together(lambda: PartWriter(temporary, world.rank)) as writer:
        for number, pack in enumerate(dealt[world.rank]):
            with out_of_memory.explained("computing what θ̂ says", rank=world.rank, config=config):
                found = engine.top_logprobs(collate([selection[index] for index in pack]), k)
            _together(partial(_write, writer, found, world.rank, number + 1))
            if time.monotonic() - said > _SAY_EVERY_S:
                said, share = time.monotonic(), (number + 1) / len(dealt[world.rank])
                left = duration((said - started) * (1 - share) / share)
                say_once(f"anchor.kl_top_k: {share:.0%} of {len(packs):,} packs  eta {left}")
        parts = collectives.gather(_together(writer.finish))
    faults.reach("start_answers.before_publish", rank=world.rank)
    first = _first_rows(selection, dealt)
    collectives.on_main(lambda: _publish(temporary, folder, lambda: seal(temporary, identity, k, parts, first)))


def _packs(selection: Selection, wanted: Int64, max_length: int) -> list[Pack]:
    """These examples, packed once, largest pack first."""
    lengths = selection.lengths
    packs = [tuple(wanted[list(pack)].tolist()) for pack in best_fit_decreasing(lengths[wanted], max_length)]
    return sorted(packs, key=lambda pack: (-int(lengths[list(pack)].sum()), pack))


def _begin(temporary: Path, num_bytes: int) -> None:
    """Rank 0: an empty folder, on a disk with room. Raises StorageError."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
    except OSError as error:
        raise StorageError(f"data.cache_dir: {temporary} cannot be written: {error.strerror or error}") from error
    if num_bytes > free:
        raise StorageError(
            f"data.cache_dir: {temporary.parent}: anchor.kl_top_k needs {num_bytes / _GIB:,.2f} GiB, "
            f"{free / _GIB:,.2f} GiB are free; make room, or keep fewer tokens"
        )


def _write(writer: PartWriter, found: TopReference, rank: int, number: int) -> None:
    faults.reach("start_answers.before_write", rank=rank, step=number)
    if bool(found.logprobs.isnan().any()):
        raise TrainingError("the model that training starts from gives log-probabilities that are no numbers")
    writer.add(found.ids.numpy(), found.logprobs.numpy())


def _first_rows(selection: Selection, dealt: list[list[Pack]]) -> Int64:
    """[n] the number of each example's first row, through the parts of all ranks."""
    first = np.full(len(selection), -1, np.int64)
    row = 0
    for packs in dealt:
        for pack in packs:
            for index in pack:
                first[index] = row
                row += int(selection.num_targets[index])
    return first


def _publish(temporary: Path, folder: Path, seal_it: Callable[[], None]) -> None:
    """Rank 0: everything is on disk before its name is. Another run may have made the same meanwhile."""
    try:
        seal_it()
        faults.reach("start_answers.before_rename", rank=0)
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / MANIFEST).exists():
                raise
        sync(folder.parent)
        shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise StorageError(f"data.cache_dir: {folder} cannot be written: {error.strerror or error}") from error


def _together(action: Callable[[], T]) -> T:
    """The result of every rank's own action; what one of them cannot read or write is raised on all."""
    results: list[T] = []
    problem: UserError | None = None
    try:
        results.append(action())
    except UserError as error:
        problem = error
    except OSError as error:
        problem = StorageError(f"data.cache_dir: {error.filename or 'a file'}: {error.strerror or error}")
    if collectives.all_max([float(problem is not None)])[0]:
        rank, theirs = next((n, found) for n, found in enumerate(collectives.gather(problem)) if found is not None)
        raise type(theirs)(f"rank {rank}: {theirs}")
    return results[0]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
