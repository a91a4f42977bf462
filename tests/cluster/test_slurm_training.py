"""sft-dist under a real Slurm: a job disturbed in every way Slurm has trains what an undisturbed run does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest

from tests.end_to_end.conftest import Place, make_place
from tests.helpers.worlds import ROOT, free_port

from .slurm import Cluster

pytestmark = pytest.mark.slow

TIMEOUT_S = 180.0  # of one start of two ranks, on a busy machine
STEPS = 30
# Every save of the starts that are to be disturbed is slow, so that the disturbance finds them at work.
FAULTS = ",".join(
    ["save.after_publish:rank=0:restart=0:step=2:sleep=15"]
    + [f"save.after_publish:rank=0:restart={restart}:sleep=3" for restart in (1, 2, 3)]
)


@dataclass(frozen=True)
class Desk:
    """A tiny model and data, and the cluster to train them on; runs lie in `place.folder`."""

    slurm: Cluster
    place: Place

    @property
    def env(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def submit(self, run: str, *arguments: str, **env: str) -> str:
        """The id of a job that `sft-launch submit` has submitted."""
        done = subprocess.run(
            [sys.executable, "-m", "launcher", "submit", "run.yaml", f"run_dir={run}", *arguments],
            cwd=self.place.folder,
            env=self.slurm.env | self.env | env,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def output(self, job: str) -> str:
        logs = [*self.place.folder.glob(f"slurm-*-{job}.out"), *self.place.folder.glob(f"slurm-logs/{job}/rank-*.log")]
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def wait(self, run: str, job: str, *, restart: int) -> None:
        """Until this start of the job is at work and has published a checkpoint."""
        head = f"restart {restart} of"
        self.slurm.wait(lambda: head in self.output(job), f"start {restart} of job {job}", TIMEOUT_S)
        before = self.steps(run)
        self.slurm.wait(
            lambda: self.steps(run) > before, f"a checkpoint of start {restart}:\n{self.output(job)}", TIMEOUT_S
        )

    def steps(self, run: str) -> int:
        found = [int(m.parent.name[5:]) for m in self.place.folder.glob(f"{run}/checkpoints/step-*/manifest.json")]
        return max(found, default=0)

    def losses(self, run: str) -> dict[int, float]:
        return {entry["step"]: entry["loss"] for entry in self.place.steps(run)}


@pytest.fixture(scope="module")
def desk(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("training")
    return Desk(
        slurm,
        make_place(
            folder,
            schedule={"epochs": 20, "max_steps": STEPS},
            evaluate={"every": 0},
            checkpoint={"every": 2, "keep": 2, "stop_before_end_s": 100},
            logging={"tensorboard": False},
        ),
    )


@pytest.fixture(scope="module")
def whole(desk: Desk) -> dict[int, float]:
    """The losses of an undisturbed run: srun by hand, without our script or launcher."""
    ranks = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    desk.slurm.run(
        *(*ranks, "python", "-m", "sft_dist", "train", "run.yaml", "run_dir=whole"),
        cwd=desk.place.folder,
        **desk.env,
        MASTER_PORT=str(free_port()),
    )
    assert desk.place.outcome("whole")["exit_code"] == 0
    return desk.losses("whole")


def test_srun_by_hand_makes_one_world_of_all_tasks(desk: Desk, whole: dict[int, float]) -> None:
    assert list(whole) == list(range(1, STEPS + 1))
    manifest: dict[str, Any] = json.loads(
        (desk.place.folder / "whole" / "checkpoints" / f"step-{STEPS:08d}" / "manifest.json").read_text()
    )
    assert manifest["world_size"] == 2


def test_a_run_disturbed_in_every_way_trains_what_an_undisturbed_one_does(desk: Desk, whole: dict[int, float]) -> None:
    slurm = desk.slurm
    job = desk.submit(
        *("run", "--nodes", "2", "--gpus-per-node", "1", "--cpus-per-task", "1"),
        *("--partition", "grace", "--time", "2", "--sbatch=--oversubscribe"),
        SFT_DIST_FAULTS=FAULTS,
    )
    # A second job on the same run folder is turned away and comes not back.
    slurm.wait((desk.place.folder / "run" / "run.lock.json").exists, f"the lock:\n{desk.output(job)}", TIMEOUT_S)
    second = desk.submit(
        *("run", "--nodes", "1", "--gpus-per-node", "1", "--cpus-per-task", "1", "--sbatch=--oversubscribe")
    )
    ended = slurm.end_of(second, TIMEOUT_S)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "69:0", "0"), desk.output(second)
    assert "is in use by another run" in desk.output(second)

    # The time limit draws near; Slurm's own warning would have come later.
    outcome = desk.place.folder / "run" / "outcome.json"
    slurm.wait(lambda: "requeued as" in desk.output(job), f"the stop before the limit:\n{desk.output(job)}", TIMEOUT_S)
    told = json.loads(outcome.read_text())
    assert (told["exit_code"], told["reason"]) == (75, "stopped by the job's time limit")
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")

    desk.wait("run", job, restart=1)
    slurm.run("scancel", "--signal=USR1", job)
    desk.wait("run", job, restart=2)
    slurm.run("srun", "--partition=high", "--exclusive", "--nodes=2", "true")
    desk.wait("run", job, restart=3)
    slurm.run("scontrol", "requeue", job)

    ended = slurm.end_of(job, TIMEOUT_S)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "4"), desk.output(job)
    said = [
        line.partition("stopped by ")[2] for line in desk.output(job).splitlines() if line.startswith("stopped by ")
    ]
    # Slurm sends its SIGTERM to the ranks and to the script, which sends them SIGUSR1: either may be the last to come.
    ended_by = {"SIGTERM", "SIGUSR1"}
    expected = [{"the job's time limit"}, {"SIGUSR1"}, ended_by, ended_by]
    assert len(said) == len(expected)
    assert all(reason.partition(" at step")[0] in reasons for reason, reasons in zip(said, expected, strict=True)), said
    assert desk.losses("run") == whole  # bit for bit: dropout, and four resumes


def test_status_tells_where_the_run_stands(desk: Desk, whole: dict[int, float]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "launcher", "status", str(desk.place.folder / "whole"), "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    status = json.loads(told.stdout)
    assert (status["step"], status["num_steps"], status["eta_s"]) == (STEPS, STEPS, 0)
    assert status["loss"] == whole[STEPS] and status["state"] == "ended: finished (exit code 0)"
    assert status["checkpoint"].startswith(f"step {STEPS} (") and status["tokens_per_s"] > 0
