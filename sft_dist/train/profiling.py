"""A trace of a few steps by torch's profiler, for people who look for where time goes. One rank writes it."""

import warnings
from pathlib import Path
from typing import Any

import torch

from sft_dist.errors import StorageError, say

_SKIPPED = 2  # steps that compile, allocate and fill caches
_RECORDED = 3


class Profile:
    """Records steps 3 to 5 of those that are taken after `first_step` steps; a trace for chrome://tracing, Perfetto."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder = folder
        self._step = first_step
        self._written: Path | None = None
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # The last step that is skipped is recorded and thrown away: the profiler's own start is slow.
        schedule = torch.profiler.schedule(
            skip_first=_SKIPPED - 1, wait=0, warmup=1, active=_RECORDED, repeat=1
        )  # step -> what to do
        self._profiler = torch.profiler.profile(activities=activities, schedule=schedule, on_trace_ready=self._write)
        self._profiler.start()

    def step_ended(self) -> None:
        self._step += 1
        self._profiler.step()

    def close(self) -> None:
        """Stop, and say so where the run ended before there was anything to write."""
        with warnings.catch_warnings(action="ignore"):  # about a profiler that recorded nothing
            self._profiler.stop()
        if self._written is None:
            say(f"no profile: the first {_SKIPPED} steps are not recorded, and no other one was taken")

    def _write(self, profiler: Any) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._written = self._folder / f"until-step-{self._step:08d}.json"
            profiler.export_chrome_trace(str(self._written))
        except OSError as error:
            raise StorageError(f"{self._folder}: the profile cannot be written: {error}") from error
        say(f"profile of the steps until {self._step:,}: {self._written} (for chrome://tracing or ui.perfetto.dev)")
