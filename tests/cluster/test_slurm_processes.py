"""train.sbatch under a real Slurm, with a stub for sft-dist: where only processes, signals and queues matter.

The jobs of this file are submitted at once and wait for Slurm side by side; each test looks at the end of one of them.
What the stub computes tells whether a step was missed or taken twice.
"""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launcher.submit import find_script

from .slurm import Cluster
from .stub_rank import undisturbed

pytestmark = pytest.mark.slow

SMALL = ("--oversubscribe", "--cpus-per-task=1", "--gpus-per-node=1", "--ntasks-per-node=1", "--nodes=2")


@dataclass(frozen=True)
class Desk:
    """A folder to submit from."""

    slurm: Cluster
    folder: Path
    env: dict[str, str]

    def submit(self, name: str, *arguments: str, options: tuple[str, ...] = (), **env: str) -> Submitted:
        """A job of the stub in its own run folder, by hand: sbatch and the script."""
        run_dir = self.folder / name
        job = self.slurm.run(
            *("sbatch", "--parsable", f"--output={name}.out", *SMALL, *options),
            *(str(find_script()), "run.yaml", f"run_dir={run_dir}", *arguments),
            cwd=self.folder,
            **self.env,
            **env,
        )
        return Submitted(self.slurm, job, run_dir)


@dataclass(frozen=True)
class Submitted:
    slurm: Cluster
    id: str
    run_dir: Path

    @property
    def output(self) -> str:
        path = self.run_dir.with_suffix(".out")
        return path.read_text() if path.exists() else ""

    @property
    def outcome(self) -> dict[str, Any]:
        outcome: dict[str, Any] = json.loads((self.run_dir / "outcome.json").read_text())
        return outcome

    @property
    def starts(self) -> list[str]:
        """How each start of the stub ended."""
        path = self.run_dir / "starts"
        return path.read_text().splitlines() if path.exists() else []

    def is_training(self, start: int = 0) -> bool:
        return (self.run_dir / f"alive-{self.slurm.job(self.id)['JobId']}-{start}-0").exists()

    def until_training(self, start: int = 0) -> None:
        self.slurm.wait(lambda: self.is_training(start), f"job {self.id} takes steps in start {start}: {self.output}")

    def end(self) -> dict[str, str]:
        return self.slurm.end_of(self.id)

    @property
    def restarts(self) -> int:
        return int(self.slurm.job(self.id)["Restarts"])

    def signal(self, *options: str) -> None:
        self.slurm.run("scancel", *options, self.id)


@pytest.fixture(scope="module")
def desk(slurm: Cluster, stub: Path, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    (folder / "run.yaml").touch()
    return Desk(slurm, folder, {"PYTHONPATH": str(stub)})


@pytest.fixture(scope="module")
def jobs(desk: Desk) -> dict[str, Submitted]:
    """Jobs side by side, each disturbed once it takes steps; the tests await their ends."""
    jobs = {
        "limit": desk.submit("limit", "steps=400", options=("--time=1", "--signal=USR1@50")),
        "fruitless": desk.submit("fruitless", "end=75", SFT_MAX_FRUITLESS="2"),
        "first link": desk.submit("chain", "steps=40", options=("--no-requeue",)),
        "signalled": desk.submit("signalled", "steps=40"),
    }
    afterwards = [f"--dependency=afterany:{jobs['first link'].id}"]
    jobs["second link"] = desk.submit("chain", "steps=40", options=("--no-requeue", *afterwards))
    afterwards = [f"--dependency=afterany:{jobs['second link'].id}"]
    jobs["third link"] = desk.submit("chain", "steps=40", options=("--no-requeue", *afterwards))
    for name in ("first link", "signalled"):
        jobs[name].until_training()
        jobs[name].signal("--signal=USR1")
    jobs["cancelled"] = desk.submit("cancelled", "steps=100000")
    jobs["budget"] = desk.submit("budget", "steps=100000", SFT_MAX_RESTARTS="1")
    jobs["requeued"] = desk.submit("requeued", "steps=40")
    jobs["killed"] = desk.submit("killed", "steps=40", "every=2")
    jobs["cancelled"].until_training()
    jobs["cancelled"].signal()
    jobs["requeued"].until_training()
    desk.slurm.run("scontrol", "requeue", jobs["requeued"].id)
    jobs["budget"].until_training()
    jobs["budget"].signal("--signal=USR1")
    jobs["killed"].until_training()
    desk.slurm.wait(lambda: list(jobs["killed"].run_dir.glob("checkpoints/*")), "a checkpoint")
    ranks = desk.slurm.processes_of(jobs["killed"].id, "SLURM_PROCID=0", "SLURM_STEP_ID=1")
    os.kill(ranks[0], signal.SIGKILL)
    return jobs


def assert_went_on(job: Submitted, *, steps: int, first: str, seed: int = 0) -> None:
    """The job was restarted once and ends with what an undisturbed run ends with."""
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("COMPLETED", "0:0", "1"), job.output
    assert job.outcome["state"] == undisturbed(steps, seed)
    # Slurm's SIGTERM goes to the ranks and to the script, which sends them SIGUSR1: either may be first.
    seen = [start.partition(" at ")[0].replace("SIGUSR1", first.rpartition(" ")[2]) for start in job.starts]
    assert seen == [first, "0 finished"]


def test_a_signal_saves_and_requeues_and_the_run_goes_on_where_it_was(jobs: dict[str, Submitted]) -> None:
    assert_went_on(jobs["signalled"], steps=40, first="75 stopped by SIGUSR1")
    assert f"stopped with a checkpoint; requeued as {jobs['signalled'].id}" in jobs["signalled"].output


def test_a_requeue_by_hand_saves_too_and_is_not_requeued_twice(jobs: dict[str, Submitted]) -> None:
    assert_went_on(jobs["requeued"], steps=40, first="75 stopped by SIGTERM")


def test_the_warning_before_the_time_limit_saves_and_requeues(jobs: dict[str, Submitted]) -> None:
    job = jobs["limit"]
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), job.output
    assert job.outcome["state"] == undisturbed(400)
    # The warning may find a start of a busy machine so early that its ranks cannot answer: that one leaves no word.
    assert any(start.startswith("75 stopped by SIGUSR1") for start in job.starts), job.starts
    assert len(job.starts) <= int(ended["Restarts"]) + 1


def test_a_killed_rank_takes_the_others_along_and_the_job_goes_on_from_its_checkpoint(
    jobs: dict[str, Submitted],
) -> None:
    job = jobs["killed"]
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.output
    assert job.starts == ["0 finished at step 40"]  # the first left no word
    assert job.outcome["state"] == undisturbed(40)
    assert "(exit code 137); requeued" in job.output


def test_a_cancelled_job_saves_and_is_not_requeued(jobs: dict[str, Submitted]) -> None:
    """Slurm itself would take it back: scontrol requeue of a cancelled job that is not gone yet succeeds."""
    job = jobs["cancelled"]
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), job.output
    assert job.outcome["exit_code"] == 75 and list(job.run_dir.glob("checkpoints/*/manifest.json"))
    assert "requeued as" not in job.output


def test_starts_that_bring_no_new_checkpoint_end_with_76(jobs: dict[str, Submitted]) -> None:
    job = jobs["fruitless"]
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "76:0", "2"), job.output
    assert len(job.starts) == 2 and "2 starts brought no new checkpoint (the newest is none)" in job.output


def test_the_budget_of_restarts_ends_with_75(jobs: dict[str, Submitted]) -> None:
    job = jobs["budget"]
    job.until_training(start=1)
    job.signal("--signal=USR1")
    ended = job.end()
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "1"), job.output
    assert "not requeued, for this was restart 1 of 1 (SFT_MAX_RESTARTS)" in job.output


def test_a_chain_goes_on_where_requeue_is_forbidden_and_its_last_link_has_nothing_to_do(
    jobs: dict[str, Submitted],
) -> None:
    ends = [jobs[name].end() for name in ("first link", "second link", "third link")]
    assert [end["ExitCode"] for end in ends] == ["75:0", "0:0", "0:0"], jobs["first link"].output
    assert [end["Restarts"] for end in ends] == ["0", "0", "0"]
    job = jobs["third link"]
    assert job.outcome["state"] == undisturbed(40) and len(job.starts) == 2
    assert "Slurm does not requeue" in job.output and "is complete, nothing is left to do" in job.output


@pytest.mark.parametrize("index", [3, 4])
def test_one_element_of_an_array_is_requeued_alone(desk: Desk, jobs: dict[str, Submitted], index: int) -> None:
    """Whichever: to Slurm the id of the last one is that of the whole array as well."""
    name = f"array{index}"
    array = desk.submit(name, "steps=60", "seed=%a", options=("--array=3-4",))
    elements = {i: Submitted(desk.slurm, f"{array.id}_{i}", desk.folder / f"{name}-{i}") for i in (3, 4)}
    elements[index].until_training()
    elements[index].signal("--signal=USR1")
    other = elements[7 - index].end()
    assert (other["JobState"], other["Restarts"]) == ("COMPLETED", "0"), array.output
    assert elements[7 - index].outcome["state"] == undisturbed(60, seed=7 - index)
    assert_went_on(elements[index], steps=60, seed=index, first="75 stopped by SIGUSR1")
    assert f"requeued as {array.id}_{index}" in array.output


def test_preemption_saves_with_and_without_grace(desk: Desk, jobs: dict[str, Submitted]) -> None:
    for job in jobs.values():
        job.end()
    preempted = [desk.submit(name, "steps=60", options=(f"--partition={name}",)) for name in ("low", "grace")]
    for job in preempted:
        job.until_training()
    desk.slurm.run("srun", "--partition=high", "--exclusive", "--nodes=2", "true")
    for job in preempted:
        assert_went_on(job, steps=60, first="75 stopped by SIGTERM")


def test_a_lost_node_costs_no_more_than_the_steps_since_the_checkpoint(desk: Desk, jobs: dict[str, Submitted]) -> None:
    job = desk.submit("lost", "steps=100", "every=5")
    job.until_training()
    desk.slurm.wait(lambda: list(job.run_dir.glob("checkpoints/*")), "a checkpoint")
    desk.slurm.kill_node("node1")  # that of rank 0 and of the script
    desk.slurm.wait(lambda: job.restarts > 0, "Slurm takes the job back")
    desk.slurm.start_node("node1")
    ended = job.end()
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), job.output
    assert job.outcome["state"] == undisturbed(100)
    assert job.starts == ["0 finished at step 100"]  # the first left no word
    desk.slurm.wait(lambda: desk.slurm.idle_nodes() == 2, "both nodes are idle again")
