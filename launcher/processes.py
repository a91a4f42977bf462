"""Processes as the Linux kernel shows them: who is in which session, who descends from whom, and how to end
them. Reads /proc and sends signals; keeps no state."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat. State "Z" is a zombie: dead, and waiting for its parent to notice."""

    pid: int
    parent: int
    session: int
    state: str


def parse_stat(stat: str) -> Process:
    """Parse /proc/PID/stat, whose second field is a name that may itself hold blanks and brackets."""
    pid, rest = stat.split(" ", 1)
    state, parent, _, session = rest[rest.rindex(")") + 1 :].split()[:4]
    return Process(pid=int(pid), parent=int(parent), session=int(session), state=state)


def all_processes() -> list[Process]:
    """Every process there is, zombies included."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                found.append(parse_stat(Path("/proc", entry, "stat").read_text(errors="replace")))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it ended between the two reads
    return found


def living_members(sessions: Collection[int]) -> list[Process]:
    """Processes of `sessions` that still run."""
    return [p for p in all_processes() if p.session in sessions and p.state not in "ZX"]


def descendants(pid: int) -> set[int]:
    """Living processes below `pid`, in any session. Orphans among them have come to it if it adopts (adopt_orphans)."""
    table = [p for p in all_processes() if p.state not in "ZX"]
    family = {pid}
    while grown := {p.pid for p in table if p.parent in family} - family:
        family |= grown
    return family - {pid}


def send_signal(pids: Iterable[int], signum: int) -> None:
    """Signal each process, passing over those that have just ended."""
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            continue


def kill_sessions(sessions: Collection[int], *, timeout_s: float) -> list[Process]:
    """SIGKILL every process of `sessions` until none runs; returns those that outlived `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    # Again and again: a process may fork between the look and the signal.
    while (members := living_members(sessions)) and time.monotonic() < deadline:
        send_signal([p.pid for p in members], signal.SIGKILL)
        time.sleep(0.01)
    return members


def kill_descendants(*, spare: Collection[int] = (), timeout_s: float) -> None:
    """SIGKILL what this process has started and what that has left to it, but for `spare`, and bury it."""
    deadline = time.monotonic() + timeout_s
    while (found := _unburied() - set(spare)) and time.monotonic() < deadline:
        send_signal(found, signal.SIGKILL)
        time.sleep(0.01)
        for pid in found:
            with suppress(ChildProcessError):  # of another parent, which buries it
                os.waitpid(pid, os.WNOHANG)


def _unburied() -> set[int]:
    """Descendants that live, and dead ones that wait for this process to bury them."""
    own = os.getpid()
    return descendants(own) | {p.pid for p in all_processes() if p.parent == own and p.state in "ZX"}


def adopt_orphans() -> None:
    """Make this process the parent of descendants that lose theirs, so that it can reap them.

    Otherwise they go to process 1, which in many containers never reaps.
    """
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have the kernel SIGKILL this process when `parent` dies. To be called between fork and exec.

    SIGKILL, not SIGTERM: with the launcher gone nobody is left to end a rank that answers SIGTERM by
    waiting in a collective, and it would hold its GPU for ever. Published checkpoints are not harmed.
    """
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above, so no signal will come
        os._exit(128 + signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
