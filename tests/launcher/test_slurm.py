"""train.sbatch, run as Slurm would run it, with stand-ins for the commands of Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.host import free_port
from launcher.restarts import Restarts

from .conftest import ROOT, TIMEOUT_S, Launch

SCRIPT = ROOT / "slurm" / "train.sbatch"

# Each notes how it was called. srun runs one task, then ends as SRUN_CODE says, for it may kill tasks that end well.
STAND_INS = {
    "scontrol": """
        case "$1 $2" in
            "show hostnames") echo "${FAKE_HOST:-localhost}"; echo node2 ;;
            "show job")
                # Asked for the plain id of an array, or of its last element, Slurm answers with all of them.
                [ "$4" = "${SLURM_ARRAY_JOB_ID:-}" ] && echo "JobId=0 JobState=PENDING EndTime=Unknown Reason=None"
                [[ " ${SILENT:-} " == *" $(grep -c 'scontrol show job' "$CALLS") "* ]] && exit 1
                echo "JobId=1 JobState=${JOB_STATE:-RUNNING} EndTime=${END_TIME:-Unknown} Reason=None" ;;
            "show node") echo "NodeName=$3 Arch=x86_64"; echo "   NodeAddr=10.1.2.3 NodeHostName=$3 Version=22.05" ;;
            requeue*) exit "${REQUEUE_CODE:-0}" ;;
        esac""",
    "srun": """
        if [ "${@: -1}" = true ]; then exit "${NODE_CODE:-0}"; fi
        while [[ $1 == --* ]]; do shift; done
        export RANK=0
        if [ -z "${SRUN_CODE:-}" ]; then exec "$@"; fi
        "$@"
        exit "$SRUN_CODE" """,
    "apptainer": """
        while [ "$1" != python ]; do shift; done
        exec "$@" """,
}


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str
    calls: str  # of the stand-ins, one a line
    run_dir: Path

    @property
    def requeued(self) -> list[str]:
        return [line.split()[-1] for line in self.calls.splitlines() if line.startswith("scontrol requeue")]


def submit(
    tmp_path: Path,
    *arguments: str,
    env: dict[str, str] | None = None,
    signum: signal.Signals | None = None,
    before: int = 75,
) -> Result:
    """Run the script to its end, sending it `signum` once rank 0 is up; the start before ended with `before`."""
    programs, run_dir, package = tmp_path / "bin", tmp_path / "run folder", tmp_path / "sft_dist"
    for folder in (programs, run_dir, package):
        folder.mkdir()
    for name, body in STAND_INS.items():
        (programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> "$CALLS"\n{body}\n')
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("stub_rank.py"), package / "__main__.py")
    (run_dir / "run.yaml").touch()
    (run_dir / "go").touch()
    (run_dir / "outcome.json").write_text(f'{{"exit_code": {before}, "reason": "of an earlier start", "step": 1}}')
    job = subprocess.Popen(
        ["bash", str(SCRIPT), str(run_dir / "run.yaml"), *arguments],
        cwd=tmp_path,
        env={
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(tmp_path),
            "CALLS": str(tmp_path / "calls"),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_CPUS_PER_TASK": "12",
            **(env or {}),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if signum is not None:
        Launch(job, run_dir).rank(0)
        job.send_signal(signum)
    stdout, stderr = job.communicate(timeout=TIMEOUT_S)
    calls = tmp_path / "calls"
    return Result(job.returncode, stdout, stderr, calls.read_text() if calls.exists() else "", run_dir)


@pytest.mark.parametrize("name", ["train.sbatch", "env.example.sh"])
def test_the_scripts_are_bash(name: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / name)], check=True)


def test_a_run_that_is_done_is_not_requeued(tmp_path: Path) -> None:
    result = submit(tmp_path, "a=b c", "outcome=0")
    assert (result.code, result.stderr, result.requeued) == (0, "", [])
    assert f"python -m sft_dist train {result.run_dir}/run.yaml a=b c outcome=0" in result.calls
    assert f"--kill-on-bad-exit=1 --wait=60 --open-mode=append --output={tmp_path}/slurm-logs/123456/rank-%t.log" in (
        result.calls
    )


def test_the_ranks_are_told_where_rank_0_is(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"FAKE_HOST": "no-such-host.invalid"})
    assert "master 10.1.2.3:23456" in result.stdout
    assert '"MASTER_ADDR": "10.1.2.3"' in (result.run_dir / "rank-0.json").read_text()
    assert '"MASTER_PORT": "23456"' in (result.run_dir / "rank-0.json").read_text()


def test_a_port_that_somebody_listens_on_is_passed_over(tmp_path: Path) -> None:
    port = free_port(range(20_000, 29_000), seed=os.getpid())
    with socket.create_server(("127.0.0.1", port)):
        result = submit(tmp_path, env={"FAKE_HOST": "127.0.0.1", "SLURM_JOB_ID": str(50_000 + port)})
    (chosen,) = re.findall(r"master 127\.0\.0\.1:(\d+)", result.stdout)
    # Not the next one, which is the next job's.
    assert int(chosen) > port and (int(chosen) - port) % 97 == 0
    assert f'"MASTER_PORT": "{chosen}"' in (result.run_dir / "rank-0.json").read_text()


def test_a_port_of_the_site_is_taken_as_it_is(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # whose port is to be avoided, were it not asked for
        port = server.getsockname()[1]
        (tmp_path / "site.sh").write_text(f"MASTER_PORT={port}\n")
        result = submit(tmp_path, env={"SFT_ENV_FILE": str(tmp_path / "site.sh"), "FAKE_HOST": "127.0.0.1"})
    assert f"master 127.0.0.1:{port}," in result.stdout
    assert f'"MASTER_PORT": "{port}"' in (result.run_dir / "rank-0.json").read_text()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        ({}, "123456"),
        ({"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "7"}, "99_7"),
        ({"SLURM_ARRAY_JOB_ID": "123456", "SLURM_ARRAY_TASK_ID": "7"}, "123456_7"),
    ],
    ids=["job", "array element", "array element with the id of the array"],
)
def test_75_requeues_this_job_and_no_other(tmp_path: Path, array: dict[str, str], expected: str) -> None:
    result = submit(tmp_path, "all=exit:75", env=array)
    assert (result.code, result.requeued) == (75, [expected])


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1], ids=lambda signum: signum.name)
def test_a_signal_to_the_script_reaches_the_ranks_and_their_code_is_awaited(
    tmp_path: Path, signum: signal.Signals
) -> None:
    result = submit(tmp_path, "all=wait", signum=signum)
    # Of a real srun SIGTERM kills the tasks, and SIGUSR1 reaches them.
    assert "received ['SIGUSR1']" in result.stdout
    assert (result.code, result.requeued) == (75, ["123456"])


def test_the_outcome_comes_before_the_code_of_srun(tmp_path: Path) -> None:
    result = submit(tmp_path, "all=exit:75", "outcome=75", env={"SRUN_CODE": "137"})
    assert (result.code, result.requeued) == (75, ["123456"])


def test_the_outcome_of_an_earlier_start_does_not_count(tmp_path: Path) -> None:
    result = submit(tmp_path, "all=exit:65")
    assert (result.code, result.requeued) == (65, [])


@pytest.mark.parametrize("code", [0, 1, 2, 65, 69, 70, 74, 75, 76, 78, 137])
def test_what_is_tried_again_is_what_sft_launch_tries_again(tmp_path: Path, code: int) -> None:
    result = submit(tmp_path, f"all=exit:{code}", f"outcome={code}")
    assert result.requeued == (["123456"] if Restarts(after_stop=True).may_mend(code) else [])
    assert result.code == code
    assert f"rank 0 leaves with {code}: received []" in result.stdout


@pytest.mark.parametrize("silent", ["1", "2", "1 2 3"])
def test_a_controller_that_does_not_answer_at_once_is_asked_again(tmp_path: Path, silent: str) -> None:
    env = {"SILENT": silent, "END_TIME": "2999-01-01T00:00:00", "TZ": "UTC"}
    result = submit(tmp_path, "all=exit:75", env=env)
    assert (result.code, result.requeued) == (75, ["123456"])
    assert '"SLURM_JOB_END_TIME": "32472144000"' in (result.run_dir / "rank-0.json").read_text()


def test_a_controller_that_is_gone_costs_no_requeue_and_sets_no_end(tmp_path: Path) -> None:
    env = {"SILENT": "1 2", "SFT_SLURM_PATIENCE_S": "0"}
    assert submit(tmp_path, "all=exit:75", env=env).requeued == ["123456"]
    assert "SLURM_JOB_END_TIME" not in (tmp_path / "run folder" / "rank-0.json").read_text()


def test_an_array_element_has_arguments_and_a_folder_of_its_own(tmp_path: Path) -> None:
    env = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "7"}
    result = submit(tmp_path, "seed=%a", "name=run-%a-%a", env=env)
    assert f"seed=7 name=run-7-7 run_dir={result.run_dir}-7\n" in result.calls
    assert (tmp_path / "slurm-logs" / "99_7" / "starts").exists()


def test_an_array_element_may_be_given_its_folder(tmp_path: Path) -> None:
    env = {"SLURM_ARRAY_JOB_ID": "99", "SLURM_ARRAY_TASK_ID": "7"}
    assert "run.yaml run_dir=mine/7\n" in submit(tmp_path, "run_dir=mine/%a", env=env).calls


def test_ranks_get_the_cores_that_were_asked_for(tmp_path: Path) -> None:
    submit(tmp_path)
    told = json.loads((tmp_path / "run folder" / "rank-0.json").read_text())["env"]
    assert (told["SRUN_CPUS_PER_TASK"], told["OMP_NUM_THREADS"]) == ("12", "12")


def test_the_facts_of_a_site_are_read(tmp_path: Path) -> None:
    (tmp_path / "site.sh").write_text("export SITE=here\nSFT_MAX_FRUITLESS=0\n")
    result = submit(tmp_path, env={"SFT_ENV_FILE": str(tmp_path / "site.sh")})
    assert result.code == 76
    assert "0 starts brought no new checkpoint (the newest is none)" in result.stdout


def test_facts_of_a_site_that_are_not_there_are_missed(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"SFT_ENV_FILE": "/no/such/file"})
    assert result.code == 2 and "SFT_ENV_FILE=/no/such/file: no such file" in result.stderr


@pytest.mark.parametrize(
    ("starts", "code"), [("none\nnone\nnone\n", 76), ("none\nnone\n", 0), ("none\nold\nnone\nnone\n", 0)]
)
def test_starts_in_a_row_that_bring_nothing_have_an_end(tmp_path: Path, starts: str, code: int) -> None:
    (tmp_path / "slurm-logs" / "123456").mkdir(parents=True)
    (tmp_path / "slurm-logs" / "123456" / "starts").write_text(starts)
    assert submit(tmp_path).code == code


@pytest.mark.parametrize(
    ("before", "code", "starts"), [(0, 0, False), (78, 78, False), (76, 76, False), (70, 0, True), (75, 0, True)]
)
def test_a_link_of_a_chain_does_what_is_left(tmp_path: Path, before: int, code: int, starts: bool) -> None:
    result = submit(tmp_path, env={"SLURM_JOB_DEPENDENCY": "afterany:1"}, before=before)
    assert (result.code, "sft_dist train" in result.calls) == (code, starts)


def test_what_slurm_reads_of_the_script() -> None:
    options = re.findall(r"^#SBATCH --(\S+)", SCRIPT.read_text(), re.MULTILINE)
    # Without the first the loss of a node ends the job; without the second a restart empties the log.
    assert {"requeue", "open-mode=append", "signal=USR1@300"} <= set(options)


@pytest.mark.parametrize("action", ["outcome=69", "told=no"])
def test_69_is_tried_again_where_rank_0_says_that_another_is_gone(tmp_path: Path, action: str) -> None:
    """Without its word the run folder may be in use: to come back would only disturb the run that has it."""
    result = submit(tmp_path, "all=exit:69", action)
    assert (result.code, result.requeued) == (69, ["123456"] if action == "outcome=69" else [])


@pytest.mark.parametrize("code", [137, 143])
def test_a_rank_that_was_killed_is_tried_again(tmp_path: Path, code: int) -> None:
    assert submit(tmp_path, "all=exit:0", env={"SRUN_CODE": str(code)}).requeued == ["123456"]


def test_other_codes_are_tried_again_on_request(tmp_path: Path) -> None:
    assert submit(tmp_path, "all=exit:65", env={"SFT_REQUEUE_CODES": "2 65"}).requeued == ["123456"]


@pytest.mark.parametrize(("end_time", "requeued"), [("2001-01-01T00:00:00", ["123456"]), ("2999-01-01T00:00:00", [])])
def test_a_job_that_slurm_ends_is_requeued_at_its_time_limit_alone(
    tmp_path: Path, end_time: str, requeued: list[str]
) -> None:
    """Before, it was cancelled, or Slurm requeues it by itself."""
    result = submit(tmp_path, "all=exit:75", env={"JOB_STATE": "COMPLETING", "END_TIME": end_time})
    assert (result.code, result.requeued) == (75, requeued)


def test_a_node_that_starts_nothing_sends_the_job_back(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"NODE_CODE": "1"})
    assert (result.code, result.requeued) == (69, ["123456"])
    assert "sft_dist train" not in result.calls


def test_the_ranks_are_told_when_the_job_ends(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"END_TIME": "2001-09-09T01:46:40", "TZ": "UTC"})
    assert '"SLURM_JOB_END_TIME": "1000000000"' in (result.run_dir / "rank-0.json").read_text()


def test_without_a_time_limit_nothing_is_told(tmp_path: Path) -> None:
    submit(tmp_path, env={"END_TIME": "Unknown"})
    assert "SLURM_JOB_END_TIME" not in (tmp_path / "run folder" / "rank-0.json").read_text()


def test_a_container_is_entered_for_every_command_of_sft_dist(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"SFT_CONTAINER": "apptainer:/images/sft.sif", "SFT_CONTAINER_MOUNTS": "/a,/b"})
    entered = [line for line in result.calls.splitlines() if line.startswith("apptainer")]
    assert result.code == 0
    assert [line.split(" sft_dist ")[1].split()[0] for line in entered] == ["config", "train"]
    assert entered[0].startswith("apptainer exec --nv --bind /a,/b /images/sft.sif python -m")


def test_a_pyxis_container_belongs_to_srun(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"SFT_CONTAINER": "pyxis:registry#sft:1"})
    entered = [line for line in result.calls.splitlines() if "--container-image=registry#sft:1" in line]
    assert result.code == 0
    assert [line.split(" sft_dist ")[1].split()[0] for line in entered] == ["config", "train"]


def test_an_unknown_container_is_refused(tmp_path: Path) -> None:
    result = submit(tmp_path, env={"SFT_CONTAINER": "sft.sif"})
    assert result.code == 2 and "expected apptainer:IMAGE or pyxis:IMAGE" in result.stderr


def test_the_restarts_have_an_end(tmp_path: Path) -> None:
    result = submit(tmp_path, "all=exit:75", env={"SLURM_RESTART_COUNT": "3", "SFT_MAX_RESTARTS": "3"})
    assert (result.code, result.requeued) == (75, [])
    assert "not requeued" in result.stdout


def test_a_refused_run_file_starts_no_rank(tmp_path: Path) -> None:
    result = submit(tmp_path, "refuse=1")
    assert result.code == 78
    assert "ConfigError" in result.stderr and "srun" not in result.calls
