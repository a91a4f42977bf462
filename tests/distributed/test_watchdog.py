"""Ranks that are stopped, hang, fail, die, come late or are slow: who is named, and with which code all of them leave.

Real processes, real signals, a real gloo group and a real store; only the steps compute nothing.
"""

import json
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.worlds import run_ranks

pytestmark = pytest.mark.slow
TIMEOUT_S = 8.0


@dataclass(frozen=True)
class Ended:
    codes: list[int]
    said: list[str]
    outcome: dict[str, Any] | None
    seconds: float  # from the last step of any rank to the end of the last one


def world(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fault: str, *, size: int = 2, timeout_s: float = TIMEOUT_S
) -> Ended:
    monkeypatch.setenv("SFT_DIST_FAULTS", fault)
    done = run_ranks(size, ["-m", "tests.helpers.watched_rank", str(folder), str(timeout_s)], timeout_s=120)
    last = max((path.stat().st_mtime for path in folder.glob("rank-*")), default=time.time())
    outcome = folder / "outcome.json"
    return Ended(
        [process.returncode for process in done],
        [process.stdout for process in done],
        json.loads(outcome.read_text()) if outcome.exists() else None,
        time.time() - last,
    )


@pytest.mark.parametrize(
    ("fault", "size", "stuck", "its_codes"),
    [
        pytest.param("data:rank=1:step=20:SIGSTOP", 2, 1, {-9}, id="stopped"),
        pytest.param("data:rank=0:step=20:SIGSTOP", 2, 0, {-9}, id="rank 0, which serves the store, stopped"),
        # Ended by the other rank or, at the same time, by its own timer.
        pytest.param("data:rank=1:step=20:spin", 2, 1, {-9, 70}, id="holds the interpreter's lock"),
        pytest.param("forward:rank=2:step=20:hang", 3, 2, {70}, id="hangs, others in a collective"),
    ],
)
def test_a_stuck_rank_is_named_and_all_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, size: int, stuck: int, its_codes: set[int]
) -> None:
    ended = world(tmp_path, monkeypatch, fault, size=size)
    named = f"rank {stuck}"
    assert ended.codes[stuck] in its_codes, ended.said
    assert all(code == 70 for rank, code in enumerate(ended.codes) if rank != stuck), ended.said
    assert ended.seconds < TIMEOUT_S + 30
    assert ended.outcome is not None and ended.outcome["exit_code"] == 70
    reason = ended.outcome["reason"]
    assert named in reason.partition("stuck:")[2]
    assert not [f"rank {other} (" for other in range(size) if named != f"rank {other}" and f"rank {other} (" in reason]
    for rank, said in enumerate(ended.said):
        if rank != stuck:
            assert reason in said and "in all_reduce" in said, "its stacks"
    if not fault.endswith("SIGSTOP"):
        # A rank that can, shows where it is stuck, with the interpreter's lock held too.
        assert "faults.py" in ended.said[stuck]


def test_a_single_rank_that_holds_the_interpreters_lock_is_ended_and_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = world(tmp_path, monkeypatch, "data:step=20:spin", size=1)
    assert ended.codes == [70] and "faults.py" in ended.said[0]
    assert ended.seconds < TIMEOUT_S + 30


@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_rank_is_that_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    ended = world(tmp_path, monkeypatch, f"data:rank={rank}:step=20:raise", size=3)
    assert ended.codes == [1, 1, 1], ended.said
    assert ended.outcome is not None
    assert ended.outcome["exit_code"] == 1 and "planted fault at data" in ended.outcome["reason"]
    for other, said in enumerate(ended.said):
        assert (f"rank {rank} (host" in said) == (other != rank)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_was_killed_is_named_by_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    """No launcher ends them: they leave by themselves, and one that lives writes the outcome."""
    ended = world(tmp_path, monkeypatch, f"data:rank={rank}:step=20:SIGKILL")
    assert ended.codes[rank] == -signal.SIGKILL and ended.codes[1 - rank] == 69, ended.said
    assert ended.outcome is not None
    assert ended.outcome["exit_code"] == 69 and f"another rank is gone: rank {rank}" in ended.outcome["reason"]


def test_a_slow_rank_is_named_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = world(tmp_path, monkeypatch, "slow:rank=1:sleep=0.2", timeout_s=4)  # also of the windows that are compared
    assert ended.codes == [0, 0], ended.said
    slow = [line for line in ended.said[0].splitlines() if line.startswith("slow:")]
    assert slow and all("rank 1 (host" in line for line in slow)


def test_ranks_of_one_speed_are_not_called_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = world(tmp_path, monkeypatch, "slow:sleep=0.2", timeout_s=4)
    assert ended.codes == [0, 0] and "slow:" not in ended.said[0], ended.said


def test_a_rank_that_does_not_come_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = world(tmp_path, monkeypatch, "before.meeting:rank=1:exit=3")
    assert ended.codes == [69, 3] and "rank(s) 1 of 2 have not come" in ended.said[0], ended.said


def test_a_timer_that_is_postponed_never_ends_a_busy_process() -> None:
    from sft_dist.distributed.exit_timer import ExitTimer

    child = os.fork()
    if child == 0:
        timer = ExitTimer(stacks_s=60, end_s=0.2, exit_code=70)
        until = time.monotonic() + 1
        while time.monotonic() < until:
            timer.postpone()
        timer.cancel()
        while time.monotonic() < until + 0.5:
            pass
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
