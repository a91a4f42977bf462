"""Behind the real `deepspeed` command the launcher keeps the same promises, which that command does not."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.processes import descendants

from .conftest import Launch, Start, assert_gone

pytestmark = pytest.mark.slow


def start_two(start: Start, *arguments: str) -> tuple[Launch, list[int]]:
    launch = start("--via", "deepspeed", "--nproc", "2", *arguments, env={"DS_ACCELERATOR": "cpu"})
    pids = launch.pids(2)
    runner = os.getsid(pids[0])
    # The runner, deepspeed.launcher.launch and the ranks with their helpers.
    return launch, [runner, *descendants(runner, depth=1), *pids]


def test_sigterm_reaches_the_ranks_and_the_outcome_gives_the_code(start: Start) -> None:
    launch, pids = start_two(start, "all=wait", "outcome=75", "helper=1")
    (launch.run_dir / "outcome.json").write_text('{"exit_code": 0, "reason": "of an earlier launch", "step": 1}')
    assert len(pids) == 6
    launch.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = launch.end()
    assert code == 75
    assert "rank 0 leaves, received ['SIGTERM'" in stdout
    assert "rank 1 leaves, received ['SIGTERM'" in stdout
    # deepspeed itself was not signalled: it saw its ranks end.
    assert "exits with return code = 75" in stdout + stderr
    assert "the same command goes on from there" in stderr
    assert_gone(pids)


def test_ranks_do_not_outlive_a_launcher_killed_with_9(start: Start) -> None:
    launch, pids = start_two(start, "all=deaf", "helper=1")
    launch.process.kill()
    launch.process.wait()
    assert_gone(pids, within_s=10, zombies_allowed=True)


def test_a_rank_killed_with_9_gives_137_where_deepspeed_says_247(start: Start) -> None:
    launch, pids = start_two(start, "all=wait", "helper=1")
    os.kill(launch.rank(1)["pids"][0], signal.SIGKILL)
    code, _, stderr = launch.end()
    assert code == 137
    assert "a rank failed: killed by SIGKILL (9)" in stderr
    assert_gone(pids)


def test_ranks_orphaned_by_deepspeed_are_ended_and_its_exit_0_is_not_believed(start: Start) -> None:
    launch, pids = start_two(start, "all=deaf", "--grace-s", "0.5")
    os.kill(pids[1], signal.SIGUSR1)  # to deepspeed.launcher.launch, faults.md finding 9
    code, _, stderr = launch.end()
    assert code == 70
    assert "deepspeed ended with exit status 0 while 2 processes of the run were still at work" in stderr
    assert_gone(pids)


def test_a_rank_that_leaves_early_fails_the_job_where_deepspeed_waits_for_ever(start: Start) -> None:
    launch, pids = start_two(start, "rank0=exit:0", "rank1=deaf", "--grace-s", "0.5")
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 70
    assert "a rank ended, and 0.5 s later others still ran" in stderr
    assert_gone(pids)


def test_a_signal_before_there_are_ranks_ends_deepspeed_itself(start: Start) -> None:
    launch = start("--via", "deepspeed", "--nproc", "2", "all=wait", env={"DS_ACCELERATOR": "cpu"})

    def runners() -> list[int]:
        return [pid for pid in descendants(launch.process.pid, depth=1) if is_deepspeed(pid)]

    launch.wait_until(lambda: bool(runners()), "deepspeed did not start")
    (runner,) = runners()
    launch.process.send_signal(signal.SIGTERM)
    code, _, stderr = launch.end()
    assert code == 143
    assert "had no checkpoint to offer" in stderr
    assert_gone([runner])


def is_deepspeed(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return b"--num_gpus" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False
