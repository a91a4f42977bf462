"""The run folder: who holds it, and how the run in it ended."""

import json
import os
import socket
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sft_dist.config import RunConfig
from sft_dist.errors import ClusterError, ConfigError, StorageError
from sft_dist.redaction import MASK
from sft_dist.train import goodput
from sft_dist.train.checkpoint import checkpoints_dir, sweep_temporaries, write_json

CONFIG = "config.json"
OUTCOME = "outcome.json"
SUMMARY = "summary.json"
_LOCK, _HOLDER = "run.lock", "run.lock.json"


class RunLock:
    """One run per run folder. The operating system releases the lock with the process, so none is ever stale."""

    def __init__(self, run_dir: Path) -> None:
        """Raises ClusterError when another process holds the folder, StorageError when it cannot be written."""
        try:
            checkpoints_dir(run_dir).mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(run_dir / _LOCK)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ClusterError(f"run_dir: {run_dir} is in use by another run ({_holder(run_dir)})") from None
        except OSError as error:
            raise StorageError(f"run_dir: {run_dir} cannot be written: {error.strerror or error}") from error
        write_json(run_dir / _HOLDER, {"host": socket.gethostname(), "pid": os.getpid()})
        (run_dir / OUTCOME).unlink(missing_ok=True)
        sweep_temporaries(run_dir)

    def release(self) -> None:
        self._lock.release()


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


def _holder(run_dir: Path) -> str:
    try:
        holder = json.loads((run_dir / _HOLDER).read_text())
        return f"host {holder['host']}, process {holder['pid']}"
    except (OSError, ValueError, KeyError):
        return "unknown"
