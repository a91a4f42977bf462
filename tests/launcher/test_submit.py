"""What `sft-launch submit` composes, and what it refuses before anything reaches a queue."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.__main__ import main
from launcher.job import LaunchError
from launcher.submit import Submission, find_script, sbatch_argv, time_limit_s

from .conftest import ROOT


def line(**changes: object) -> str:
    submission = Submission(**{"run_file": "runs/support.yaml", "gpus_per_node": 8, **changes})  # type: ignore[arg-type]
    return shlex.join(sbatch_argv(submission, Path("slurm/train.sbatch")))


def test_the_least_there_is_to_say() -> None:
    assert line() == (
        "sbatch --parsable --job-name=support --nodes=1 --ntasks-per-node=8 --gpus-per-node=8 "
        "slurm/train.sbatch runs/support.yaml"
    )


def test_everything_there_is_to_say() -> None:
    assert line(
        nodes=4,
        cpus_per_task=16,
        partition="gpu",
        account="me",
        time="2-12:00:00",
        array="0-4%2",
        may_requeue=False,
        sbatch_options=("--qos=long", "--exclude=node7"),
        overrides=("seed=%a", "run_dir=a b"),
    ) == (
        "sbatch --parsable --job-name=support --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=16 "
        "--partition=gpu --account=me --time=2-12:00:00 --array=0-4%2 --output=slurm-%x-%A_%a.out --no-requeue "
        "--qos=long --exclude=node7 slurm/train.sbatch runs/support.yaml seed=%a 'run_dir=a b'"
    )


def test_a_link_of_a_chain_begins_however_the_one_before_ended() -> None:
    assert "--dependency=afterany:4711 " in line(depend_on="4711")


def test_without_gpus_there_is_one_rank_a_node() -> None:
    assert "--ntasks-per-node=1 --gpus-per-node=0 " in line(gpus_per_node=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"array": "0-2", "depend_on": "1"}, "not both"),
        ({"nodes": 0}, "--nodes must be at least 1"),
        ({"overrides": ("seed",)}, "'seed' is not key=value"),
        ({"time": "1 day"}, "--time 1 day: expected minutes"),
        ({"sbatch_options": ("qos=long",)}, "--sbatch=qos=long: expected an option of sbatch"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(LaunchError, match=said) as error:
        line(**changes)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("24:00:00", 86_400),
        ("2-0", 172_800),
        ("1-2:03", 93_780),
        ("1-2:03:04", 93_784),
        ("UNLIMITED", float("inf")),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, seconds: float) -> None:
    assert time_limit_s(text) == seconds


@given(st.integers(1, 40))
@example(minutes=5)
@example(minutes=19)
def test_the_warning_never_comes_at_once(minutes: int) -> None:
    options = [word for word in shlex.split(line(time=str(minutes))) if word.startswith("--signal=USR1@")]
    warning_s = int(options[0].partition("@")[2]) if options else 300  # as train.sbatch says
    assert warning_s <= minutes * 60 / 4


@pytest.mark.parametrize("time", ["0", "UNLIMITED", "20", "1-0"])
def test_a_long_job_has_the_warning_of_the_script(time: str) -> None:
    assert "--signal" not in line(time=time)


def stand_in(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("array", [(), ("--array", "0-1")])
def test_a_submission_checks_the_run_file_and_prints_the_id_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], array: tuple[str, ...]
) -> None:
    stand_in(tmp_path, "sbatch", f'echo "$@" > {tmp_path}/call; echo "4711;cluster"')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    run_file = tmp_path / "support.yaml"
    run_file.write_text("run_dir: runs/a\nmodel: {path: m}\n")
    assert main(["submit", str(run_file), "--gpus-per-node", "8", *array]) == 0
    printed = capsys.readouterr()
    assert printed.out == "4711\n"
    assert ("slurm-support-4711_INDEX.out" if array else "slurm-support-4711.out") in printed.err
    run_file.write_text("run_dir: runs/a\nmodle: {path: m}\n")
    (tmp_path / "call").unlink()
    assert main(["submit", str(run_file), "--gpus-per-node", "8"]) == 78
    assert not (tmp_path / "call").exists()


def test_a_refusal_of_sbatch_is_69(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(tmp_path, "sbatch", "exit 1")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main(["submit", "%a.yaml", "--gpus-per-node", "8"]) == 69
    assert "sbatch refused the job" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["submit", "r.yaml", "--gpus-per-node", "8"], ["status", "runs/a"]])
def test_arguments_of_a_verb_are_refused_where_there_is_none(
    capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    assert main([*command, "--", "--profile"]) == 2
    assert "nothing follows --" in capsys.readouterr().err


def test_the_script_says_the_same_warning_and_is_found() -> None:
    assert find_script() == ROOT / "slurm" / "train.sbatch"
    assert "#SBATCH --signal=USR1@300\n" in find_script().read_text()


def test_a_dry_run_prints_what_can_be_pasted_and_asks_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "no-such.yaml", "seed=1", "--nodes", "2", "--gpus-per-node", "4", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert shlex.split(printed)[-3:] == [str(find_script()), "no-such.yaml", "seed=1"]


def test_submit_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", "%a.yaml", "--gpus-per-node", "8"]) == 69
    assert "is this a login node" in capsys.readouterr().err
