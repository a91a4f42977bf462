"""Judge how a launch ended: which exit code it deserves and what to tell the person who started it. Pure: an Ending
comes in, a Verdict goes out."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.job import EXIT_REQUEUE
from launcher.supervise import Ended, Ending


@dataclass(frozen=True)
class Verdict:
    """The launcher's exit code and its last words."""

    code: int
    lines: tuple[str, ...] = ()


def judge(ending: Ending) -> Verdict:
    """The code and words a launch ends with."""
    lines: list[str] = []
    if ending.immortal:
        pids = ", ".join(map(str, ending.immortal))
        lines.append(f"SIGKILL did not end these processes, they hang in the kernel: {pids}")
    if ending.num_left_behind:
        lines.append(f"ended {ending.num_left_behind} processes that the ranks had left behind")
    lines += _failure_lines(ending.failure)
    if ending.code == EXIT_REQUEUE:
        lines.append("stopped on request with a checkpoint; the same command goes on from there (exit code 75)")
    return Verdict(ending.code, tuple(lines))


def _failure_lines(failure: Ended | None) -> list[str]:
    if failure is None or failure.code == EXIT_REQUEUE:
        return []
    if failure.was_asked:
        return [f"{failure.name} had no checkpoint to offer: {failure.words} (exit code {failure.code})"]
    last_word = f"{failure.name} failed first: {failure.words} (exit code {failure.code})"
    if failure.quote is None:
        return [f"{last_word}; its output is above"]
    heading = f"the last lines of {failure.name} ({failure.quote.source}):"
    return [heading, *(f"| {line}" for line in failure.quote.lines or ["(nothing)"]), last_word]
