"""Run the processes of a launch and watch over them: pass signals on to all ranks at once, end the others
when one fails, leave no process behind. Commands in, one Ending out. Everything happens in the main
thread, in one loop around sigtimedwait; it never decides what a run's exit means beyond its code."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from launcher.commands import Command
from launcher.guard import Guard
from launcher.job import EXIT_CLUSTER, EXIT_REQUEUE, EXIT_STUCK, LaunchError
from launcher.lifeline import Lifeline, Report
from launcher.logs import Log, Quote, open_log, tail
from launcher.processes import (
    adopt_orphans,
    descendants,
    die_with_parent,
    kill_descendants,
    kill_sessions,
    living_members,
    send_signal,
)

# A terminal that closes asks for a checkpoint too: SIGHUP is passed on as SIGTERM.
PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
TICK_S = 1.0  # a look around even when no signal came
LIFELINE_TICK_S = 0.1
FAREWELL_S = 1.0  # helper processes of a rank (workers, trackers) leave by themselves just after it
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Child:
    """A process started by the launcher, leader of its own session."""

    command: Command
    process: subprocess.Popen[bytes]
    log: Log | None  # None: it writes to the terminal


@dataclass(frozen=True)
class Ended:
    """A child that is no more. `code` is what a shell would show, 128 + signal when it was killed."""

    name: str
    code: int
    words: str
    quote: Quote | None = None  # None: it wrote to the terminal, or nobody has asked for its last words
    log: Log | None = None  # where they are, of a child
    was_asked: bool = False  # killed by the very signal that was passed on to it

    @property
    def is_failure(self) -> bool:
        return self.code not in (0, EXIT_REQUEUE)


@dataclass(frozen=True)
class Inherited:
    """What this process has changed for itself, as it was before: so the children get it."""

    mask: frozenset[signal.Signals]
    open_files: tuple[int, int]  # limits, soft and hard


@dataclass(frozen=True)
class Ending:
    """How a launch ended: its exit code, the first failure if any, and what had to be cleared away."""

    code: int
    failure: Ended | None = None
    num_left_behind: int = 0  # processes that outlived the children and had to be ended
    at_once: bool = False  # by a second SIGINT
    was_asked: bool = False  # the launcher itself was signalled
    immortal: tuple[int, ...] = ()  # process ids that SIGKILL did not end


class EndAtOnce(Exception):
    """The second SIGINT."""


def supervise(
    commands: Sequence[Command],
    *,
    log_dir: Path,
    grace_s: float,
    inherited: Inherited,
    lifeline: Lifeline | None = None,
) -> Ending:
    """Start every command and stay until all have ended; `grace_s` is what the others get once one has.

    To be called `prepared`, with what that yields. With a `lifeline` the ranks are not the commands but what they
    start, here or on other hosts. It is closed in the end.
    """
    adopt_orphans()
    strangers = descendants(os.getpid())  # of whoever called us
    guard = Guard()
    launch = _Launch(lifeline)
    try:
        for command in commands:
            child = _start(command, log_dir, inherited)
            launch.add(child)
            guard.watch(child.process.pid)
        ending = _watch(launch, grace_s)
    except EndAtOnce:
        ending = Ending(128 + signal.SIGINT, at_once=True)
    finally:
        if lifeline is not None:
            lifeline.signal(signal.SIGKILL)
            lifeline.let_go()
        immortal = kill_sessions(launch.sessions, timeout_s=KILL_TIMEOUT_S)
        launch.reap()
        guard.close()
        # mpiexec starts its ssh in sessions of their own, which wait for a lost host for ever.
        kill_descendants(spare=strangers, timeout_s=KILL_TIMEOUT_S)
        if lifeline is not None:
            lifeline.close()
    return replace(ending, was_asked=launch.was_asked, immortal=tuple(process.pid for process in immortal))


def say(message: str) -> None:
    """One line on stderr for the person who started the launch."""
    with suppress(OSError):  # a closed terminal must not take the supervisor down
        print(f"sft-launch: {message}", file=sys.stderr, flush=True)


class _Launch:
    """The children of one launch, by process id, and the order in which they, or the ranks behind them, ended."""

    def __init__(self, lifeline: Lifeline | None) -> None:
        self.lifeline = lifeline
        self.sessions: set[int] = set()
        self.running: dict[int, Child] = {}
        self.ended: list[Ended] = []
        self._passed_on: set[int] = set()
        self._num_interrupts = 0

    @property
    def was_asked(self) -> bool:
        return bool(self._passed_on)

    def add(self, child: Child) -> None:
        self.sessions.add(child.process.pid)
        self.running[child.process.pid] = child

    def wait(self, deadline: float) -> None:
        """Until a child ends, a signal comes or `deadline` passes, whichever is first; a tick at most."""
        tick_s = TICK_S if self.lifeline is None else LIFELINE_TICK_S
        timeout_s = min(max(deadline - time.monotonic(), 0.0), tick_s)
        received = signal.sigtimedwait([*PASSED_ON, signal.SIGCHLD], timeout_s)
        if received is not None and received.si_signo in PASSED_ON:
            self._receive(signal.Signals(received.si_signo))
        self.reap()

    def signal_ranks(self, signum: int) -> None:
        """Signal every rank, all of them before any has had time to end."""
        self.reap()
        # Before another launcher has started its ranks there is only itself to be told.
        if self.lifeline is None or not self.lifeline.signal(signum):
            send_signal([p.pid for p in living_members(set(self.running))], signum)

    @property
    def is_running(self) -> bool:
        """Whether there is a rank, or somebody about to start one."""
        if self.lifeline is None:
            return bool(self.running)
        return bool(self.running or self.lifeline.names_running) and not self.lifeline.is_complete

    @property
    def is_short_of_ranks(self) -> bool:
        """Whether some ranks have ended while others still run."""
        return self.is_running and bool(self.ended)

    @property
    def names_running(self) -> str:
        names = self.lifeline.names_running if self.lifeline is not None else []
        return ", ".join(names or [child.command.name for child in self.running.values()])

    def reap(self) -> None:
        """Take note of ranks and children that have ended, and bury orphans that came to us."""
        if self.lifeline is not None:
            self.ended += sorted(map(self._reported, self.lifeline.poll()), key=lambda ended: ended.code <= 128)
        found = []
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            child = self.running.pop(pid, None)
            if child is not None:
                child.process.returncode = os.waitstatus_to_exitcode(status)
                # Once every rank has told its own end, that of the launcher in between says nothing more.
                if self.lifeline is None:
                    found.append(self._ended(child, child.process.returncode))
                elif not self.lifeline.is_complete:
                    found.append(self._left_ranks(child, child.process.returncode))
        # The kernel lists them in the order of their start. Of those that ended in one moment the one
        # that was killed is the cause, and an error exit beside it most likely the lost connection.
        self.ended += sorted(found, key=lambda ended: ended.code <= 128)

    def _receive(self, signum: signal.Signals) -> None:
        if signum == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                say("second SIGINT: ending all ranks at once")
                raise EndAtOnce
        hint = "; again to end at once" if signum == signal.SIGINT else ""
        say(f"{signum.name} passed on to all ranks, waiting for them to stop{hint}")
        self._passed_on.add(PASSED_ON[signum])
        self.signal_ranks(PASSED_ON[signum])

    def _reported(self, report: Report) -> Ended:
        if report.returncode is None:
            return Ended(report.name, EXIT_CLUSTER, report.reason)
        code = report.returncode if report.returncode >= 0 else 128 - report.returncode
        asked = -report.returncode in self._passed_on
        return Ended(report.name, code, in_words(report.returncode), report.quote, was_asked=asked)

    def _left_ranks(self, child: Child, returncode: int) -> Ended:
        ended = self._ended(child, returncode)
        if ended.is_failure:
            return ended
        words = f"{ended.words}, though not all of its ranks have come up and ended"
        return replace(ended, code=EXIT_STUCK, words=words)

    def _ended(self, child: Child, returncode: int) -> Ended:
        code = returncode if returncode >= 0 else 128 - returncode
        asked = -returncode in self._passed_on
        return Ended(child.command.name, code, in_words(returncode), log=child.log, was_asked=asked)


def in_words(returncode: int) -> str:
    """An exit status of subprocess, negative for a signal, for people."""
    if returncode >= 0:
        return f"exit status {returncode}"
    try:
        name = signal.Signals(-returncode).name
    except ValueError:
        name = "a signal"
    hint = "; if nobody did that, look for the out-of-memory killer in dmesg" if returncode == -9 else ""
    return f"killed by {name} ({-returncode}){hint}"


def _watch(launch: _Launch, grace_s: float) -> Ending:
    failure = _until_one_fails(launch, grace_s)
    if failure is not None and failure.log is not None and failure.code != EXIT_REQUEUE:
        failure = replace(failure, quote=Quote(str(failure.log.path), tuple(tail(failure.log))))
    if failure is not None and launch.is_running:
        say(f"{failure.name}: {failure.words}; ending the ranks that still run")
        _end_others(launch, grace_s)
    if launch.lifeline is not None:
        launch.lifeline.let_go()
        _until_gone(launch, FAREWELL_S if failure else grace_s)
    num_left_behind = _end_left_behind(launch, grace_s)
    # Without a failure all codes are 0 or 75, and one rank that asks for a requeue asks for all.
    code = failure.code if failure else max(ended.code for ended in launch.ended)
    return Ending(code, failure, num_left_behind)


def _until_one_fails(launch: _Launch, grace_s: float) -> Ended | None:
    """Wait for the first failure; None when all children have ended well."""
    deadline = math.inf
    while True:
        for ended in launch.ended:
            if ended.is_failure:
                return ended
        if not launch.is_running:
            return None
        if not launch.is_short_of_ranks:
            deadline = math.inf
        elif deadline == math.inf:
            deadline = time.monotonic() + grace_s
        if time.monotonic() >= deadline:
            return _left_early(launch, grace_s)
        launch.wait(deadline)


def _left_early(launch: _Launch, grace_s: float) -> Ended:
    others = launch.names_running
    first = launch.ended[0]
    words = f"{first.words}, and {grace_s:g} s later there still ran: {others}"
    # 75 says that all ranks had agreed on a published checkpoint: what hangs after that costs nothing.
    stopped = any(ended.code == EXIT_REQUEUE for ended in launch.ended)
    return replace(first, code=EXIT_REQUEUE if stopped else EXIT_STUCK, words=words)


def _end_others(launch: _Launch, grace_s: float) -> None:
    """SIGTERM to the ranks that still run, then SIGKILL to those that outlast the grace time."""
    launch.signal_ranks(signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while launch.is_running and time.monotonic() < deadline:
        launch.wait(deadline)
    if launch.is_running:
        say(f"SIGKILL after {grace_s:g} s of grace: {launch.names_running}")
        if launch.lifeline is not None:
            launch.lifeline.signal(signal.SIGKILL)
            launch.lifeline.let_go()
            _until_gone(launch, FAREWELL_S)
        kill_sessions(launch.sessions, timeout_s=KILL_TIMEOUT_S)
        launch.reap()


def _until_gone(launch: _Launch, timeout_s: float) -> None:
    """Wait for a launcher in between to leave, now that its ranks have."""
    deadline = time.monotonic() + timeout_s
    while launch.running and time.monotonic() < deadline:
        launch.wait(deadline)


def _end_left_behind(launch: _Launch, grace_s: float) -> int:
    """SIGTERM to members of the sessions that outlived their leaders; returns how many there were.

    The caller kills those that outlast the grace time.
    """
    _until_empty(launch, FAREWELL_S)
    left_behind = living_members(launch.sessions)
    send_signal([process.pid for process in left_behind], signal.SIGTERM)
    _until_empty(launch, grace_s)
    return len(left_behind)


def _until_empty(launch: _Launch, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while living_members(launch.sessions) and time.monotonic() < deadline:
        launch.wait(min(deadline, time.monotonic() + 0.05))


@contextmanager
def prepared() -> Iterator[Inherited]:
    """Hold back the signals we wait for, so that none is lost between two looks or two starts, and allow this process
    as many open files as it may have, one for each keeper; yields what was before.

    Signals still held at the end are dropped: the launch is over.
    """
    open_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # a hard limit above that of the system: then with what there is
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files[1], open_files[1]))
    # nohup, and `&` in a script, start us with a signal ignored; that wish is kept, here and in the ranks.
    heeded = {s for s in PASSED_ON if signal.getsignal(s) != signal.SIG_IGN}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, heeded | {signal.SIGCHLD})
    try:
        yield Inherited(frozenset(map(signal.Signals, before)), open_files)
    finally:
        while signal.sigtimedwait([*PASSED_ON, signal.SIGCHLD], 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, open_files)


def _start(command: Command, log_dir: Path, inherited: Inherited) -> Child:
    """Start one command as leader of a new session, so that a Ctrl-C reaches it through us alone, once."""
    log = None
    output: IO[bytes] | None = None
    if not command.to_terminal:
        try:
            log, output = open_log(log_dir, command.name)
        except OSError as error:
            raise LaunchError(f"--log-dir {log_dir}: {error.strerror}", exit_code=EXIT_CLUSTER) from error
    try:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
            preexec_fn=_before_exec(os.getpid(), inherited),
        )
    except OSError as error:
        raise LaunchError(f"cannot start {command.argv[0]}: {error.strerror}", exit_code=EXIT_CLUSTER) from error
    finally:
        if output:
            output.close()
    return Child(command, process, log)


def _before_exec(launcher: int, inherited: Inherited) -> Callable[[], None]:
    def prepare() -> None:
        die_with_parent(launcher)
        # Programs that close every descriptor there may be would be busy for minutes with a limit of 10**9.
        resource.setrlimit(resource.RLIMIT_NOFILE, inherited.open_files)
        signal.pthread_sigmask(signal.SIG_SETMASK, inherited.mask)

    return prepare
