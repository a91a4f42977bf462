"""Start a run again after a failure that a new start may mend: which exit codes those are, how often, after which
pause, and when to give up because new starts bring no new checkpoint. Starting itself is the caller's."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launcher.job import EXIT_CLUSTER, EXIT_NO_PROGRESS, EXIT_REQUEUE, EXIT_STUCK
from launcher.report import Verdict
from launcher.supervise import PASSED_ON, Ending, say

MAX_FRUITLESS = 3
MAX_PAUSE_S = 60.0
# An uncaught error (1: drivers and devices fail so), a lost peer or a port (69), a hang or broken numbers (70), files
# that could not be written (74). Above 128: killed, by the out-of-memory killer say. What is missing here comes back
# with every start: a wrong command line (2), bad data (65), a wrong run file (78).
MENDED = (1, EXIT_CLUSTER, EXIT_STUCK, 74)
EXPLAINED = (
    "start the ranks again, N times at most, after a failure that this may mend: a rank killed by a signal, exit code "
    "1, 69, 70 or 74; never after 0, 2, 65 or 78, nor when sft-launch itself was signalled. "
    f"{MAX_FRUITLESS} restarts in a row without a new checkpoint end it with {EXIT_NO_PROGRESS} (0)"
)

# Checkpoints that are there; one that is published anew under the name of an old one is another.
Published = frozenset[tuple[str, int, int]]


@dataclass(frozen=True, kw_only=True)
class Restarts:
    """What the command line allows."""

    budget: int = 0
    pause_s: float = 1.0  # doubled with every restart that brought nothing
    after_stop: bool = False  # also when the ranks stopped with 75 though the launcher was not signalled

    def may_mend(self, code: int) -> bool:
        """Whether a run that ended with `code` may do better when it is started again."""
        return code in MENDED or code > 128 or (self.after_stop and code == EXIT_REQUEUE)

    def pause_after(self, num_fruitless: int) -> float:
        return min(self.pause_s * 2.0**num_fruitless, MAX_PAUSE_S)


def keep_running(
    start: Callable[[int], tuple[Ending, Verdict]], restarts: Restarts, *, published: Callable[[], Published] | None
) -> int:
    """Call `start(0)`, `start(1)`, ... until one ends that another would not mend; returns the exit code.

    `published` tells the checkpoints there are; without it only the budget ends the restarts. To be called
    with signals held (supervise.prepared): one that comes between two starts ends the run, too.
    """
    known = published() if published else frozenset()
    num_fruitless = 0
    for number in itertools.count():
        ending, verdict = start(number)
        for line in verdict.lines:
            say(line)
        if ending.was_asked or ending.immortal or restarts.budget == 0 or not restarts.may_mend(verdict.code):
            return verdict.code
        found = published() if published else frozenset()
        if number and published:
            num_fruitless = 0 if found - known else num_fruitless + 1
        known |= found
        if num_fruitless == MAX_FRUITLESS:
            say(
                f"{MAX_FRUITLESS} restarts in a row brought no new checkpoint: what ended the last comes back with "
                f"every start (exit code {EXIT_NO_PROGRESS} instead of {verdict.code})"
            )
            return EXIT_NO_PROGRESS
        if number == restarts.budget:
            say(f"no restart is left of {restarts.budget} (exit code {verdict.code})")
            return verdict.code
        pause_s = restarts.pause_after(num_fruitless)
        say(f"restart {number + 1} of {restarts.budget} in {pause_s:g} s")
        if (signum := _signalled_within(pause_s)) is not None:
            code = EXIT_REQUEUE if found else 128 + signum
            say(f"{signum.name} before the restart: no rank runs, nothing is lost (exit code {code})")
            return code
    raise AssertionError("unreachable")


def checkpoints(run_dir: Path) -> Published:
    """The checkpoints in a run folder, by name and by the manifest that makes each of them one."""
    found = set()
    for manifest in (run_dir / "checkpoints").glob("step-*/manifest.json"):
        try:
            status = manifest.stat()
        except OSError:
            continue  # removed since the folder was listed
        found.add((manifest.parent.name, status.st_ino, status.st_mtime_ns))
    return frozenset(found)


def _signalled_within(pause_s: float) -> signal.Signals | None:
    received = signal.sigtimedwait(PASSED_ON, pause_s)
    return None if received is None else signal.Signals(received.si_signo)
