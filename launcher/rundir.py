"""What the launcher learns about a run from sft-dist: its folder, from `sft-dist config --json`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from launcher.job import Job, LaunchError


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
