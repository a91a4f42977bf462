"""`sft-launch run --via srun` under a real Slurm: srun by itself kills its tasks at SIGTERM and ignores SIGINT."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.end_to_end.conftest import make_place
from tests.helpers.worlds import ROOT

from .slurm import TIMEOUT_S, Cluster
from .stub_rank import undisturbed

pytestmark = pytest.mark.slow

GONE_WITHIN_S = 60.0  # of which a keeper alone may take 10 for its rank


@dataclass
class Launch:
    slurm: Cluster
    process: subprocess.Popen[str]
    run_dir: Path
    mark: str  # in the environment of the launcher and of everything below it, on whichever node

    def until_training(self) -> None:
        self.slurm.wait(lambda: len(list(self.run_dir.glob("alive-*-[01]"))) == 2, "both ranks take steps")

    def pid_of_rank(self, rank: int) -> int:
        found = [pid for pid, env in self.slurm.processes().items() if {self.mark, f"SLURM_PROCID={rank}"} <= env]
        return max(found, key=lambda pid: "sft_dist" in Path(f"/proc/{pid}/cmdline").read_text().split("\0"))

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said, once nothing of it is left."""
        said = self.process.communicate(timeout=TIMEOUT_S)[0]
        self.until_gone()
        return self.process.returncode, said

    def until_gone(self) -> None:
        def is_gone() -> bool:
            return not any(self.mark in env for env in self.slurm.processes().values())

        self.slurm.wait(is_gone, "no process of it is left", GONE_WITHIN_S)


@pytest.fixture
def launch(slurm: Cluster, stub: Path, tmp_path: Path) -> Iterator[Launch]:
    """The stub on two nodes, taking steps, with its logs in `logs`."""
    (tmp_path / "run.yaml").touch()
    mark = f"LAUNCH={secrets.token_hex(8)}"
    options = ["--via", "srun", "--nodes", "2", "--nproc", "1", "--log-dir", "logs"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launcher", "run", "run.yaml", "steps=60", *options],
        cwd=tmp_path,
        env=slurm.env | dict([mark.split("=")]) | {"PYTHONPATH": f"{stub}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    launched = Launch(slurm, process, tmp_path / "run", mark)
    launched.until_training()
    yield launched
    process.kill()
    process.communicate(timeout=TIMEOUT_S)
    launched.until_gone()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_reaches_every_rank_and_their_75_is_passed_on(launch: Launch, signum: signal.Signals) -> None:
    launch.process.send_signal(signum)
    code, said = launch.end()
    assert code == 75 and "the same command goes on from there" in said, said
    outcome = json.loads((launch.run_dir / "outcome.json").read_text())
    assert outcome["reason"] == f"stopped by {signum.name}"


def test_a_run_ends_with_what_it_computed_and_its_ranks_write_where_they_are_told(launch: Launch) -> None:
    code, said = launch.end()
    assert code == 0, said
    assert json.loads((launch.run_dir / "outcome.json").read_text())["state"] == undisturbed(60)
    assert "rank 0 of 2 is up" in said and "rank 1 of 2 is up" not in said
    assert "rank 1 of 2 is up" in (launch.run_dir.parent / "logs" / "rank-1.log").read_text()


def test_a_rank_killed_with_9_ends_the_others_and_gives_137(launch: Launch) -> None:
    os.kill(launch.pid_of_rank(1), signal.SIGKILL)
    code, said = launch.end()
    assert code == 137 and "rank 1 on " in said and "failed first: killed by SIGKILL (9)" in said, said
    assert "| rank 1 of 2 is up" in said, "the last lines of it"


def test_nothing_outlives_a_launcher_killed_with_9(launch: Launch) -> None:
    launch.process.kill()
    launch.until_gone()


def test_the_hosts_of_slurm_are_checked(slurm: Cluster, tmp_path: Path) -> None:
    place = make_place(tmp_path)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "launcher",
            "check",
            str(place.run_file),
            "--via",
            "srun",
            "--nodes",
            "2",
            "--nproc",
            "1",
        ],
        cwd=tmp_path,
        env=slurm.env | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks meet at" in done.stdout and done.stdout.endswith("ready\n")
