"""The supervisor keeps its promises: real launchers, real ranks, real signals."""

from __future__ import annotations

import os
import pty
import resource
import signal
import time
from pathlib import Path

import pytest

from launcher.processes import all_processes

from .conftest import Start, assert_gone

pytestmark = pytest.mark.slow


def guards(launcher: int) -> list[int]:
    return [
        p.pid
        for p in all_processes()
        if p.parent == launcher and b"launcher.guard" in Path(f"/proc/{p.pid}/cmdline").read_bytes()
    ]


def test_ranks_that_end_well_end_the_launch_with_0_and_leave_nothing(start: Start, tmp_path: Path) -> None:
    launch = start("--nproc", "2")
    pids = launch.pids(2) + guards(launch.process.pid)
    launch.let_ranks_exit()
    code, stdout, stderr = launch.end()
    assert (code, stderr) == (0, "")
    assert stdout == "rank 0 is up\nrank 0 leaves, received []\n"
    assert len(pids) == 3
    assert_gone(pids)
    assert not list(tmp_path.glob("sft-launch-*"))


def test_a_rank_killed_with_9_ends_the_others_and_gives_137(start: Start) -> None:
    launch = start("--nproc", "3", "all=wait", "helper=1")
    pids = launch.pids(3)
    os.kill(launch.rank(1)["pids"][0], signal.SIGKILL)
    code, stdout, stderr = launch.end()
    assert code == 137
    assert "rank 1 failed first: killed by SIGKILL (9)" in stderr
    assert "| rank 1 is up\n" in stderr
    assert "rank 0 leaves, received ['SIGTERM']" in stdout
    assert_gone(pids)


@pytest.mark.parametrize("action", ["wait", "deaf"])
def test_ranks_do_not_outlive_a_launcher_killed_with_9(start: Start, action: str) -> None:
    launch = start("--nproc", "2", f"all={action}", "helper=1")
    pids = launch.pids(2) + guards(launch.process.pid)
    launch.process.kill()
    launch.process.wait()
    assert_gone(pids, within_s=10, zombies_allowed=True)


def test_the_kernel_kills_the_ranks_when_launcher_and_guard_are_killed_together(start: Start) -> None:
    launch = start("--nproc", "2", "all=deaf")
    pids = launch.pids(2)
    for guard in guards(launch.process.pid):
        os.kill(guard, signal.SIGKILL)
    launch.process.kill()
    launch.process.wait()
    assert_gone(pids, within_s=10, zombies_allowed=True)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda s: s.name)
def test_a_signal_reaches_every_rank_once_and_their_75_is_passed_on(
    start: Start, tmp_path: Path, signum: signal.Signals
) -> None:
    launch = start("--nproc", "3", "all=wait", "helper=1", "--log-dir", str(tmp_path / "logs"))
    pids = launch.pids(3)
    launch.process.send_signal(signum)
    code, stdout, stderr = launch.end()
    assert code == 75
    assert f"rank 0 leaves, received ['{signum.name}']" in stdout
    for rank in (1, 2):
        assert f"received ['{signum.name}']" in (tmp_path / "logs" / f"rank-{rank}.log").read_text()
    assert "failed" not in stderr and "|" not in stderr
    assert_gone(pids)


def test_a_closed_terminal_asks_the_ranks_for_a_checkpoint(start: Start) -> None:
    launch = start("--nproc", "2", "all=wait")
    launch.pids(2)
    launch.process.send_signal(signal.SIGHUP)
    code, stdout, _ = launch.end()
    assert code == 75
    assert "received ['SIGTERM']" in stdout


def test_a_log_that_has_gone_costs_no_rank_its_checkpoint(start: Start, tmp_path: Path) -> None:
    launch = start("--nproc", "2", "all=wait", "--log-dir", str(tmp_path / "logs"))
    pids = launch.pids(2)
    (tmp_path / "logs" / "rank-1.log").unlink()
    launch.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = launch.end()
    assert code == 75, stderr
    assert "rank 0 leaves, received ['SIGTERM']" in stdout
    assert "log" not in stderr
    assert_gone(pids)


def test_a_rank_that_fails_is_named_though_its_log_has_gone(start: Start, tmp_path: Path) -> None:
    launch = start("--nproc", "2", "rank0=wait", "rank1=exit:3", "--log-dir", str(tmp_path / "logs"))
    pids = launch.pids(2)
    (tmp_path / "logs" / "rank-1.log").unlink()
    launch.let_ranks_exit()
    code, stdout, stderr = launch.end()
    assert code == 3
    assert "rank 0 leaves, received ['SIGTERM']" in stdout
    assert f"the last lines of rank 1 ({tmp_path}/logs/rank-1.log):\n" in stderr
    assert "| log cannot be read: No such file or directory\n" in stderr
    assert_gone(pids)


def test_a_folder_for_logs_that_cannot_be_made_is_told_in_one_line(start: Start, tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    code, _, stderr = start("--nproc", "2", "all=wait", "--log-dir", str(tmp_path / "logs")).end()
    assert (code, stderr) == (69, f"sft-launch: --log-dir {tmp_path}/logs: File exists\n")


def test_the_launcher_may_open_all_files_it_can_and_the_ranks_as_many_as_before(start: Start) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = before[1] // 2
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        launch = start("--nproc", "1", "all=wait")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    (rank,) = launch.pids(1)
    assert resource.prlimit(launch.process.pid, resource.RLIMIT_NOFILE) == (before[1], before[1])
    assert resource.prlimit(rank, resource.RLIMIT_NOFILE) == (soft, before[1])
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end()[0] == 75


def test_a_second_interrupt_ends_deaf_ranks_at_once(start: Start) -> None:
    launch = start("--nproc", "2", "all=deaf", "helper=1")
    pids = launch.pids(2)
    begun = time.monotonic()
    launch.process.send_signal(signal.SIGINT)
    assert launch.process.stderr is not None
    assert "again to end at once" in launch.process.stderr.readline()
    launch.process.send_signal(signal.SIGINT)
    code, _, _ = launch.end()
    assert code == 130
    assert time.monotonic() - begun < 25  # the grace time is 30 s
    assert_gone(pids)


def test_a_signal_before_the_handlers_are_in_place_gives_its_own_code(start: Start) -> None:
    launch = start("--nproc", "2", "all=startup")
    launch.pids(2)
    launch.process.send_signal(signal.SIGTERM)
    code, _, stderr = launch.end()
    assert code == 143
    assert "had no checkpoint to offer" in stderr


def test_the_first_failing_rank_gives_its_code_and_its_last_lines(start: Start) -> None:
    launch = start("--nproc", "3", "all=wait", "rank2=exit:3")
    pids = launch.pids(3)
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 3
    assert "| rank 2 is up\n" in stderr
    assert stderr.endswith("rank 2 failed first: exit status 3 (exit code 3)\n")
    assert_gone(pids)


def test_ranks_deaf_to_sigterm_are_killed_after_the_grace_time(start: Start) -> None:
    launch = start("--nproc", "2", "rank0=exit:70", "rank1=deaf", "helper=1", "--grace-s", "0.5")
    pids = launch.pids(2)
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 70
    assert "SIGKILL after 0.5 s of grace: rank 1" in stderr
    assert "rank 0 failed first: exit status 70 (exit code 70); its output is above" in stderr
    assert_gone(pids)


def test_a_rank_that_leaves_early_fails_the_job_after_the_grace_time(start: Start) -> None:
    launch = start("--nproc", "2", "rank0=deaf", "rank1=exit:0", "--grace-s", "0.5")
    pids = launch.pids(2)
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 70
    assert "rank 1 failed first: exit status 0, and 0.5 s later there still ran: rank 0" in stderr
    assert "| rank 1 leaves, received []\n" in stderr
    assert_gone(pids)


@pytest.mark.parametrize("first_code", [0, 75])
def test_ranks_may_end_one_after_the_other_within_the_grace_time(start: Start, first_code: int) -> None:
    launch = start("--nproc", "2", "rank0=wait", f"rank1=exit:{first_code}")
    first, second = (launch.rank(rank)["pids"][0] for rank in (1, 0))
    launch.let_ranks_exit()
    assert_gone([first], within_s=10)  # reaped, so the launcher has seen it end
    os.kill(second, signal.SIGUSR1)
    code, stdout, stderr = launch.end()
    assert code == 75
    assert "received ['SIGUSR1']" in stdout
    assert "failed" not in stderr


def test_of_ranks_that_end_together_the_one_that_was_killed_is_the_cause(start: Start) -> None:
    launch = start("--nproc", "2", "rank0=exit:1", "rank1=wait")
    pids = launch.pids(2)
    launch.process.send_signal(signal.SIGSTOP)  # so that the launcher sees both ends at once
    launch.let_ranks_exit()
    os.kill(pids[1], signal.SIGKILL)
    dead = {(pid, "Z") for pid in pids}
    launch.wait_until(lambda: dead <= {(p.pid, p.state) for p in all_processes()}, "the ranks did not end")
    launch.process.send_signal(signal.SIGCONT)
    code, _, stderr = launch.end()
    assert code == 137
    assert "rank 1 failed first" in stderr


def test_a_rank_that_hangs_after_75_does_not_spoil_the_requeue(start: Start) -> None:
    launch = start("--nproc", "2", "rank0=exit:75", "rank1=deaf", "--grace-s", "0.5")
    pids = launch.pids(2)
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 75
    assert "|" not in stderr
    assert_gone(pids)


def test_helpers_that_ranks_leave_behind_are_ended(start: Start) -> None:
    launch = start("--nproc", "2", "helper=1")
    pids = launch.pids(2)
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 0
    assert "ended 2 processes that the ranks had left behind" in stderr
    assert_gone(pids)


def test_ranks_see_their_place_in_the_world_and_the_arguments(start: Start) -> None:
    launch = start(
        "a.b=1", "--nproc", "2", "c=x y", "--verb", "score", "--", "--out", "f.jsonl", env={"OMP_NUM_THREADS": "3"}
    )
    for rank in range(2):
        seen = launch.rank(rank)
        assert seen["argv"][0] == "score"
        assert seen["argv"][2:] == ["a.b=1", "c=x y", "--out", "f.jsonl"]
        env = seen["env"]
        assert [env[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == [
            *(str(rank), str(rank), "2", "2")
        ]
        assert (env["MASTER_ADDR"], env["OMP_NUM_THREADS"], env["SFT_DIST_LAUNCHER"]) == ("127.0.0.1", "3", "local")
        assert env["MASTER_PORT"] == launch.rank(0)["env"]["MASTER_PORT"]
    launch.let_ranks_exit()
    assert launch.end()[0] == 0


def test_rank_0_keeps_the_terminal(start: Start, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    launch = start("--nproc", "1", stderr=theirs)
    os.close(theirs)
    pid = launch.rank(0)["pids"][0]
    assert os.readlink(f"/proc/{pid}/fd/2").startswith("/dev/pts/")
    os.close(ours)
    launch.let_ranks_exit()
    assert launch.end()[0] == 0
