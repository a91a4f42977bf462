"""Checkpoints that are whole or absent: what one is, which there are, and which of them can be believed.

    RUN_DIR/checkpoints/step-00000120/manifest.json      sizes and sha256 of every file, state, digests
                                     /shards/            DeepSpeed's files, one pair a rank
    RUN_DIR/checkpoints/best.json                        which step has the lowest held-out NLL

A folder without a valid manifest is never resumed from. Rank 0 decides which one to take; every rank checks a part of
its files before any of them touches the engine. saving.py writes them, retention.py removes them.
"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.errors import ConfigError, StorageError, say
from sft_dist.paths import fault_of_name
from sft_dist.train.files import masked, write_json
from sft_dist.train.forgetting import SourceNll
from sft_dist.train.integrity import Unreadable, fault_of_files
from sft_dist.train.numbers import History

FORMAT = 2
MANIFEST = "manifest.json"
BEST = "best.json"
_STEP_NAME = re.compile(r"step-[0-9]{8}")


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
    retention: tuple[SourceNll, ...] = ()  # of every source of data.retention

    def __post_init__(self) -> None:
        history: Any = self.history
        if isinstance(history, dict):  # as a manifest has it
            object.__setattr__(self, "history", History.read(history))
        sources: Any = self.retention
        object.__setattr__(self, "retention", tuple(SourceNll(**s) if isinstance(s, dict) else s for s in sources))


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

    @property
    def num_bytes(self) -> int:
        return sum(int(file["num_bytes"]) for file in self.manifest["files"].values())


def checkpoints_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def step_folder(run_dir: Path, step: int) -> Path:
    return checkpoints_dir(run_dir) / f"step-{step:08d}"


def step_folders(run_dir: Path) -> dict[int, Path]:
    """Step -> folder of everything named like a checkpoint, ascending; other names are left alone.

    Raises Unreadable where the disk does not say what is there: nothing must be taken for absent then.
    """
    folder = checkpoints_dir(run_dir)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Unreadable(f"{folder} cannot be listed: {error.strerror}") from error
    return {int(name.removeprefix("step-")): folder / name for name in sorted(names) if _STEP_NAME.fullmatch(name)}


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest as it is written, without secrets and with a digest of all it says."""
    content = json.loads(json.dumps(masked(manifest)))
    return content | {"sha256": _digest(content)}


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read(folder: Path) -> Checkpoint:
    """The checkpoint in a folder. Raises StorageError without a whole manifest, ConfigError for a newer format.

    Raises Unreadable, a StorageError too, where the disk does not say what is there.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        version = manifest["format"]
        if "sha256" in manifest and manifest["sha256"] != _digest(manifest):
            raise StorageError(f"{path} is damaged: its sha256 is not that of what it says")
        if version == FORMAT:
            found = Checkpoint(folder, manifest)
            found.state, found.num_bytes, manifest["world_size"], manifest["sha256"]
            if _STEP_NAME.fullmatch(folder.name) and folder.name != step_folder(folder, found.step).name:
                raise StorageError(f"{folder}: its manifest is that of step {found.step:,}")
            [(str(file["sha256"]), int(file["num_bytes"])) for file in manifest["files"].values()]
    except FileNotFoundError:
        raise StorageError(f"{folder}: no {MANIFEST}: not a complete checkpoint") from None
    except OSError as error:
        raise Unreadable(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise StorageError(f"{path}: not a readable manifest: {error}") from None
    try:
        fault = next((f for name in manifest.get("files", ()) if (f := fault_of_name(folder, name))), None)
    except OSError as error:
        raise Unreadable(f"{error.filename} cannot be read: {error.strerror}") from error
    if fault is not None:
        raise StorageError(f"{path}: {fault}: nothing outside of {folder} is read")
    if version != FORMAT:
        raise ConfigError(f"{path}: written in format {version}; this version reads format {FORMAT}")
    return found


def newest_valid(
    run_dir: Path, world: World, say_once: Callable[[str], None], *, resumed_by: str | None = None
) -> Checkpoint | None:
    """The newest checkpoint whose files are all as its manifest says, the same on every rank. A collective.

    With `resumed_by`, of those written by runs with that checkpoint.resume. Raises Unreadable: what cannot be read now
    is not taken for damaged, since what is newer than the checkpoint that a run goes on from is given up.
    """
    folders = collectives.on_main(lambda: [f for f in step_folders(run_dir).values() if may_be_of(f, resumed_by)])
    for folder in reversed(folders):
        found, fault = checked(folder, world, say_once)
        if found is not None:
            return found
        say_once(f"checkpoint {folder} is not used: {fault}")
    if folders:
        say_once(f"none of the {len(folders):,} checkpoint(s) in {run_dir} can be used")
    return None


def may_be_of(folder: Path, resumed_by: str | None) -> bool:
    """Whether a run with that checkpoint.resume wrote it, or it is so damaged that nobody knows."""
    if resumed_by is None:
        return True
    try:
        content = (folder / MANIFEST).read_text()
        return bool(json.loads(content)["config"]["checkpoint.resume"] == masked(resumed_by))
    except FileNotFoundError:
        return True
    except OSError as error:
        raise Unreadable(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    except (ValueError, LookupError, TypeError):
        return True


def fault_of(folder: Path, world: World | None) -> str | None:
    """What is wrong with a checkpoint, or None. With a world, ranks share the checking and agree on the answer.

    Raises ConfigError for a newer format, Unreadable where that cannot be known.
    """
    return checked(folder, world, say)[1]


def checked(
    folder: Path, world: World | None, say_progress: Callable[[str], None]
) -> tuple[Checkpoint | None, str | None]:
    """The checkpoint, or its fault, as `fault_of` finds it.

    Ranks other than 0 may see files late: what the manifest says, rank 0 tells.
    """
    try:
        found = read(folder) if world is None else collectives.on_main(lambda: read(folder))
    except Unreadable:
        raise
    except StorageError as error:
        return None, str(error)
    fault = fault_of_files(folder, found.manifest["files"], world, say_progress)
    return (found, None) if fault is None else (None, fault)


def find(run_dir: Path, which: str, say: Callable[[str], None] = say) -> Checkpoint:
    """The checkpoint named `best`, `last`, `best-or-last` or a step number, checked file by file.

    Raises ConfigError for a name that leads nowhere, StorageError for a damaged checkpoint.
    """
    steps = step_folders(run_dir)
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
            candidates = [step_folder(run_dir, best)]
        case _ if which.isdecimal():
            if int(which) not in steps:
                raise ConfigError(f"{run_dir}: holds no checkpoint of step {int(which):,} (steps there: {there})")
            candidates = [steps[int(which)]]
        case _:
            raise ConfigError(f"checkpoint {which!r}: expected best, last or a step number (steps there: {there})")
    faults: list[str] = []
    for folder in candidates:
        found, fault = checked(folder, None, say)
        if found is not None:
            for skipped in faults:
                print(f"not used: {skipped}", file=sys.stderr)
            return found
        faults.append(str(fault))
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
    """Write which step is the best, from what every manifest carries, or that none is; rank 0. Raises StorageError."""
    path = checkpoints_dir(run_dir) / BEST
    if state.heldout_best_step is not None:
        write_json(path, {"step": state.heldout_best_step, "heldout_nll": state.heldout_nll_best})
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{path} cannot be removed: {error.strerror}") from error
