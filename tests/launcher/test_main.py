"""The command line up to the point where ranks would start."""

from __future__ import annotations

import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.host import count_gpus, free_port, master_ports, port_problem
from launcher.job import LaunchError

from .conftest import ROOT, Start


def test_importing_the_launcher_loads_neither_torch_nor_sft_dist() -> None:
    program = (
        "import sys, launcher.__main__, launcher.guard\n"
        "foreign = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(foreign - {'__main__'}))"
    )
    # -S: without site-packages, whose .pth files load modules of their own.
    answer = subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "['launcher']"


def test_dry_run_prints_the_lines_and_the_environment_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port(master_ports(32_768), seed=0)
    arguments = [
        "run",
        "no such.yaml",
        "a=1",
        "--nproc",
        "2",
        "--dry-run",
        f"--master-port={port}",
        "b=2 3",
        "--",
        "-x",
    ]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("#")] == ["# rank 0", "# rank 1"]
    words = shlex.split(lines[3])
    assert {"RANK=1", "LOCAL_RANK=1", "WORLD_SIZE=2", f"MASTER_PORT={port}"} < set(words)
    program = words[words.index(sys.executable) :]
    assert program == [sys.executable, "-m", "sft_dist", "train", "no such.yaml", "a=1", "b=2 3", "-x"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["run"], "RUN_YAML"),
        (["run", "r.yaml", "--nproc", "0"], "--nproc must be at least 1"),
        (["run", "r.yaml", "--via", "pigeon"], "pigeon"),
        (["run", "r.yaml", "--bogus", "1"], "--bogus"),
        (["run", "r.yaml", "lr"], "'lr' is not key=value"),
        (["run", "r.yaml", "--master-port", "70000"], "1..65535"),
        (["run", "r.yaml", "--grace-s", "-1"], "--grace-s"),
        (["run", "r.yaml", "--hostfile", "/no such file", "--via", "deepspeed"], "/no such file"),
        (["run", "r.yaml", "--nodes", "2"], "this machine alone"),
        (["check", "r.yaml", "--nodes", "2"], "this machine alone"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("sft-launch: ") and stderr.count("\n") == 1
    assert complaint in stderr


def test_help_goes_to_stdout_and_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["run", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in ("--verb", "--via", "--nproc", "--master-port", "--log-dir", "--grace-s", "--hostfile", "--dry-run"):
        assert option in text


def test_a_port_in_use_is_named_before_any_rank_starts(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        launch = start("--nproc", "2", "--master-port", str(port))
        code, stdout, stderr = launch.end()
    assert code == 69
    assert f"port {port} cannot be used" in stderr and "--master-port" in stderr
    assert stdout == "" and not list(launch.run_dir.glob("rank-*"))


def test_a_run_file_that_sft_dist_refuses_starts_no_rank(start: Start) -> None:
    launch = start("--nproc", "2", "refuse=1")
    code, _, stderr = launch.end()
    assert code == 78
    assert stderr.splitlines()[0] == "ConfigError: no such key 'refuse'"
    assert "no rank was started" in stderr and "Traceback" not in stderr
    assert not list(launch.run_dir.glob("rank-*"))


def test_a_derived_port_lies_below_the_ephemeral_ones_and_is_free() -> None:
    ports = master_ports(32_768)
    assert ports == range(20_000, 32_768)
    port = free_port(ports, seed=123_456)
    assert port in ports and port_problem(port) is None
    with socket.create_server(("", port)):
        assert port_problem(port) is not None
        assert free_port(ports, seed=port - ports.start) != port
        with pytest.raises(LaunchError, match="no free port"):
            free_port(range(port, port + 1), seed=0)


@pytest.mark.parametrize(
    ("visible", "num_gpus"), [("", 0), ("0", 1), ("2,3", 2), ("0,-1,2", 1), ("-1", 0), ("GPU-1b,GPU-2c", 2)]
)
def test_visible_devices_say_how_many_gpus_there_are(visible: str, num_gpus: int) -> None:
    assert count_gpus({"CUDA_VISIBLE_DEVICES": visible, "PATH": ""}) == num_gpus


def test_gpus_are_counted_with_nvidia_smi_where_it_is_there(tmp_path: Path) -> None:
    assert count_gpus({"PATH": str(tmp_path)}) == 0
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: H200 (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: H200 (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    assert count_gpus({"PATH": str(tmp_path)}) == 2


def test_a_driver_that_does_not_answer_is_no_machine_without_gpus(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexit 9\n")
    program.chmod(0o755)
    with pytest.raises(LaunchError, match=r"exit status 9.*--nproc") as caught:
        count_gpus({"PATH": str(tmp_path)})
    assert caught.value.exit_code == 69
