"""Judge how a launch ended: which exit code it deserves and what to tell the person who started it. An
Ending and the outcome rank 0 wrote come in, a Verdict goes out; it reads the end of one log file and
touches nothing."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.job import EXIT_REQUEUE
from launcher.rundir import Outcome
from launcher.supervise import Ended, Ending, Log

NUM_TAIL_LINES = 20
TAIL_BYTES = 65_536


@dataclass(frozen=True)
class Verdict:
    """The launcher's exit code and its last words."""

    code: int
    lines: tuple[str, ...] = ()


def judge(ending: Ending, *, outcome: Outcome | None) -> Verdict:
    """The code and words a launch ends with; `outcome` is what rank 0 wrote during it, if we may need it."""
    lines: list[str] = []
    if ending.immortal:
        pids = ", ".join(map(str, ending.immortal))
        lines.append(f"SIGKILL did not end these processes, they hang in the kernel: {pids}")
    code, words = (ending.code, _failure_lines(ending.failure)) if outcome is None else _told(ending, outcome)
    if ending.num_left_behind:
        lines.append(f"ended {ending.num_left_behind} processes that the ranks had left behind")
    lines += words
    if code == EXIT_REQUEUE:
        lines.append("stopped on request with a checkpoint; the same command goes on from there (exit code 75)")
    return Verdict(code, tuple(lines))


def tail(log: Log, *, num_lines: int = NUM_TAIL_LINES) -> list[str]:
    """The last lines this launch wrote to `log`; of a line redrawn in place, its last state."""
    with log.path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(log.start, size - TAIL_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return [line for line in lines if line.strip()][-num_lines:]


def _failure_lines(failure: Ended | None) -> list[str]:
    if failure is None or failure.code == EXIT_REQUEUE:
        return []
    if failure.was_asked:
        return [f"{failure.name} had no checkpoint to offer: {failure.words} (exit code {failure.code})"]
    last_word = f"{failure.name} failed first: {failure.words} (exit code {failure.code})"
    if failure.log is None:
        return [f"{last_word}; its output is above"]
    heading = f"the last lines of {failure.name} ({failure.log.path}):"
    return [heading, *(f"| {line}" for line in tail(failure.log) or ["(nothing)"]), last_word]


def _told(ending: Ending, outcome: Outcome) -> tuple[int, list[str]]:
    """The code behind the one that srun hands on, which is the highest of all tasks, of those it killed too."""
    if ending.at_once:
        return ending.code, _failure_lines(ending.failure)
    if outcome.exit_code in (0, EXIT_REQUEUE):
        return outcome.exit_code, []
    return outcome.exit_code, [f"{outcome.reason or 'the run failed'} (exit code {outcome.exit_code})"]
