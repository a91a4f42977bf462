"""A thread of every rank that tells the others how far it is, and ends the rank when the run cannot go on.

The ranks meet in the key-value store that rank 0 (or torchrun's agent) serves from native threads, over connections of
their own: a rank that hangs in a collective, is stopped or holds the interpreter's lock does not keep the others from
it. Nothing here enters a collective. Two things end a run: no rank has made progress for `timeout_s`, or a rank has
failed and says so. The first verdict counts; every rank reads it within a second or two, and leaves with its exit code.
"""

import faulthandler
import os
import random
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType, TracebackType
from typing import TypeVar

import torch.distributed as dist

from sft_dist.distributed.beats import Beat, Heard, Process, Verdict, find_slow, find_stuck, first_beside, hang
from sft_dist.distributed.exit_timer import ExitTimer
from sft_dist.distributed.world import World
from sft_dist.errors import ClusterError, ExitCode, RankFailed, exit_code_of, say

_INTERVAL_S = 1.0
_LOOKS_PER_BEAT = 5
_STORE_TIMEOUT_S = 5.0
_SILENT_BEATS = 4  # missing in a row: the rank does not speak any more
_WINDOW_S = 60.0  # over which the work of ranks is compared
_MIN_LOOKS = 20
_MAIN_LEAVES_S = 3.0  # what the main thread gets to notice by itself that another rank has failed
_LAST_WORDS_S = 1.0  # what the rank that writes the outcome gets before the others leave; rank 0 leaves last
_FRAMES = 12  # of the innermost ones, in which a wait would show
_PATIENCE_S = 1_800.0  # with ranks that come late, where no timeout is set
_VERDICT = "verdict"

T = TypeVar("T")
OnLeave = Callable[[int, str, Process | None], None]  # (exit code, reason, rank 0), on one rank, before any leaves


def connect(world: World, *, timeout_s: float = 0.0) -> dist.Store:
    """A connection of its own to the store of this run; rank 0 serves it, unless torchrun does.

    Raises ClusterError where there is none within `timeout_s` (0: half an hour).
    """
    timeout_s = timeout_s or _PATIENCE_S
    if world.size == 1:
        return dist.HashStore()
    serves = world.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    where = f"{world.master_addr}:{world.master_port}"
    try:
        store = dist.TCPStore(
            world.master_addr,
            world.master_port,
            is_master=serves,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,  # the process group finds the same server
        )
    except (RuntimeError, ValueError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ClusterError(
                f"port {world.master_port} of {world.master_addr} is in use by another process; "
                "choose another one (MASTER_PORT, or --master-port of the launcher)"
            ) from error
        raise ClusterError(
            f"rank {world.rank} of {world.size} does not reach rank 0 at {where} within {timeout_s:g} s: it has not "
            f"started or has already failed, or the address is wrong on this host ({_first_line(error)})"
        ) from error
    # Restarts in the same agent share its store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sft-dist/{attempt}", store)


class Mail:
    """The store, with an end to every wait: where its server is stopped, TCPStore waits for ever."""

    def __init__(self, store: dist.Store, *, timeout_s: float) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._is_free = threading.Lock()

    def ask(self, question: Callable[[dist.Store], T]) -> T:
        """What the store says. Raises StoreLost where nothing comes back in time; a later answer is dropped."""
        if not self._is_free.acquire(timeout=self._timeout_s):
            raise StoreLost("no answer")
        answers: SimpleQueue[T | RuntimeError] = SimpleQueue()

        def run() -> None:
            try:
                answers.put(question(self._store))
            except RuntimeError as error:
                answers.put(error)
            finally:
                self._is_free.release()

        threading.Thread(target=run, name="watchdog-mail", daemon=True).start()
        try:
            answer = answers.get(timeout=self._timeout_s)
        except Empty:
            raise StoreLost("no answer") from None
        if isinstance(answer, RuntimeError):
            raise StoreLost(_first_line(answer)) from answer
        return answer


class StoreLost(Exception):
    """Rank 0, or whoever serves the store, does not answer."""


class Watchdog:
    """Watches from its making until its context is left, or the process.

    `timeout_s`: without progress of any rank; 0: hangs are not looked for, failures of other ranks still are.
    `on_leave` writes the outcome where the watchdog ends the run; it is called on one rank.
    """

    def __init__(
        self,
        world: World,
        store: dist.Store,
        *,
        timeout_s: float,
        slow_ratio: float = 0.0,
        on_leave: OnLeave | None = None,
        window_s: float = _WINDOW_S,
    ) -> None:
        self._world = world
        self._timeout_s, self._slow_ratio, self._window_s = timeout_s, slow_ratio, window_s
        self._on_leave = on_leave
        self._patience_s = timeout_s or _PATIENCE_S
        self._interval_s = min(_INTERVAL_S, timeout_s / 10) if timeout_s else _INTERVAL_S
        self._process = _this_process()
        self._mark: tuple[str, int | None, int] = ("start", None, 0)
        self._num_beats = self._num_looks = self._num_waits = self._num_collectives = 0
        self._marked: tuple[str, int | None, int] = self._mark
        self._moved_at = self._beat_at = time.monotonic()
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._window: tuple[float, dict[int, Beat]] = (time.monotonic(), {})
        self._server: Process | None = None  # of rank 0
        self._leaving = threading.Lock()  # taken by the thread that ends the process
        self._main_leaves = False
        self._exit_timer: ExitTimer | None = None
        self._given: Verdict | None = None
        self._mail = Mail(store, timeout_s=min(_STORE_TIMEOUT_S, 5 * self._interval_s))
        with suppress(StoreLost):  # the thread will meet it again
            self._say_beat()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def enter(self, phase: str, step: int | None = None) -> None:
        """The main thread makes progress: a phase begins, of a step as people count them."""
        self._mark = (phase, step, self._mark[2] + 1)

    def move(self) -> None:
        """The main thread makes progress within its phase."""
        self._mark = (*self._mark[:2], self._mark[2] + 1)

    def meet(self, what: str) -> None:
        """Wait until every rank has come here. Raises ClusterError that names the missing ones after `patience_s`."""
        rank, size = self._world.rank, self._world.size
        keys = [f"met/{what}/{number}" for number in range(size)]
        deadline = time.monotonic() + self._patience_s

        def come(store: dist.Store) -> None:
            store.set(keys[rank], "")
            store.add(f"met/{what}", 1)

        try:
            self._mail.ask(come)
            while self._mail.ask(lambda store: store.add(f"met/{what}", 0)) < size:
                if time.monotonic() > deadline:
                    missing = self._mail.ask(lambda s: [str(n) for n in range(size) if not s.check([keys[n]])])
                    raise ClusterError(
                        f"{what}: rank(s) {', '.join(missing)} of {size} have not come within {self._patience_s:g} s; "
                        "look at what they said last, and at their hosts"
                    )
                time.sleep(self._interval_s / 20)
            self._server = next((beat.process for beat in self._beats([0])), None)
        except StoreLost as error:
            raise ClusterError(f"{what}: rank 0, or who else serves the store, is gone ({error})") from error

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The end of watching. With an error the others are told, or it is said whose error it really is."""
        told = None if error is None else self.told(error)
        self._take_over()
        if told is not error and told is not None:
            raise told from error

    def told(self, error: BaseException) -> BaseException:
        """Tell the others of an error of this rank. Returns the one to leave with: theirs, if it came first."""
        if is_lost_peer(error):
            verdict = self._why_lost(error)
            self._take_over()
        else:
            own = f"{type(error).__name__}: {error}"
            reason = f"rank {self._world.rank} (host {self._process.host}): {own}"
            self._take_over()
            verdict = self._give(Verdict("failure", exit_code_of(error), reason, writer=0))
            if verdict.reason.endswith(own):  # this one was first, or all have met the same
                if self._world.rank == 0 < self._world.size - 1:
                    time.sleep(2 * self._interval_s)  # the store goes with this process
                return error
        if verdict.writer == self._world.rank != 0:
            self._write_outcome(verdict)  # rank 0 cannot
        return RankFailed(verdict.reason, verdict.exit_code)

    def _take_over(self) -> None:
        """From here on the main thread leaves by itself, unless the watchdog has been faster: then this is the end."""
        if not self._main_leaves:
            self._leaving.acquire()
            self._main_leaves = True
            if self._exit_timer is not None:
                self._exit_timer.cancel()

    # What follows runs in the watchdog's thread, but for _why_lost and what that calls.

    def _run(self) -> None:
        if self._timeout_s and sys.platform == "linux":
            self._exit_timer = ExitTimer(
                stacks_s=self._timeout_s, end_s=self._timeout_s + _MAIN_LEAVES_S, exit_code=ExitCode.TRAINING
            )
        while not self._leaving.locked():
            if self._exit_timer is not None:
                self._exit_timer.postpone()
            for _ in range(_LOOKS_PER_BEAT):
                # Unequal pauses: steps of a fixed length are not to be looked at in the same place every time.
                time.sleep(self._interval_s / _LOOKS_PER_BEAT * random.uniform(0.5, 1.5))
                self._look()
            try:
                self._say_beat()
                verdict = self._verdict() or self._judge()
            except StoreLost as error:
                verdict = self._judge_without_store(error)
            if verdict is not None:
                self._obey(verdict)
        if self._exit_timer is not None:
            self._exit_timer.cancel()

    def _look(self) -> None:
        self._num_looks += 1
        self._num_waits += _is_in_collective(sys._current_frames().get(threading.main_thread().ident or 0))

    def _say_beat(self) -> None:
        now = time.monotonic()
        if now - self._beat_at > _SILENT_BEATS * self._interval_s + _STORE_TIMEOUT_S:
            # This process was stopped, and the others may have been with it: all begin to count anew.
            self._moved_at = now
            self._heard.clear()
        self._beat_at = now
        num_collectives = _num_collectives()
        if (self._mark, num_collectives) != (self._marked, self._num_collectives):
            self._marked, self._num_collectives, self._moved_at = self._mark, num_collectives, now
        self._num_beats += 1
        beat = self._beat()
        self._mail.ask(lambda store: store.set(f"beat/{beat.rank}", beat.to_json()))

    def _beat(self) -> Beat:
        return Beat(
            rank=self._world.rank,
            process=self._process,
            number=self._num_beats,
            phase=self._marked[0],
            step=self._marked[1],
            num_collectives=self._num_collectives,
            idle_s=self._idle_s,
            is_waiting=_is_in_collective(sys._current_frames().get(threading.main_thread().ident or 0)),
            num_looks=self._num_looks,
            num_waits=self._num_waits,
        )

    @property
    def _idle_s(self) -> float:
        return time.monotonic() - self._moved_at

    def _verdict(self) -> Verdict | None:
        if self._given is None:
            text = self._mail.ask(lambda store: store.get(_VERDICT) if store.check([_VERDICT]) else None)
            self._given = None if text is None else Verdict.from_json(text)
        return self._given

    def _judge(self) -> Verdict | None:
        """The verdict that is due by what this rank hears, given to all."""
        if self._world.is_main and self._slow_ratio and time.monotonic() - self._window[0] >= self._window_s:
            self._say_slow()
        # Nobody listens as long as all goes well: ranks that all read all others are many.
        if not self._timeout_s or self._idle_s < self._timeout_s / 2:
            return None
        heard = self._listen(self._heard)
        if self._idle_s < self._timeout_s + 2 * self._interval_s:
            return None
        silent_after_s = _SILENT_BEATS * self._interval_s
        stuck = find_stuck(heard, self._world.size, timeout_s=self._timeout_s, silent_after_s=silent_after_s)
        if not stuck:
            return None
        verdict = hang(stuck, self._world.size, timeout_s=self._timeout_s, exit_code=ExitCode.TRAINING)
        return self._give(verdict)

    def _listen(self, known: dict[int, tuple[Beat, float]]) -> list[Heard]:
        """The last beat of every rank that has ever spoken; `known` is what was heard before, and since when."""
        now = time.monotonic()
        for beat in self._beats(range(self._world.size)):
            last = known.get(beat.rank)
            if last is None or last[0].number != beat.number:
                known[beat.rank] = (beat, now)
        return [Heard(beat, now - since) for beat, since in known.values()]

    def _beats(self, ranks: Iterable[int]) -> list[Beat]:
        """The last beat of those of these ranks that have ever spoken."""
        keys = [f"beat/{rank}" for rank in ranks]

        def read(store: dist.Store) -> list[bytes]:
            known = keys if store.check(keys) else [key for key in keys if store.check([key])]
            return store.multi_get(known)

        return [Beat.from_json(text) for text in self._mail.ask(read)]

    def _judge_without_store(self, error: StoreLost) -> Verdict | None:
        if not self._timeout_s or self._idle_s < self._timeout_s:
            return None
        reason = (
            f"no progress for {self._idle_s:.0f} s (watchdog.timeout_s), in {self._marked[0]}; stuck: the process that "
            f"serves the store at {self._world.master_addr}:{self._world.master_port}, rank 0 (torchrun: its agent), "
            f"does not answer: it is stopped or gone ({error})"
        )
        silent = (self._server,) if self._server else ()
        return Verdict("hang", ExitCode.TRAINING, reason, first_beside({0}, self._world.size), silent)

    def _give(self, verdict: Verdict) -> Verdict:
        """Make it known, unless another one was first; returns the one that counts."""
        try:
            text = self._mail.ask(lambda store: store.compare_set(_VERDICT, "", verdict.to_json()))
            self._given = Verdict.from_json(text)
        except StoreLost:
            self._given = verdict
        return self._given

    def _why_lost(self, error: BaseException) -> Verdict:
        """Why a collective failed: the failure that another rank reports, or who has fallen silent."""
        known: dict[int, tuple[Beat, float]] = {}
        heard: list[Heard] = []
        started = time.monotonic()
        try:
            while time.monotonic() - started < _SILENT_BEATS * self._interval_s:
                if (verdict := self._verdict()) is not None:
                    return verdict
                heard = self._listen(known)
                time.sleep(self._interval_s / 2)
        except StoreLost:
            reason = "another rank is gone: rank 0, or who else served the store"
            return Verdict("failure", ExitCode.CLUSTER, reason, writer=min(1, self._world.size - 1))
        gone = [one.beat for one in heard if one.silent_s >= (_SILENT_BEATS - 2) * self._interval_s]
        names = "; ".join(
            f"rank {beat.rank} (host {beat.process.host}, process {beat.process.pid}), last seen in {beat.where}"
            for beat in gone
        )
        reason = f"another rank is gone: {names}" if gone else f"a connection is lost: {_first_line(error)}"
        writer = first_beside({beat.rank for beat in gone}, self._world.size)
        return self._give(Verdict("failure", ExitCode.CLUSTER, reason, writer))

    def _say_slow(self) -> None:
        now = {beat.rank: beat for beat in self._beats(range(self._world.size))}
        for rank, ratio in find_slow(self._window[1], now, ratio=self._slow_ratio, min_looks=_MIN_LOOKS):
            beat = now[rank]
            say(
                f"slow: rank {rank} (host {beat.process.host}, process {beat.process.pid}) works {ratio:.1f} times as "
                f"long as a typical other rank, and these wait for it; it was last seen in {beat.where}"
            )
        self._window = (time.monotonic(), now)

    def _write_outcome(self, verdict: Verdict) -> None:
        if self._on_leave is not None:
            with suppress(Exception):  # of a disk, say: leaving is more important
                self._on_leave(verdict.exit_code, verdict.reason, self._server)

    def _obey(self, verdict: Verdict) -> None:
        """Leave, unless the main thread does."""
        rank = self._world.rank
        if verdict.kind == "failure":
            if not self._leaving.acquire(timeout=_MAIN_LEAVES_S):
                return
        elif not self._leaving.acquire(blocking=False):
            return
        say(f"{'' if rank == 0 else f'[rank {rank}] '}{verdict.reason}")
        if verdict.kind == "hang":
            say(f"[rank {rank}] in {self._beat().where}; the stacks of its threads:")
            with suppress(OSError, ValueError):
                faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        if verdict.writer == rank:
            self._write_outcome(verdict)
        if rank == 0 < self._world.size - 1:
            time.sleep(_LAST_WORDS_S + 2 * self._interval_s)  # the store goes with this process
        elif verdict.writer != rank:
            time.sleep(_LAST_WORDS_S)
        for process in verdict.silent:
            _end(process, self._process)
        with suppress(OSError):
            sys.stderr.flush()
        os._exit(verdict.exit_code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective has failed because the process at its other end is no more."""
    return isinstance(error, RuntimeError) and bool(
        re.search("(?i)closed by peer|connection reset|broken pipe|remote process exited", str(error))
    )


def _num_collectives() -> int:
    """Entered by this rank, on whatever device: every backend of the process group counts its own."""
    if not dist.is_initialized():
        return 0
    group = dist.group.WORLD
    assert group is not None
    total = 0
    for backend in {id(b): b for b in (group._get_backend(device) for device in group._device_types)}.values():
        with suppress(RuntimeError):  # a backend that does not count
            total += backend._get_sequence_number_for_group()  # type: ignore[attr-defined]
    return total


def _is_in_collective(frame: FrameType | None) -> bool:
    """Whether a thread that is in this frame waits for other ranks, as far as Python can see."""
    for _ in range(_FRAMES):
        if frame is None:
            return False
        file = frame.f_code.co_filename.replace(os.sep, "/")
        if "/torch/distributed/distributed_c10d" in file or "/deepspeed/comm/" in file:
            return True
        if "/deepspeed/" in file and frame.f_code.co_name == "wait":
            return True
        frame = frame.f_back
    return False


def _this_process() -> Process:
    pid = os.getpid()
    namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return Process(socket.gethostname(), pid, namespace, _born(pid) or 0)


def _born(pid: int) -> int | None:
    """Start of a process, in clock ticks after the boot (proc(5), field 22 of stat; the name may hold anything)."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def _end(process: Process, own: Process) -> None:
    """SIGKILL to a rank that cannot leave by itself, where it is certain that this number is its process."""
    is_here = process.namespace == own.namespace != "" and process.pid != own.pid
    if is_here and _born(process.pid) == process.born:
        with suppress(OSError):
            os.kill(process.pid, signal.SIGKILL)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
