"""The launcher's end of the lines to keepers, against keepers, strangers and silence on real sockets."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from launcher import lifeline
from launcher.lifeline import Lifeline, Report
from launcher.logs import Quote

TIMEOUT_S = 30.0


@pytest.fixture
def line() -> Iterator[Lifeline]:
    made = Lifeline(("127.0.0.1",), num_ranks=2)
    yield made
    made.close()


class Clock:
    """Stands in for the time that the lifeline reads, and passes when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_000.0
        monkeypatch.setattr(lifeline, "time", SimpleNamespace(monotonic=lambda: self.now_s))


def until(line: Lifeline, condition: Callable[[list[Report]], bool]) -> list[Report]:
    """Look until `condition` holds for what has been reported since; returns that."""
    deadline = time.monotonic() + TIMEOUT_S
    reports = line.poll()
    while not condition(reports):
        assert time.monotonic() < deadline, f"still {line.names_running}, told {reports}"
        time.sleep(0.01)
        reports += line.poll()
    return reports


def say(line: Lifeline, said: bytes) -> socket.socket:
    """A peer that has said this."""
    peer = socket.create_connection((line.contact.addresses[0], line.contact.port))
    peer.settimeout(TIMEOUT_S)
    peer.sendall(said)
    return peer


def drops(line: Lifeline, peer: socket.socket) -> bool:
    """Whether the lifeline, by now, has hung up on `peer`; it tells nothing meanwhile."""
    peer.setblocking(False)

    def is_dropped(_: list[Report]) -> bool:
        try:
            return peer.recv(1) == b""
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    return until(line, is_dropped) == []


def keeper(line: Lifeline, rank: int) -> socket.socket:
    peer = say(line, f"{line.contact.word} {rank} n{rank}\n".encode())
    assert until(line, lambda _: f"rank {rank} on n{rank}" in line.names_running) == []
    return peer


@contextmanager
def descriptors_left(number: int) -> Iterator[None]:
    """In here no more than `number` files can be opened."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + number, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\n\n\n",
        "wört 0 n0\n".encode(),
        b"\xff\xfe 0 n0\nmore\n",
        b"word 0 n0\n" + json.dumps({"returncode": 0, "quote": None}).encode() + b"\n",
        b"x" * 5_000,
    ],
)
def test_a_stranger_is_dropped_and_changes_nothing(line: Lifeline, said: bytes) -> None:
    ours = keeper(line, 0)
    assert drops(line, say(line, said))
    assert line.names_running == ["rank 0 on n0"] and not line.is_complete
    ours.close()


def test_the_end_of_a_rank_is_told_once_with_its_last_words(line: Lifeline) -> None:
    first, second = keeper(line, 0), keeper(line, 1)
    quote = {"source": "n1:/logs/rank-1.log", "lines": ["so it ends ü"]}
    text = json.dumps({"returncode": -9, "quote": quote}).encode() + b"\n"
    second.sendall(text[:7])
    assert line.poll() == []
    second.sendall(text[7:])
    assert until(line, bool) == [Report("rank 1 on n1", -9, quote=Quote(quote["source"], ("so it ends ü",)))]
    second.close()
    first.close()
    (lost,) = until(line, bool)
    assert (lost.name, lost.returncode) == ("rank 0 on n0", None) and "gone without a word" in lost.reason
    assert line.is_complete


def test_a_keeper_that_comes_late_gets_the_signals_before_it(line: Lifeline) -> None:
    assert not line.signal(10)
    assert keeper(line, 0).recv(16) == b"10\n"


@pytest.mark.parametrize("may_queue", [False, True])
def test_ranks_that_do_not_come_are_missed_unless_the_job_may_be_queued(
    monkeypatch: pytest.MonkeyPatch, may_queue: bool
) -> None:
    clock = Clock(monkeypatch)
    line = Lifeline(("127.0.0.1",), num_ranks=2, may_queue=may_queue)
    clock.now_s += lifeline.START_TIMEOUT_S + 1
    assert bool(line.poll()) == (not may_queue)
    peer = keeper(line, 0)
    clock.now_s += lifeline.START_TIMEOUT_S - 1
    assert line.poll() == []
    clock.now_s += 2
    missed = line.poll()
    assert [report.reason.partition("(")[2] for report in missed] == (["here are: rank 0 on n0)"] if may_queue else [])
    peer.close()
    line.close()


@pytest.mark.timeout(45)
def test_strangers_that_take_all_descriptors_lose_them_to_a_keeper(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    line = Lifeline(("127.0.0.1",), num_ranks=8)
    strangers = [say(line, b"") for _ in range(6)]
    late = say(line, f"{line.contact.word} 0 n0\n".encode())
    with descriptors_left(4):
        assert line.poll() == [] and line.names_running == []
        clock.now_s += lifeline.FIRST_LINE_TIMEOUT_S + 1
        assert until(line, lambda _: line.names_running == ["rank 0 on n0"]) == []
    assert all(drops(line, stranger) for stranger in strangers[:4])
    # Only the first line is waited for so shortly: not the end of the rank, and not the launcher's leave to go.
    clock.now_s += lifeline.FIRST_LINE_TIMEOUT_S + 1
    assert line.poll() == []
    late.sendall(b'{"returncode": 0, "quote": null}\n')
    assert until(line, bool) == [Report("rank 0 on n0", 0)]
    clock.now_s += lifeline.FIRST_LINE_TIMEOUT_S + 1
    assert line.poll() == []
    line.let_go()
    assert late.recv(16) == b"leave\n"
    line.close()


@pytest.mark.timeout(45)
def test_ranks_for_which_there_are_no_descriptors_are_missed_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    line = Lifeline(("127.0.0.1",), num_ranks=8)
    peers = [say(line, f"{line.contact.word} {rank} n0\n".encode()) for rank in range(8)]
    with descriptors_left(4):
        assert until(line, lambda _: len(line.names_running) == 4) == []
        clock.now_s += lifeline.START_TIMEOUT_S + 1
        (missed,) = line.poll()
    assert "more have come, but cannot be let in: Too many open files" in missed.reason
    assert until(line, lambda _: len(line.names_running) == 8) == []
    for peer in peers:
        peer.close()
    line.close()


@pytest.mark.parametrize(
    "said",
    [
        b"ended 0",
        b"\xff",
        b"{}",
        b"[0]",
        b'{"returncode": 0}',
        b'{"returncode": "0", "quote": null}',
        b'{"returncode": null, "quote": null}',
        b'{"returncode": 1, "quote": {"source": "n1:/log", "lines": 3}}',
    ],
)
def test_a_keeper_that_is_not_understood_is_lost_and_the_others_stay(line: Lifeline, said: bytes) -> None:
    first, second = keeper(line, 0), keeper(line, 1)
    second.sendall(said + b"\nand more\n")
    (lost,) = until(line, bool)
    assert (lost.name, lost.returncode) == ("rank 1 on n1", None)
    assert "which is not understood" in lost.reason and said[:5].decode(errors="replace") in lost.reason
    assert drops(line, second), "it ends its rank"
    first.sendall(b'{"returncode": 75, "quote": null}\n')
    assert until(line, bool) == [Report("rank 0 on n0", 75)]
    assert line.is_complete
