"""The command lines of a Job, word by word."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.commands import Command, commands, shown
from launcher.job import Job, LaunchError, Via

PYTHON = "/opt/env/bin/python"


def job(*, via: Via = "local", num_processes: int = 2, verb_args: tuple[str, ...] = ()) -> Job:
    return Job(
        run_file="runs/my run.yaml",
        overrides=("optimizer.lr=1e-5",),
        verb_args=verb_args,
        via=via,
        num_processes=num_processes,
        master_port=23456,
    )


def test_local_starts_one_command_a_rank() -> None:
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "23456",
        "SFT_DIST_LAUNCHER": "local",
        "OMP_NUM_THREADS": "4",
    }
    argv = (PYTHON, "-m", "sft_dist", "train", "runs/my run.yaml", "optimizer.lr=1e-5", "--out", "x")
    assert commands(job(verb_args=("--out", "x")), python=PYTHON, num_cpus=9, environ={}) == (
        Command(name="rank 0", argv=argv, env={"RANK": "0", "LOCAL_RANK": "0", **shared}, to_terminal=True),
        Command(name="rank 1", argv=argv, env={"RANK": "1", "LOCAL_RANK": "1", **shared}),
    )


def test_deepspeed_starts_the_runner_beside_the_interpreter(tmp_path: Path) -> None:
    (tmp_path / "deepspeed").touch()
    python = str(tmp_path / "python")
    (command,) = commands(job(via="deepspeed"), python=python, num_cpus=9, environ={"OMP_NUM_THREADS": "1"})
    assert command.argv == (
        *(str(tmp_path / "deepspeed"), "--num_gpus", "2", "--master_addr", "127.0.0.1", "--master_port", "23456"),
        *("--no_local_rank", "--module", "sft_dist", "train", "runs/my run.yaml", "optimizer.lr=1e-5"),
    )
    assert command.env == {"SFT_DIST_LAUNCHER": "deepspeed"}
    assert (command.rank_depth, command.num_ranks, command.to_terminal) == (2, 2, True)


def test_deepspeed_without_a_script_is_run_as_a_module() -> None:
    (command,) = commands(job(via="deepspeed"), python=PYTHON, num_cpus=1, environ={})
    assert command.argv[:3] == (PYTHON, "-m", "deepspeed.launcher.runner")


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        ("", ("--num_gpus", "2")),
        ("0,1,2", ("--num_gpus", "2")),
        ("4,6", ("--include", "localhost:4,6")),
        ("4,6,7", ("--include", "localhost:4,6")),
    ],
)
def test_deepspeed_is_held_to_the_visible_gpus(visible: str, expected: tuple[str, ...]) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": visible}
    (command,) = commands(job(via="deepspeed"), python=PYTHON, num_cpus=1, environ=environ)
    assert command.argv[3:5] == expected


@pytest.mark.parametrize("visible", ["4", "GPU-1b2c,GPU-3d4e"])
def test_deepspeed_refuses_visible_gpus_it_cannot_be_told(visible: str) -> None:
    with pytest.raises(LaunchError, match="CUDA_VISIBLE_DEVICES") as caught:
        commands(job(via="deepspeed"), python=PYTHON, num_cpus=1, environ={"CUDA_VISIBLE_DEVICES": visible})
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("num_cpus", "expected"), [(2, "1"), (3, "1"), (8, "4")])
def test_the_cpus_are_shared_out_as_threads(num_cpus: int, expected: str) -> None:
    assert commands(job(), python=PYTHON, num_cpus=num_cpus, environ={})[0].env["OMP_NUM_THREADS"] == expected


def test_a_command_is_shown_as_a_line_for_the_shell() -> None:
    command = Command(name="rank 0", argv=(PYTHON, "run me.yaml", "a=$b"), env={"KEY": "x y"})
    assert shown(command) == "KEY='x y' /opt/env/bin/python 'run me.yaml' 'a=$b'"


@pytest.mark.parametrize("override", ["lr", "=3", "--lr=3"])
def test_an_override_that_is_not_key_value_is_refused(override: str) -> None:
    with pytest.raises(LaunchError, match="not key=value") as caught:
        Job(run_file="run.yaml", overrides=(override,), num_processes=1, master_port=23456)
    assert caught.value.exit_code == 2
