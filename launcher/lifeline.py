"""The launcher's end of the lines to its keepers (keeper.py): who has come, who has ended how, and signals to all of
them at once. Asked in the supervisor's loop; it starts no thread and waits for nothing."""

from __future__ import annotations

import json
import math
import secrets
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass

from launcher.keeper import LOST_AFTER_S, watch_peer
from launcher.logs import Quote
from launcher.parcel import Contact

# From the start of the launch until the last rank's keeper has come: loading Python from a busy file system is slow.
START_TIMEOUT_S = 600.0
MAX_FIRST_LINE_BYTES = 1_024
FIRST_LINE_TIMEOUT_S = LOST_AFTER_S  # a keeper of ours sends it at once; its network may be slow


@dataclass
class _Line:
    """The connection to one keeper. It has a rank while that runs: from its first line, which shows it to be ours."""

    connection: socket.socket
    deadline: float  # of that first line
    rank: int | None = None
    host: str = ""
    received: bytes = b""


@dataclass(frozen=True)
class Report:
    """How a rank ended: its returncode as subprocess has it, or None and a reason (its keeper was lost, say)."""

    name: str
    returncode: int | None
    reason: str = ""
    quote: Quote | None = None


class Lifeline:
    """Lines to `num_ranks` keepers, which come to one of `addresses`.

    `may_queue`: nobody knows when the first comes; the others are awaited from then on.
    """

    def __init__(self, addresses: tuple[str, ...], *, num_ranks: int, may_queue: bool = False) -> None:
        family = socket.AF_INET6 if any(":" in address for address in addresses) else socket.AF_INET
        dual = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        # On one host nobody else needs to get through.
        where = addresses[0] if addresses == ("127.0.0.1",) else ""
        self._listener = socket.create_server((where, 0), family=family, dualstack_ipv6=dual, backlog=num_ranks)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()  # of the connections
        self._lines: list[_Line] = []  # of ranks that run
        self._signals: list[int] = []
        self._num_ranks = num_ranks
        self._num_ended = 0
        self._refusal = ""  # why those that wait were not let in at the last look
        self._deadline = math.inf if may_queue else time.monotonic() + START_TIMEOUT_S
        self.contact = Contact(
            addresses=addresses, port=self._listener.getsockname()[1], word=secrets.token_urlsafe(12)
        )

    @property
    def is_complete(self) -> bool:
        """Whether every rank has come and has ended."""
        return self._num_ended >= self._num_ranks

    @property
    def names_running(self) -> list[str]:
        return [_name(line) for line in self._lines]

    def poll(self) -> list[Report]:
        """What has come since the last look."""
        reports: list[Report] = []
        self._accept()
        # Until nothing is left: a rank that is up must be known before the next signal is passed on.
        while ready := self._selector.select(0):
            for key, _ in ready:
                reports += self._read(key.data)
        now_s = time.monotonic()
        for line in self._connected():
            if now_s > line.deadline:
                self._drop(line)
        if now_s > self._deadline and self._num_ended + len(self._lines) < self._num_ranks:
            self._deadline = math.nan
            came = ", ".join(sorted(self.names_running)) or "none"
            reason = f"not all of {self._num_ranks} ranks have come up within {START_TIMEOUT_S:g} s (here are: {came})"
            if self._refusal:
                reason += f"; more have come, but cannot be let in: {self._refusal} (ulimit -Hn)"
            reports.append(Report("the launch", None, reason))
        return reports

    def signal(self, signum: int) -> bool:
        """Signal every rank that runs; False when there is none."""
        self._signals.append(int(signum))
        for line in self._lines:
            self._send(line, f"{int(signum)}\n")
        return bool(self._lines)

    def let_go(self) -> None:
        """Let the keepers leave; ranks that still run are killed by them."""
        for line in self._connected():
            self._send(line, "leave\n")

    def close(self) -> None:
        """Keepers that are still there take this for the end of the launcher, and end their ranks."""
        for line in self._connected():
            line.connection.close()
        self._listener.close()
        self._selector.close()

    def _connected(self) -> list[_Line]:
        return [key.data for key in self._selector.get_map().values()]

    def _accept(self) -> None:
        """Let in all who wait; where no descriptor is left, they wait for the next look."""
        self._refusal = ""
        while True:
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._refusal = error.strerror or str(error)
                return
            connection.setblocking(False)
            with suppress(OSError):  # it is gone again: seen when reading
                watch_peer(connection)
            line = _Line(connection, time.monotonic() + FIRST_LINE_TIMEOUT_S)
            self._selector.register(connection, selectors.EVENT_READ, line)

    def _read(self, line: _Line) -> list[Report]:
        try:
            chunk = line.connection.recv(4096)
        except BlockingIOError:
            return []
        except OSError as error:
            return self._lost(line, f"its host has not answered for {LOST_AFTER_S} s ({error.strerror})")
        if not chunk:
            return self._lost(line, "its keeper is gone without a word: it was killed, or its host was")
        *texts, line.received = (line.received + chunk).split(b"\n")
        reports = []
        for text in texts:
            if line.rank is not None:
                try:
                    reports.append(self._ended(line, text))
                except ValueError:
                    said = text[:80].decode(errors="replace")
                    reason = (
                        f"its keeper said {said!r}, which is not understood; is its host's sft-dist another version?"
                    )
                    return reports + self._lost(line, reason)
            elif not self._introduced(line, text):
                self._drop(line)
                return reports
        if line.rank is None and len(line.received) > MAX_FIRST_LINE_BYTES:
            self._drop(line)
        return reports

    def _introduced(self, line: _Line, text: bytes) -> bool:
        """Whether a first line is that of a keeper of ours, which then has its rank."""
        words = text.split()
        if len(words) != 3 or not secrets.compare_digest(words[0], self.contact.word.encode()):
            return False
        line.rank, line.host = int(words[1]) if words[1].isdigit() else -1, words[2].decode(errors="replace")
        self._lines.append(line)
        line.deadline = math.inf
        if self._deadline == math.inf:
            self._deadline = time.monotonic() + START_TIMEOUT_S
        for signum in self._signals:  # that came before it
            self._send(line, f"{signum}\n")
        return True

    def _ended(self, line: _Line, text: bytes) -> Report:
        report = parse_end(_name(line), text)
        self._lines.remove(line)
        self._num_ended += 1
        line.rank = None
        return report

    def _lost(self, line: _Line, reason: str) -> list[Report]:
        self._drop(line)
        if line.rank is None:
            return []  # it had ended, or was none of ours
        self._lines.remove(line)
        self._num_ended += 1
        return [Report(_name(line), None, reason)]

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.connection)
        line.connection.close()

    def _send(self, line: _Line, text: str) -> None:
        with suppress(OSError):  # seen when reading
            line.connection.sendall(text.encode())


def parse_end(name: str, text: bytes) -> Report:
    """The line in which a keeper tells how its rank `name` ended. Raises ValueError where it is none."""
    match json.loads(text):
        case {"returncode": int(returncode), "quote": None}:
            return Report(name, returncode)
        case {"returncode": int(returncode), "quote": {"source": str(source), "lines": [*lines]}}:
            return Report(name, returncode, quote=Quote(source, tuple(map(str, lines))))
        case {"returncode": None, "reason": str(reason)}:
            return Report(name, None, reason)
    raise ValueError("no end of a rank")


def _name(line: _Line) -> str:
    return f"rank {line.rank} on {line.host}"
