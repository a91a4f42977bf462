"""The real ways of starting several ranks: sft-launch, deepspeed, torchrun and mpiexec give the same run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Place
from tests.helpers.worlds import ROOT, free_port

pytestmark = pytest.mark.slow

BIN = Path(sys.executable).parent
ENV = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
TRAIN = ["sft_dist", "train", "ARGUMENTS"]
SHORT = ["schedule.max_steps=2", "evaluate.every=0"]


def launch(command: list[str], place: Place, run: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(place.run_file), f"run_dir={place.folder / run}", *SHORT, *overrides]
    return subprocess.run(
        [word for part in command for word in (arguments if part == "ARGUMENTS" else [part])],
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def losses(place: Place) -> list[float]:
    """Losses of two ranks started by sft-launch itself."""
    done = launch([str(BIN / "sft-launch"), "run", "ARGUMENTS", "--nproc", "2"], place, "by-local")
    assert done.returncode == 0, done.stderr
    return [entry["loss"] for entry in place.steps("by-local")]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("deepspeed", ["deepspeed", "--num_gpus", "2", "--master_port", "PORT", "--module", *TRAIN]),
        ("torchrun", ["torchrun", "--nproc_per_node", "2", "--master_port", "PORT", "-m", *TRAIN]),
        ("mpiexec", ["mpiexec", "-n", "2", "python", "-m", *TRAIN]),
        ("sft-launch-deepspeed", ["sft-launch", "run", "ARGUMENTS", "--via", "deepspeed", "--nproc", "2"]),
        ("sft-launch-torchrun", ["sft-launch", "run", "ARGUMENTS", "--via", "torchrun", "--nproc", "2"]),
        ("sft-launch-mpirun", ["sft-launch", "run", "ARGUMENTS", "--via", "mpirun", "--nproc", "2"]),
    ],
)  # fmt: skip
def test_other_launchers_give_the_same_run(place: Place, losses: list[float], name: str, command: list[str]) -> None:
    words = [str(free_port()) if word == "PORT" else word for word in command]
    done = launch([str(BIN / words[0]), *words[1:]], place, f"by-{name}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["loss"] for entry in place.steps(f"by-{name}")] == losses
    assert json.loads((place.folder / f"by-{name}" / "summary.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("via", ["local", "deepspeed"])
def test_the_launcher_gives_the_code_of_the_run(place: Place, via: str) -> None:
    command = [str(BIN / "sft-launch"), "run", "ARGUMENTS", "--via", via, "--nproc", "2"]
    stopped = launch(command, place, f"stop-{via}", "checkpoint.stop_at_step=1")
    assert stopped.returncode == 75, stopped.stderr
    refused = launch(command, place, f"stop-{via}", "seed=9")
    assert refused.returncode == 78, refused.stderr
    assert "seed: 3 in the checkpoint, 9 now" in refused.stdout + refused.stderr
    finished = launch(command, place, f"stop-{via}")
    assert finished.returncode == 0, finished.stderr


def test_a_run_file_that_is_wrong_is_told_before_any_rank_starts(place: Place) -> None:
    done = launch([str(BIN / "sft-launch"), "run", "ARGUMENTS", "--nproc", "2"], place, "wrong", "seeed=1")
    assert done.returncode == 78 and "did you mean seed?" in done.stderr
    assert not (place.folder / "wrong").exists()
