"""Restarts: after which failures, how often, and what ends them. Real launchers, ranks and signals."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launcher.restarts import Restarts, checkpoints

from .conftest import Launch, Start, assert_gone

FAST = ("--restart-pause-s", "0.05")


def starts(launch: Launch) -> list[dict]:
    """What rank 0 of every start wrote when it was up, in their order."""
    path = launch.run_dir / "starts"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("code", "mended"),
    [(code, True) for code in (1, 69, 70, 74, 134, 137, 139, 143)]
    + [(code, False) for code in (0, 2, 65, 75, 76, 78, 126, 127)],
)
def test_only_what_a_restart_can_mend_is_restarted(code: int, mended: bool) -> None:
    assert Restarts(budget=1).may_mend(code) == mended
    assert Restarts(budget=1, after_stop=True).may_mend(code) == (mended or code == 75)


def test_a_checkpoint_is_known_by_its_manifest_and_its_writing(tmp_path: Path) -> None:
    assert checkpoints(tmp_path) == frozenset()
    for name in ("step-00000001", ".tmp-step-00000002"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    manifest = tmp_path / "checkpoints" / "step-00000001" / "manifest.json"
    assert checkpoints(tmp_path) == frozenset()
    manifest.touch()
    (tmp_path / "checkpoints" / ".tmp-step-00000002" / "manifest.json").touch()
    first = checkpoints(tmp_path)
    assert [name for name, _, _ in first] == ["step-00000001"]
    os.utime(manifest, ns=(1, 1))
    assert checkpoints(tmp_path) != first, "the same step once more is a new checkpoint"


@pytest.mark.slow
def test_a_killed_rank_is_restarted_on_another_port_until_the_run_is_done(start: Start) -> None:
    launch = start("--nproc", "2", "--restarts", "5", *FAST, "all=lives:wait,wait,exit:0")
    for number in range(2):
        launch.wait_until(lambda number=number: len(starts(launch)) > number, f"start {number} did not come up")
        os.kill(starts(launch)[number]["pid"], signal.SIGKILL)
    launch.let_ranks_exit()
    code, _, stderr = launch.end()
    assert code == 0, stderr
    assert [one["restart"] for one in starts(launch)] == ["0", "1", "2"]
    assert len({one["port"] for one in starts(launch)}) == 3
    assert stderr.count("rank 0 failed first: killed by SIGKILL (9)") == 2
    assert "restart 1 of 5 in 0.05 s" in stderr and "restart 2 of 5" in stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("life", "options", "code", "num_starts", "said"),
    [
        ("exit:70", ["--restarts", "2"], 70, 3, "no restart is left of 2"),
        ("exit:70", ["--restarts", "9"], 76, 4, "3 restarts in a row brought no new checkpoint"),
        ("exit:70", [], 70, 1, ""),
        ("exit:65", ["--restarts", "9"], 65, 1, ""),
        ("exit:78", ["--restarts", "9"], 78, 1, ""),
        ("exit:75", ["--restarts", "9"], 75, 1, ""),
        ("exit:75", ["--restarts", "1", "--restart-stopped"], 75, 2, "no restart is left of 1"),
        # A checkpoint in the third start of five: the count of fruitless ones begins anew.
        ("exit:70,exit:70,new:70,exit:70,exit:0", ["--restarts", "9"], 0, 5, "restart 4 of 9 in 0.1 s"),
        # Two steps back and forward again: the same name, but written anew.
        ("new:70,new:70,new:70,new:70,new:70,exit:0", ["--restarts", "9"], 0, 6, "restart 5 of 9 in 0.05 s"),
    ],
)
def test_restarts_have_an_end(
    start: Start, life: str, options: list[str], code: int, num_starts: int, said: str
) -> None:
    launch = start("--nproc", "1", *options, *FAST, f"all=lives:{life}")
    launch.let_ranks_exit()
    found, _, stderr = launch.end()
    assert (found, len(starts(launch))) == (code, num_starts), stderr
    assert said in stderr and (said or "restart" not in stderr)


@pytest.mark.slow
def test_other_verbs_have_no_checkpoints_and_are_held_to_the_budget(start: Start) -> None:
    launch = start("--nproc", "1", "--restarts", "5", *FAST, "--verb", "score", "all=lives:exit:70")
    launch.let_ranks_exit()
    assert (launch.end()[0], len(starts(launch))) == (70, 6)


@pytest.mark.slow
@pytest.mark.parametrize(("has_checkpoint", "code"), [(True, 75), (False, 143)])
def test_a_signal_between_two_starts_ends_the_run(start: Start, has_checkpoint: bool, code: int) -> None:
    life = "new:70" if has_checkpoint else "exit:70"
    launch = start("--nproc", "1", "--restarts", "5", "--restart-pause-s", "60", f"all=lives:{life}")
    launch.let_ranks_exit()
    assert launch.process.stderr is not None
    said = [launch.process.stderr.readline() for _ in range(2)]
    assert "restart 1 of 5 in 60 s" in said[1]
    begun = time.monotonic()
    launch.process.send_signal(signal.SIGTERM)
    found, _, stderr = launch.end()
    assert time.monotonic() - begun < 40
    assert found == code and "SIGTERM before the restart" in stderr
    assert len(starts(launch)) == 1


@pytest.mark.slow
def test_a_signal_to_the_launcher_is_no_failure_to_restart_after(start: Start) -> None:
    """Ranks still in their start-up die of it with 143, which would be restarted had nobody asked."""
    launch = start("--nproc", "2", "--restarts", "5", "--restart-stopped", *FAST, "all=startup")
    pids = launch.pids(2)
    launch.process.send_signal(signal.SIGTERM)
    code, _, stderr = launch.end()
    assert code == 143 and "restart" not in stderr
    assert_gone(pids)


@pytest.mark.slow
@pytest.mark.parametrize("option", [("--restarts", "-1"), ("--restart-pause-s", "-1")])
def test_impossible_restarts_are_usage_errors(start: Start, option: tuple[str, str]) -> None:
    assert start(*option).end()[0] == 2
