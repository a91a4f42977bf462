"""What the time of a run went to, over all its starts: RUN_DIR/starts.jsonl, one line for everything that ended.

    {"did": "start", "at": 1763736000.0, "clock": BOOT_ID}     when the process of rank 0 began
    {"did": "startup", "at": ..., "step": 40}                  ready to train; 40 steps are done
    {"did": "step", "at": ..., "step": 41}                     likewise evaluate, checkpoint
    {"did": "end", "at": ..., "exit_code": 75}                 missing where the process was killed

A line says what the time since the line before went to, so lines partition a start. They are only ever appended, each
by one write: a process that is killed leaves at most a torn last line, which is not counted. Times are of rank 0's
clock, in seconds; those of two machines are never compared.
"""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from sft_dist.data.progress import duration
from sft_dist.errors import ExitCode

STARTS = "starts.jsonl"
Did = Literal["start", "startup", "step", "evaluate", "checkpoint", "end"]
_ORDERLY = (ExitCode.DONE, ExitCode.STOPPED)


class Timeline:
    """Appends to RUN_DIR/starts.jsonl on rank 0 and does nothing elsewhere."""

    def __init__(self, run_dir: Path, *, is_main: bool) -> None:
        self._handle: int | None = None
        if is_main:
            # Accounts are not worth a run: where they cannot be written the run has other, louder troubles.
            with suppress(OSError):
                self._handle = os.open(run_dir / STARTS, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                _end_torn_line(self._handle)

    def mark(self, did: Did, *, at: float | None = None, **facts: Any) -> None:
        """The time since the line before went to this."""
        if self._handle is not None:
            line = json.dumps({"did": did, "at": time.time() if at is None else at, **facts}) + "\n"
            with suppress(OSError):
                os.write(self._handle, line.encode())

    def close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def begin(run_dir: Path) -> None:
    """Note that this process is a start of the run; rank 0, with the run lock held."""
    timeline = Timeline(run_dir, is_main=True)
    timeline.mark("start", at=time.time() - _process_age_s(), clock=_clock())
    timeline.close()


def end(run_dir: Path, exit_code: int) -> "Account":
    """Note how this start ends, and account for all of them."""
    timeline = Timeline(run_dir, is_main=True)
    timeline.mark("end", exit_code=int(exit_code))
    timeline.close()
    return account(read(run_dir))


@dataclass(frozen=True, slots=True)
class Account:
    """Seconds of wall time since the first start, each in one place; they add up to `wall_s`."""

    num_starts: int = 0
    productive_s: float = 0.0  # steps of which the result was kept
    redone_s: float = 0.0  # steps that were lost with their process, or given up, and had to be taken again
    startup_s: float = 0.0
    checkpoint_s: float = 0.0  # for which training stood still
    evaluate_s: float = 0.0
    other_s: float = 0.0  # ends of starts
    down_s: float = 0.0  # after a failure, from the last sign of life to the next start
    waiting_s: float = 0.0  # after a stop on request or a finished run, until the next start
    num_unknown: int = 0  # pauses between starts on two machines, whose clocks cannot be compared: counted nowhere
    recoveries_s: tuple[float, ...] = ()  # from a failure's last sign of life to the first step that was not there yet

    @property
    def wall_s(self) -> float:
        inside = self.productive_s + self.redone_s + self.startup_s + self.checkpoint_s + self.evaluate_s + self.other_s
        return inside + self.down_s + self.waiting_s

    @property
    def goodput(self) -> float | None:
        """0 to 1: the share of all wall time that went to steps whose result was kept."""
        return self.productive_s / self.wall_s if self.wall_s else None

    @property
    def recovery_s(self) -> float | None:
        """The median."""
        return median(self.recoveries_s) if self.recoveries_s else None

    def as_dict(self) -> dict[str, Any]:
        parts = ("productive", "redone", "startup", "checkpoint", "evaluate", "other", "down", "waiting")
        return {
            "goodput": self.goodput,
            "wall_s": self.wall_s,
            **{f"{part}_s": getattr(self, f"{part}_s") for part in parts},
            "starts": self.num_starts,
            "recoveries_s": list(self.recoveries_s),
            "recovery_s": self.recovery_s,
            "pauses_unknown": self.num_unknown,
        }

    def lines(self) -> Iterator[str]:
        """For people."""
        if self.goodput is None:
            return
        others = {
            "redone steps": self.redone_s,
            "start-up": self.startup_s,
            "checkpoints": self.checkpoint_s,
            "evaluation": self.evaluate_s,
            "down after failures": self.down_s,
            "waiting to be started again": self.waiting_s,
            "the rest": self.other_s,
        }
        rest = ", ".join(f"{name} {seconds / self.wall_s:.1%}" for name, seconds in others.items() if seconds > 0)
        yield (
            f"goodput {self.goodput:.1%}: {duration(self.productive_s)} of steps in {duration(self.wall_s)} since the "
            f"first of {self.num_starts:,} start(s); {rest}"
        )
        if self.num_unknown:
            yield f"not counted: {self.num_unknown:,} pause(s) between starts on two machines, whose clocks may differ"
        if self.recoveries_s:
            yield (
                f"recovered {len(self.recoveries_s):,} time(s), from the last sign of life to the first new step in "
                f"{self.recovery_s:,.1f} s (median), {max(self.recoveries_s):,.1f} s (longest)"
            )


def read(run_dir: Path) -> list[dict[str, Any]]:
    """The lines that are whole."""
    try:
        text = (run_dir / STARTS).read_text(errors="replace")
    except OSError:
        return []
    entries = []
    for line in text.splitlines():
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict) and isinstance(entry.get("at"), (int, float)) and "did" in entry:
                entries.append(entry)
    return entries


def account(entries: Iterable[dict[str, Any]]) -> Account:
    """Where the time of these starts went, in the order they were written."""
    total = Account()
    kept: dict[int, float] = {}  # seconds of each step whose result is part of the run
    reached = 0  # the highest step that was ever finished
    last: dict[str, Any] | None = None
    clock: Any = None
    failed_at: float | None = None  # of the failure that no new step has made good yet
    for entry in entries:
        did, at, step = entry["did"], float(entry["at"]), int(entry.get("step", 0))
        seconds = max(0.0, at - float(last["at"])) if last is not None else 0.0
        if did == "start":
            is_failure = last is not None and not (last["did"] == "end" and last.get("exit_code") in _ORDERLY)
            total = replace(total, num_starts=total.num_starts + 1)
            if last is not None and entry.get("clock") != clock:
                total, failed_at = replace(total, num_unknown=total.num_unknown + 1), None
            elif is_failure:
                assert last is not None
                total = replace(total, down_s=total.down_s + seconds)
                failed_at = float(last["at"]) if failed_at is None else failed_at
            else:
                total = replace(total, waiting_s=total.waiting_s + seconds)
            clock = entry.get("clock")
        elif did == "step":
            total = replace(total, redone_s=total.redone_s + _drop(kept, step - 1))
            kept[step] = seconds
            if step > reached and failed_at is not None:
                total = replace(total, recoveries_s=(*total.recoveries_s, max(0.0, at - failed_at)))
                failed_at = None
            reached = max(reached, step)
        elif did == "startup":
            redone_s = total.redone_s + _drop(kept, step)
            total = replace(total, redone_s=redone_s, startup_s=total.startup_s + seconds)
        elif did == "checkpoint":
            total = replace(total, checkpoint_s=total.checkpoint_s + seconds)
        elif did == "evaluate":
            total = replace(total, evaluate_s=total.evaluate_s + seconds)
        else:
            total = replace(total, other_s=total.other_s + seconds)
        last = entry
    return replace(total, productive_s=sum(kept.values()))


def _drop(kept: dict[int, float], done: int) -> float:
    """Take out the steps after `done`, which are taken again; returns their seconds."""
    return sum(kept.pop(step) for step in [step for step in kept if step > done])


def _end_torn_line(handle: int) -> None:
    size = os.fstat(handle).st_size
    if size and os.pread(handle, 1, size - 1) != b"\n":
        os.write(handle, b"\n")


def _process_age_s() -> float:
    """How long this process has lived; imports before this line belong to the start-up. 0 where nothing tells."""
    try:
        # proc_pid_stat(5): the 22nd field, clock ticks since boot; the second field may hold blanks and brackets.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


def _clock() -> str:
    """Which machine's clock, since it was last started."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
