"""Behind every other launcher sft-launch keeps the same promises, none of which those launchers keep themselves."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launcher.processes import all_processes

from .conftest import Launch, Start, assert_gone

pytestmark = pytest.mark.slow

WAYS = ("deepspeed", "torchrun", "mpirun")


def start_two(start: Start, via: str, *arguments: str) -> tuple[Launch, list[int]]:
    """A launch of two stub ranks, and every process below the launcher once they are up."""
    launch = start("--via", via, "--nproc", "2", *arguments, env={"DS_ACCELERATOR": "cpu"})
    ranks = launch.pids(2)
    below = family(launch.process.pid)
    assert set(ranks) < set(below)
    return launch, below


def family(pid: int) -> list[int]:
    table = all_processes()
    found = {pid}
    while grown := {p.pid for p in table if p.parent in found} - found:
        found |= grown
    return sorted(found - {pid})


def command_of(pid: int) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return ""


@pytest.mark.parametrize(
    ("via", "signum"),
    [
        ("deepspeed", signal.SIGTERM),
        ("torchrun", signal.SIGUSR1),
        ("mpirun", signal.SIGTERM),
        ("mpirun", signal.SIGUSR1),
        ("mpirun", signal.SIGINT),
    ],
)
def test_a_signal_reaches_every_rank_once_and_their_75_is_passed_on(
    start: Start, via: str, signum: signal.Signals
) -> None:
    launch, pids = start_two(start, via, "all=wait", "helper=1")
    launch.process.send_signal(signum)
    code, stdout, stderr = launch.end()
    assert code == 75, stderr
    for rank in range(2):
        assert f"rank {rank} leaves, received ['{signum.name}']" in stdout
    assert "the same command goes on from there" in stderr and "failed" not in stderr
    assert_gone(pids)


@pytest.mark.parametrize("via", WAYS)
def test_a_rank_killed_with_9_ends_the_others_and_gives_137(start: Start, via: str) -> None:
    launch, pids = start_two(start, via, "all=wait", "helper=1")
    os.kill(launch.rank(1)["pids"][0], signal.SIGKILL)
    begun = time.monotonic()
    code, stdout, stderr = launch.end()
    assert code == 137
    assert "rank 1 on " in stderr and "failed first: killed by SIGKILL (9)" in stderr
    assert "rank 0 leaves, received ['SIGTERM']" in stdout
    assert time.monotonic() - begun < 25  # the grace time is 30 s
    assert_gone(pids)


@pytest.mark.parametrize("via", WAYS)
def test_the_code_of_the_first_rank_to_fail_is_that_of_the_launch(start: Start, via: str) -> None:
    launch, pids = start_two(start, via, "rank0=wait", "rank1=exit:65")
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 65, stderr
    assert_gone(pids)


@pytest.mark.parametrize("via", WAYS)
def test_a_rank_that_leaves_early_fails_the_job_after_the_grace_time(start: Start, via: str) -> None:
    launch, pids = start_two(start, via, "rank0=exit:0", "rank1=deaf", "helper=1", "--grace-s", "0.5")
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 70
    assert "failed first: exit status 0, and 0.5 s later there still ran: rank 1 on" in stderr
    assert_gone(pids)


@pytest.mark.parametrize("via", WAYS)
def test_nothing_outlives_a_launcher_killed_with_9(start: Start, via: str) -> None:
    launch, pids = start_two(start, via, "all=deaf", "helper=1")
    launch.process.kill()
    launch.process.wait()
    assert_gone(pids, within_s=10, zombies_allowed=True)


@pytest.mark.parametrize("via", WAYS)
def test_a_second_interrupt_ends_deaf_ranks_at_once(start: Start, via: str) -> None:
    launch, pids = start_two(start, via, "all=deaf", "helper=1")
    begun = time.monotonic()
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.stderr is not None
    while "again to end at once" not in launch.process.stderr.readline():
        pass
    launch.process.send_signal(signal.SIGINT)
    code, _, _ = launch.end()
    assert code == 130
    assert time.monotonic() - begun < 25  # the grace time is 30 s
    assert_gone(pids)


@pytest.mark.parametrize("via", WAYS)
def test_ranks_that_end_well_end_the_launch_with_0(start: Start, via: str) -> None:
    launch, pids = start_two(start, via, "a=x y$z'")
    assert launch.rank(1)["argv"][2:] == ["a=x y$z'"]
    assert launch.rank(1)["env"]["SFT_DIST_LAUNCHER"] == via
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 0, stderr
    assert_gone(pids)


def test_ranks_that_deepspeed_abandons_are_ended_and_its_exit_0_is_not_believed(start: Start) -> None:
    launch, pids = start_two(start, "deepspeed", "all=deaf", "--grace-s", "0.5")
    (agent,) = [pid for pid in pids if "deepspeed.launcher.launch" in command_of(pid)]
    os.kill(agent, signal.SIGUSR1)  # which it does not expect: it dies, and deepspeed ends with 0
    code, _, stderr = launch.end()
    assert code == 70
    assert "deepspeed failed first: exit status 0, though not all of its ranks have come up and ended" in stderr
    assert_gone(pids)


def test_a_keeper_killed_with_9_takes_its_rank_along_and_is_told(start: Start) -> None:
    launch, pids = start_two(start, "torchrun", "all=wait")
    # Not torchrun itself, on whose command line its name stands, too.
    keeper = next(pid for pid in pids if "launcher.keeper" in (words := command_of(pid)) and "--nnodes" not in words)
    os.kill(keeper, signal.SIGKILL)
    code, _, stderr = launch.end()
    assert code == 69
    assert "its keeper is gone without a word" in stderr
    assert_gone(pids)


def test_a_signal_before_there_are_ranks_ends_the_launcher_in_between(start: Start) -> None:
    launch = start("--via", "deepspeed", "--nproc", "2", "all=wait", env={"DS_ACCELERATOR": "cpu"})

    def runners() -> list[int]:
        return [pid for pid in family(launch.process.pid) if "--num_gpus" in command_of(pid)]

    launch.wait_until(lambda: bool(runners()), "deepspeed did not start")
    (runner,) = runners()
    launch.process.send_signal(signal.SIGTERM)
    code, _, stderr = launch.end()
    assert code == 143
    assert "had no checkpoint to offer" in stderr
    assert_gone([runner])
