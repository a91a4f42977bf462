"""One run per run folder: a lock of the operating system, and a note of its holder with a heartbeat.

    RUN_DIR/run.lock         locked (flock) as long as the process lives; decides between processes of one machine
    RUN_DIR/run.lock.json    who holds the folder; its time of modification is set anew every few seconds

flock vanishes with its process, so between processes of one machine there is no stale lock. A shared file system may
not know it, or keep it to one machine: then the note decides. Its holder is gone if it was a process of this machine
that is no longer there, if its Slurm job has been started again since, or if its heart has stopped beating; the
heart is watched, not compared with a clock: clocks of two machines differ.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sft_dist.errors import ClusterError, StorageError, say
from sft_dist.train.files import write_json

_LOCK, _NOTE = "run.lock", "run.lock.json"
_NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, so that another one on the same or another machine can tell whether it is still there."""

    host: str
    pid: int
    boot: str  # of its machine's kernel: another one after every start
    namespace: str  # in which `pid` counts: containers of one machine have their own
    started: int  # clock ticks from the boot to the start of the process: numbers of processes return
    job: str | None = None  # of Slurm
    restart: int = 0  # how often Slurm has started the job again

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}" + (f", Slurm job {self.job}" if self.job else "")


def this_process(env: Mapping[str, str] = os.environ) -> Holder:
    return Holder(
        socket.gethostname(),
        os.getpid(),
        Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        os.readlink("/proc/self/ns/pid"),
        _started(os.getpid()) or 0,
        env.get("SLURM_JOB_ID"),
        int(env.get("SLURM_RESTART_COUNT") or 0),
    )


class RunLock:
    """Held from `take` to `release`."""

    def __init__(
        self, run_dir: Path, *, me: Holder | None = None, heartbeat_s: float = 5.0, stale_after_s: float = 60.0
    ) -> None:
        self.run_dir = run_dir
        self._me = me or this_process()
        self._heartbeat_s, self._stale_after_s = heartbeat_s, stale_after_s
        self._released = threading.Event()
        self._is_taken = False

    def take(self) -> None:
        """Raises ClusterError naming the other holder, StorageError for the disk."""
        try:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.run_dir / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            self._has_flock = self._flock()
            self._take_note()
        except OSError as error:
            raise StorageError(f"run_dir: {self.run_dir} cannot be written: {error.strerror or error}") from error
        self._is_taken = True
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()

    @property
    def was_taken(self) -> bool:
        """Whether this process took the folder: from the very moment that others can see its note."""
        return self._is_taken or self._is_noted

    @property
    def _is_noted(self) -> bool:
        return _read(self.run_dir) == self._me

    def release(self) -> None:
        self._released.set()
        if self._is_noted:
            with suppress(OSError):
                (self.run_dir / _NOTE).unlink(missing_ok=True)
        os.close(self._file)

    def _flock(self) -> bool:
        """Whether the operating system has locked the file for us; False where it cannot."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise self._refusal(_read(self.run_dir)) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            return False
        return True

    def _take_note(self) -> None:
        note = self.run_dir / _NOTE
        try:
            self._make(note)
            return
        except FileExistsError:
            before = _read(self.run_dir)
            if before == self._me:
                return  # a network file system asked its server twice, and the second answer came
        gone = self._why_gone(before)
        if gone is None:
            os.close(self._file)
            raise self._refusal(before)
        say(f"run_dir: {self.run_dir} was held by {before or 'an unknown process'}; {gone}: taken over")
        write_json(note, asdict(self._me), writer=f".{self._me.host}-{self._me.pid}")
        if self._has_flock and before is not None and before.boot == self._me.boot:
            return  # whoever else finds it stale on this machine stands before flock
        # Another one may have found it stale at the same moment: of two notes, the later one stays.
        time.sleep(self._heartbeat_s)
        if (now := _read(self.run_dir)) != self._me:
            os.close(self._file)
            raise self._refusal(now)

    def _make(self, note: Path) -> None:
        """The note, whole from the first moment; of two that find none, one makes it and one gets FileExistsError."""
        draft = note.with_name(f"{note.name}.{self._me.host}-{self._me.pid}")
        try:
            write_json(draft, asdict(self._me))
            os.link(draft, note)
        except FileExistsError:
            raise
        except OSError:  # no hard links here, or a fault that is met again
            text = draft.read_text()
            with open(note, "x") as file:
                try:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())  # a network file system may tell only now that it has no room
                except BaseException:
                    note.unlink()  # half a note is nobody's, and others would listen for its holder
                    raise
        finally:
            draft.unlink(missing_ok=True)

    def _why_gone(self, holder: Holder | None) -> str | None:
        """Why the holder cannot be running any more, or None when it is."""
        me = self._me
        if holder is not None and holder.boot == me.boot and self._has_flock:
            return "its process is gone"
        if holder is not None and (holder.boot, holder.namespace) == (me.boot, me.namespace):
            return None if _started(holder.pid) == holder.started else "its process is gone"
        if holder is not None and holder.job is not None and holder.job == me.job and holder.restart < me.restart:
            return "its job has been started again"
        return self._why_silent(holder)

    def _why_silent(self, holder: Holder | None) -> str | None:
        say(f"run_dir: {self.run_dir} is noted as held by {holder or 'an unknown process'}: listening for it")
        first = _beat_of(self.run_dir)
        deadline = time.monotonic() + self._stale_after_s
        while time.monotonic() < deadline:
            time.sleep(self._heartbeat_s / 5)
            if _beat_of(self.run_dir) != first:
                return None
        return f"it has given no sign for {self._stale_after_s:.0f} s"

    def _beat(self) -> None:
        while not self._released.wait(self._heartbeat_s):
            # A file system that fails now and then must not stop the heart.
            with suppress(OSError):
                holder = _read(self.run_dir)
                if holder is not None and holder != self._me:
                    return  # `check_held` tells it before anything is published
                os.utime(self.run_dir / _NOTE)

    def _refusal(self, holder: Holder | None) -> ClusterError:
        return ClusterError(f"run_dir: {self.run_dir} is in use by another run ({holder or 'unknown'})")


def check_held(run_dir: Path, by: tuple[str, int] | None = None) -> None:
    """Raise ClusterError when another run has taken the folder over: one that was asleep must not write to it.

    `by`: host and number of the process that held it, of other ranks rank 0's; None: this one.
    """
    holder = _read(run_dir)
    if holder is not None and (holder.host, holder.pid) != (by or (socket.gethostname(), os.getpid())):
        raise ClusterError(f"run_dir: {run_dir} was taken over by {holder}, since this run gave no sign of life")


def _read(run_dir: Path) -> Holder | None:
    """Who is noted; None where there is no note, or none that can be read."""
    try:
        return Holder(**json.loads((run_dir / _NOTE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _beat_of(run_dir: Path) -> tuple[int, int] | None:
    """What changes with every heartbeat. The file is opened: a network file system then asks its server."""
    try:
        with open(run_dir / _NOTE) as file:
            status = os.fstat(file.fileno())
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _started(pid: int) -> int | None:
    """Field 22 of /proc/PID/stat, see proc(5); None without such a process, or when it has ended and lingers."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
