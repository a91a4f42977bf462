"""The run folder: who holds it, and how the run in it ended."""

from pathlib import Path
from typing import Any

from sft_dist.config import RunConfig
from sft_dist.errors import ConfigError, StorageError
from sft_dist.redaction import MASK
from sft_dist.train import goodput
from sft_dist.train.checkpoint import checkpoints_dir
from sft_dist.train.files import write_json
from sft_dist.train.lock import RunLock
from sft_dist.train.retention import sweep_temporaries

CONFIG = "config.json"
OUTCOME = "outcome.json"
SUMMARY = "summary.json"


def take(lock: RunLock) -> None:
    """Take hold of a run folder for a new start of its run: what an earlier one left half-done goes.

    Raises ClusterError when another run holds it, StorageError when it cannot be written.
    """
    lock.take()
    goodput.begin(lock.run_dir)
    try:
        (lock.run_dir / OUTCOME).unlink(missing_ok=True)
        checkpoints_dir(lock.run_dir).mkdir(exist_ok=True)
        sweep_temporaries(lock.run_dir)
    except OSError as error:
        raise StorageError(f"run_dir: {error.filename or lock.run_dir}: {error.strerror or error}") from error


def write_outcome(
    run_dir: Path,
    *,
    exit_code: int,
    reason: str,
    step: int | None,
    checkpoint: str | None,
    times: goodput.Account | None = None,
) -> None:
    """How the run ended, for requeue and status, written before any rank leaves; `times` where the end is noted."""
    times = times or goodput.end(run_dir, exit_code)
    outcome = {"exit_code": int(exit_code), "reason": reason, "step": step, "checkpoint": checkpoint}
    write_json(run_dir / OUTCOME, outcome | {"goodput": times.goodput, "recovery_s": times.recovery_s})


def portable(config: RunConfig) -> dict[str, Any]:
    """The resolved run file with the model's path made absolute: the run folder is read from anywhere."""
    tree = config.model_dump(mode="json")
    if Path(config.model.path).exists():
        tree["model"]["path"] = str(Path(config.model.path).resolve())
    return tree


def saved_config(run_dir: Path) -> RunConfig:
    """The resolved run file of a run folder. Raises ConfigError where there is none."""
    try:
        text = (run_dir / CONFIG).read_text()
        if MASK in text:
            raise ConfigError(f"{run_dir / CONFIG}: holds a secret that was masked ({MASK}); write it in by hand")
        return RunConfig.model_validate_json(text)
    except FileNotFoundError:
        raise ConfigError(f"{run_dir}: not a run folder (it has no {CONFIG})") from None
    except ValueError as error:
        raise ConfigError(f"{run_dir / CONFIG}: not readable: {error}") from None


def is_run_dir(path: str) -> bool:
    return (Path(path) / CONFIG).exists() and checkpoints_dir(Path(path)).is_dir()
