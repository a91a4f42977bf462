"""The launcher's end of the lines to keepers, against keepers, strangers and silence on real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import pytest

from launcher import lifeline
from launcher.lifeline import Lifeline, Report
from launcher.logs import Quote


@pytest.fixture
def line() -> Iterator[Lifeline]:
    made = Lifeline(("127.0.0.1",), num_ranks=2)
    yield made
    made.close()


def say(line: Lifeline, *chunks: bytes) -> socket.socket:
    """A peer that has said this, and that the lifeline has heard."""
    peer = socket.create_connection((line.contact.addresses[0], line.contact.port))
    for chunk in chunks:
        peer.sendall(chunk)
        time.sleep(0.02)
        assert line.poll() == []
    return peer


def is_dropped(peer: socket.socket) -> bool:
    peer.settimeout(1)
    try:
        return peer.recv(1) == b""
    except ConnectionResetError:
        return True


def keeper(line: Lifeline, rank: int) -> socket.socket:
    return say(line, f"{line.contact.word} {rank} n{rank}\n".encode())


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
    assert is_dropped(say(line, said))
    assert line.names_running == ["rank 0 on n0"] and not line.is_complete
    ours.close()


def test_the_end_of_a_rank_is_told_once_with_its_last_words(line: Lifeline) -> None:
    first, second = keeper(line, 0), keeper(line, 1)
    quote = {"source": "n1:/logs/rank-1.log", "lines": ["so it ends ü"]}
    text = json.dumps({"returncode": -9, "quote": quote}).encode() + b"\n"
    second.sendall(text[:7])
    time.sleep(0.02)
    assert line.poll() == []
    second.sendall(text[7:])
    time.sleep(0.02)
    assert line.poll() == [Report("rank 1 on n1", -9, quote=Quote(quote["source"], ("so it ends ü",)))]
    second.close()
    first.close()
    time.sleep(0.02)
    (lost,) = line.poll()
    assert (lost.name, lost.returncode) == ("rank 0 on n0", None) and "gone without a word" in lost.reason
    assert line.is_complete


def test_a_keeper_that_comes_late_gets_the_signals_before_it(line: Lifeline) -> None:
    assert not line.signal(10)
    peer = keeper(line, 0)
    peer.settimeout(1)
    assert peer.recv(16) == b"10\n"


@pytest.mark.parametrize("may_queue", [False, True])
def test_ranks_that_do_not_come_are_missed_unless_the_job_may_be_queued(
    monkeypatch: pytest.MonkeyPatch, may_queue: bool
) -> None:
    monkeypatch.setattr(lifeline, "START_TIMEOUT_S", 0.1)
    line = Lifeline(("127.0.0.1",), num_ranks=2, may_queue=may_queue)
    time.sleep(0.15)
    assert bool(line.poll()) == (not may_queue)
    peer = socket.create_connection(("127.0.0.1", line.contact.port))
    peer.sendall(f"{line.contact.word} 0 n0\n".encode())
    time.sleep(0.05)
    assert line.poll() == []
    time.sleep(0.15)
    missed = line.poll()
    assert [report.reason.partition("(")[2] for report in missed] == (["here are: rank 0 on n0)"] if may_queue else [])
    line.close()
