"""One run per folder: who is alive is never robbed, who is dead blocks nobody, and both are told by name."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from sft_dist.errors import ClusterError, StorageError
from sft_dist.train import lock
from sft_dist.train.lock import Holder, RunLock, this_process
from tests.helpers.worlds import ROOT

ELSEWHERE = replace(this_process(), host="node7", pid=4711, boot="another", namespace="another")

HOLD = """
import sys, time
from pathlib import Path
from sft_dist.train.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


def hold(run_dir: Path, *, me: Holder | None = None, heartbeat_s: float = 5.0, stale_after_s: float = 60.0) -> RunLock:
    taken = RunLock(run_dir, me=me, heartbeat_s=heartbeat_s, stale_after_s=stale_after_s)
    taken.take()
    return taken


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a mount that does not know it."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def holder(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def note(run_dir: Path, holder: Holder) -> None:
    (run_dir / "run.lock.json").write_text(json.dumps(asdict(holder)))


def test_the_second_of_two_is_refused_by_the_name_of_the_first(tmp_path: Path, holder: "subprocess.Popen[str]") -> None:
    with pytest.raises(ClusterError, match=f"in use by another run .*process {holder.pid}"):
        hold(tmp_path)
    assert ClusterError.exit_code == 69


def test_a_killed_holder_blocks_nobody(
    tmp_path: Path, holder: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    started = time.monotonic()
    taken = hold(tmp_path)
    assert time.monotonic() - started < 30, "it would listen for 60 s"
    assert f"process {holder.pid}" in (said := capsys.readouterr().err) and "its process is gone: taken over" in said
    lock.check_held(tmp_path)
    taken.release()
    assert not (tmp_path / "run.lock.json").exists()
    hold(tmp_path).release()
    assert capsys.readouterr().err == "", "what was released is not taken over"


@pytest.mark.usefixtures("no_flock")
def test_without_flock_a_living_process_of_this_machine_is_found_by_its_number(
    tmp_path: Path, holder: "subprocess.Popen[str]", capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ClusterError, match=f"process {holder.pid}"):
        hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.5)
    holder.kill()
    holder.wait()
    hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.5).release()
    assert "its process is gone: taken over" in capsys.readouterr().err


@pytest.mark.usefixtures("no_flock")
def test_a_number_that_another_process_has_now_is_no_sign_of_life(tmp_path: Path) -> None:
    note(tmp_path, replace(this_process(), started=this_process().started - 1))
    hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.5).release()


def test_a_heart_that_beats_on_another_machine_is_left_alone(tmp_path: Path) -> None:
    """flock is granted, as where a file system keeps it to one machine; clocks of the machines play no part."""
    note(tmp_path, ELSEWHERE)
    stopped = threading.Event()

    def beat() -> None:
        hour_ago = time.time() - 3_600
        while not stopped.wait(0.1):
            hour_ago += 0.1
            os.utime(tmp_path / "run.lock.json", (hour_ago, hour_ago))

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(ClusterError, match="host node7, process 4711"):
            hold(tmp_path, heartbeat_s=0.05, stale_after_s=5.0)
    finally:
        stopped.set()
        heart.join()


def test_a_heart_that_has_stopped_is_taken_over_after_listening(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    note(tmp_path, ELSEWHERE)
    started = time.monotonic()
    hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.5).release()
    assert time.monotonic() - started >= 0.5
    said = capsys.readouterr().err
    assert "host node7, process 4711" in said and "no sign" in said and "taken over" in said


@pytest.mark.parametrize(("restart", "waits"), [(1, False), (0, True)])
def test_a_slurm_job_that_was_started_again_needs_no_waiting(tmp_path: Path, restart: int, waits: bool) -> None:
    note(tmp_path, replace(ELSEWHERE, job="17", restart=0))
    me = replace(this_process(), job="17", restart=restart)
    started = time.monotonic()
    hold(tmp_path, me=me, heartbeat_s=0.05, stale_after_s=3.0).release()
    assert (time.monotonic() - started > 3.0) == waits


def test_a_note_that_cannot_be_read_now_and_then_does_not_stop_the_heart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = hold(tmp_path, heartbeat_s=0.02)
    note_path = tmp_path / "run.lock.json"
    read_text, failures = Path.read_text, []

    def fails(path: Path, *values: Any, **options: Any) -> str:
        if path == note_path and len(failures) < 3:
            failures.append(path)
            raise OSError(errno.EIO, "Input/output error")
        return read_text(path, *values, **options)

    monkeypatch.setattr(Path, "read_text", fails)
    deadline = time.monotonic() + 30
    while len(failures) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.utime(note_path, (0, 0))
    while note_path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert note_path.stat().st_mtime > 0
    taken.release()


def test_without_hard_links_half_a_note_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    hold(tmp_path).release()
    monkeypatch.setattr("builtins.open", partial(full_disk, open))
    with pytest.raises(StorageError, match="No space left"):
        hold(tmp_path)
    assert not (tmp_path / "run.lock.json").exists()


def full_disk(opens: Any, path: Any, mode: str = "r", **options: Any) -> Any:
    """`open`, for a disk on which nothing new can be written under its final name."""
    file = opens(path, mode, **options)
    if mode != "x":
        return file
    broken = mock.MagicMock(wraps=file)
    broken.__enter__.return_value.write.side_effect = OSError(errno.ENOSPC, "No space left on device")
    broken.__exit__.side_effect = lambda *_: file.close()
    return broken


@pytest.mark.usefixtures("no_flock")
def test_of_many_that_find_a_stale_note_at_once_exactly_one_takes_over(tmp_path: Path) -> None:
    """No flock, so nothing but the note decides; a few rounds, since it is about moments."""
    for number in range(5):
        run_dir = tmp_path / str(number)
        run_dir.mkdir()
        note(run_dir, replace(ELSEWHERE, job="17"))
        locks: list[RunLock] = []
        refused: list[str] = []

        def take(
            host: int, run_dir: Path = run_dir, locks: list[RunLock] = locks, refused: list[str] = refused
        ) -> None:
            me = replace(ELSEWHERE, host=f"node{host}", boot=f"boot{host}", job="17", restart=1)
            try:
                locks.append(hold(run_dir, me=me, heartbeat_s=0.3, stale_after_s=1.0))
            except ClusterError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take, args=(host,)) for host in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(locks), len(refused)) == (1, 3)
        assert all("in use by another run (host node" in text for text in refused)
        locks[0].release()


def test_a_holder_that_was_robbed_in_its_sleep_publishes_nothing(tmp_path: Path) -> None:
    held = hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.5)
    lock.check_held(tmp_path)
    note(tmp_path, ELSEWHERE)
    with pytest.raises(ClusterError, match="was taken over by host node7, process 4711"):
        lock.check_held(tmp_path)
    time.sleep(0.2)
    held.release()
    assert json.loads((tmp_path / "run.lock.json").read_text())["host"] == "node7", "the other one's note stays"


def test_the_heart_beats_while_it_is_held(tmp_path: Path) -> None:
    held = hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.5)
    first = (tmp_path / "run.lock.json").stat().st_mtime_ns
    time.sleep(0.3)
    assert (tmp_path / "run.lock.json").stat().st_mtime_ns > first
    held.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": "a"}', "5"])
def test_a_note_that_cannot_be_read_is_listened_to_as_well(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.lock.json").write_text(text)
    hold(tmp_path, heartbeat_s=0.05, stale_after_s=0.3).release()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        hold(tmp_path / "file" / "run")
