"""Checkpoints that are whole or absent: written under a temporary name, published by one rename.

    RUN_DIR/checkpoints/step-00000120/manifest.json      sizes and sha256 of every file, state, digests
                                     /shards/            DeepSpeed's files, one pair a rank
    RUN_DIR/checkpoints/best.json                        which step has the lowest held-out NLL

A folder without a valid manifest is never resumed from. Rank 0 decides which one to take; every rank checks the
files it will read before any of them touches the engine.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sft_dist import faults
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import ConfigError, StorageError
from sft_dist.paths import fault_of_name
from sft_dist.redaction import find_secrets, redact_tree
from sft_dist.train.numbers import History

FORMAT = 1
MANIFEST = "manifest.json"
BEST = "best.json"


@dataclass(frozen=True, slots=True)
class TrainState:
    """What a resumed run continues from. Data position, learning rate and random streams follow from the step."""

    step: int = 0  # finished optimizer steps
    num_tokens: int = 0
    num_target_tokens: int = 0
    train_time_s: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    heldout_nll_before: float | None = None  # per token, at step 0
    heldout_nll_best: float | None = None
    heldout_best_step: int | None = None
    heldout_nll_last: float | None = None
    history: History = field(default_factory=History)  # losses, steps left out and rollbacks

    def __post_init__(self) -> None:
        history: Any = self.history
        if isinstance(history, dict):  # as a manifest has it
            object.__setattr__(self, "history", History.read(history))


@dataclass(frozen=True, slots=True)
class Checkpoint:
    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["state"]["step"])

    @property
    def state(self) -> TrainState:
        return TrainState(**self.manifest["state"])


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def save(
    run_dir: Path, state: TrainState, world: World, write: Callable[[Path], None], facts: dict[str, Any]
) -> Checkpoint:
    """Two-phase commit: all ranks write below a temporary name, agree, then rank 0 publishes.

    `write` is the engine's save. Raises StorageError on every rank when any rank could not write; the checkpoints
    from before stay as they are.
    """
    parent = checkpoints_dir(run_dir)
    temporary, final = parent / f".tmp-step-{state.step:08d}", parent / f"step-{state.step:08d}"
    problem = _attempt(lambda: _fresh_folder(temporary)) if world.is_main else None
    _raise_together(problem, "cannot be started")
    faults.reach("save.before_shards", rank=world.rank, step=state.step)
    problem = _attempt(lambda: write(temporary))
    faults.reach("save.after_shards", rank=world.rank, step=state.step)
    # All ranks have left the writing before anyone looks at files.
    _raise_together(problem, "cannot be written")
    files: dict[str, Any] = {}
    problem = _attempt(lambda: files.update(_describe(temporary, _own_files(temporary, world.rank))))
    gathered = collectives.gather(files)
    _raise_together(problem, "cannot be read back")
    manifest = {
        "format": FORMAT,
        "world_size": world.size,
        "state": asdict(state),
        "files": {name: facts for part in gathered for name, facts in part.items()},
        **facts,
    }
    faults.reach("save.before_publish", rank=world.rank, step=state.step)
    problem = _attempt(lambda: _publish(temporary, final, manifest)) if world.is_main else None
    _raise_together(problem, "cannot be published")
    faults.reach("save.after_publish", rank=world.rank, step=state.step)
    return Checkpoint(final, manifest)


def newest_valid(run_dir: Path, world: World, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files are all as its manifest says, agreed over all ranks."""
    for folder in reversed(collectives.from_main(list(step_folders(run_dir).values()))):
        fault = fault_of(folder, world)
        if fault is None:
            return read(folder)
        say(f"checkpoint {folder} is not used: {fault}")
    return None


def fault_of(folder: Path, world: World | None) -> str | None:
    """What is wrong with a checkpoint, or None. With a world, ranks share the checking and agree on the answer."""
    try:
        manifest = read(folder).manifest
        names = sorted(manifest["files"])
        mine = names if world is None else names[world.rank :: world.size]
        fault = next((f for name in mine if (f := _file_fault(folder / name, manifest["files"][name]))), None)
    except StorageError as error:
        fault = str(error)
    if world is None:
        return fault
    return next((f for f in collectives.gather(fault) if f is not None), None)


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises StorageError without a readable manifest, ConfigError for a newer format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if version == FORMAT:
            TrainState(**manifest["state"])
            manifest["world_size"], manifest["files"].items()
    except FileNotFoundError:
        raise StorageError(f"{folder}: no {MANIFEST}: not a complete checkpoint") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: not a readable manifest: {error}") from None
    if fault := next((f for name in manifest.get("files", ()) if (f := fault_of_name(folder, name))), None):
        raise StorageError(f"{path}: {fault}: nothing outside of {folder} is read")
    if version != FORMAT:
        raise ConfigError(f"{path}: written in format {version}; this version reads format {FORMAT}")
    return Checkpoint(folder, manifest)


def find(run_dir: Path, which: str) -> Checkpoint:
    """The checkpoint named `best`, `last`, `best-or-last` or a step number, checked file by file.

    Raises ConfigError for a name that leads nowhere, StorageError for a damaged checkpoint.
    """
    parent, steps = checkpoints_dir(run_dir), step_folders(run_dir)
    if not steps:
        raise ConfigError(f"{run_dir}: holds no checkpoint")
    there = ", ".join(map(str, steps))
    if which == "best-or-last":
        best = best_step(run_dir)
        which = "best" if best in steps else "last"
        if best is not None and best not in steps:
            print(f"note: {run_dir}: the best checkpoint (step {best:,}) is gone; taking the last", file=sys.stderr)
    match which:
        case "last":
            candidates = list(reversed(steps.values()))
        case "best":
            best = best_step(run_dir)
            if best is None:
                raise ConfigError(f"{run_dir}: no best checkpoint is known (no evaluation ran); ask for `last`")
            candidates = [parent / f"step-{best:08d}"]
        case _ if which.isdecimal():
            if int(which) not in steps:
                raise ConfigError(f"{run_dir}: holds no checkpoint of step {int(which):,} (steps there: {there})")
            candidates = [steps[int(which)]]
        case _:
            raise ConfigError(f"checkpoint {which!r}: expected best, last or a step number (steps there: {there})")
    faults: list[str] = []
    for folder in candidates:
        fault = fault_of(folder, None)
        if fault is None:
            for skipped in faults:
                print(f"not used: {skipped}", file=sys.stderr)
            return read(folder)
        faults.append(fault)
    raise StorageError("; ".join(faults) + f" (steps there: {there})")


def best_step(run_dir: Path) -> int | None:
    """The step that `mark_best` has written, if any. Raises StorageError where that is damaged."""
    path = checkpoints_dir(run_dir) / BEST
    try:
        return int(json.loads(path.read_text())["step"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise StorageError(
            f"{path}: not readable ({type(error).__name__}: {error}); ask for the last checkpoint, or one by its step"
        ) from None


def mark_best(run_dir: Path, state: TrainState) -> None:
    """Write which step is the best, from what every manifest carries, or that none is; rank 0."""
    path = checkpoints_dir(run_dir) / BEST
    if state.heldout_best_step is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, {"step": state.heldout_best_step, "heldout_nll": state.heldout_nll_best})


def step_folders(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of everything named like a checkpoint, ascending; other names are left alone."""
    found = {}
    for path in checkpoints_dir(run_dir).glob("step-*"):
        digits = path.name.removeprefix("step-")
        if len(digits) == 8 and digits.isdecimal() and path.is_dir() and not path.is_symlink():
            found[int(digits)] = path
    return dict(sorted(found.items()))


def evict(run_dir: Path, *, published: int, keep: int, protected: Iterable[int]) -> list[int]:
    """Remove all but the newest `keep` checkpoints and the protected steps; called by rank 0 after a publish.

    Checkpoints beyond the published step are of a continuation that was given up (damaged, or left behind by a
    resume from an older one); they go too, or the next resume would take them. Returns the steps removed.
    """
    folders = step_folders(run_dir)
    kept = {published, *protected} | set([step for step in folders if step <= published][-keep:])
    removed = [step for step in folders if step not in kept]
    for step in removed:
        # Without its manifest a half-deleted folder is no checkpoint.
        (folders[step] / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folders[step], ignore_errors=True)
    return removed


def sweep_temporaries(run_dir: Path) -> None:
    """Remove what killed saves left behind; only the holder of the run lock may call this."""
    for folder in checkpoints_dir(run_dir).glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write a small file whole or not at all, on disk when this returns."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as file:
        file.write(json.dumps(redact_tree(tree, find_secrets(os.environ)), indent=2, ensure_ascii=False))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(temporary: Path, final: Path, manifest: dict[str, Any]) -> None:
    for script in temporary.glob("*.py"):
        script.unlink()  # DeepSpeed copies its converters into every save; export does that work here
    write_json(temporary / MANIFEST, manifest)
    if final.exists():
        # The same step once more, after a resume from an older one: the new one is as good, the old one goes first.
        (final / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(final)
    os.replace(temporary, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _own_files(folder: Path, rank: int) -> list[Path]:
    return sorted(folder.glob(f"shards/*zero_pp_rank_{rank}_mp_rank_00_*.pt"))


def _describe(folder: Path, files: Iterable[Path]) -> dict[str, Any]:
    described = {}
    for path in files:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        described[str(path.relative_to(folder))] = {"num_bytes": path.stat().st_size, "sha256": digest}
    return described


def _file_fault(path: Path, expected: dict[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["num_bytes"]:
            return f"{path} has {size:,} bytes, expected {expected['num_bytes']:,}"
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    return None if digest == expected["sha256"] else f"{path} is damaged: its sha256 differs from the manifest's"


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _raise_together(problem: str | None, what: str) -> None:
    problems = [(rank, text) for rank, text in enumerate(collectives.gather(problem)) if text is not None]
    if problems:
        rank, text = problems[0]
        raise StorageError(f"the checkpoint {what} on rank {rank}: {text}")
