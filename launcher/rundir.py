"""What the launcher learns about a run from sft-dist: the run folder, from `sft-dist config --json`, and
how the run ended, from the outcome.json that rank 0 leaves in that folder. Never writes there."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.job import Job, LaunchError


@dataclass(frozen=True)
class Outcome:
    """How a run ended, in the words of its rank 0."""

    exit_code: int
    reason: str


def ask_run_dir(job: Job, *, python: str) -> Path:
    """The run folder of `job`; a run file that sft-dist refuses is refused here, before any rank starts."""
    argv = [python, "-m", "sft_dist", "config", job.run_file, *job.overrides, "--json"]
    answer = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        sys.stderr.write(answer.stderr)
        code = answer.returncode if answer.returncode > 0 else 128 - answer.returncode
        raise LaunchError(
            f"no rank was started: `sft-dist config {job.run_file}` ended with exit code {code}",
            exit_code=code,
        )
    try:
        return Path(json.loads(answer.stdout)["run_dir"]).absolute()
    except (ValueError, KeyError, TypeError) as error:
        raise LaunchError(
            f"`sft-dist config {job.run_file} --json` printed no JSON object with a run_dir: {error!r}",
            exit_code=1,
        ) from error


def outcome_mark(run_dir: Path) -> tuple[int, int] | None:
    """What tells one writing of outcome.json from the next; None while there is none.

    Compared with itself only, never with a clock: the folder may lie on another machine.
    """
    try:
        found = (run_dir / "outcome.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def read_outcome(run_dir: Path, *, mark_before: tuple[int, int] | None) -> Outcome | None:
    """The outcome written since `mark_before` was taken, or None when this launch left none."""
    if outcome_mark(run_dir) in (None, mark_before):
        return None
    try:
        content = json.loads((run_dir / "outcome.json").read_text(encoding="utf-8"))
        return Outcome(exit_code=int(content["exit_code"]), reason=str(content.get("reason", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
