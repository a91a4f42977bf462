"""Runs over two hosts that know each other by address alone: ssh, pdsh, deepspeed, mpirun, no variable set by hand.

Each way gives the loss that two ranks of one host give, and nothing is left on either host, whatever happens.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from tests.cluster.hosts import Host, launch, missing, processes_of, two_hosts
from tests.end_to_end.conftest import Place, make_place
from tests.helpers.worlds import ROOT

LACKING = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LACKING is not None and os.environ.get("CI") != "true", reason=f"needs: {LACKING}"),
]
TIMEOUT_S = 120.0
STUB = Path(__file__).parents[1] / "launcher" / "stub_rank.py"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Host]]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"), checkpoint={"every": 1, "keep": 100})


@pytest.fixture(scope="module")
def losses(place: Place) -> list[float]:
    done = place.train("undisturbed")
    assert [rank.returncode for rank in done] == [0, 0], done[0].stdout
    return [entry["loss"] for entry in place.steps("undisturbed")]


@pytest.fixture
def hostfile(hosts: list[Host], tmp_path: Path) -> Path:
    path = tmp_path / "hosts"
    path.write_text("# two of them\n\n" + "".join(f"{host.address} slots=1\n" for host in hosts))
    return path


def until(condition: Callable[[], bool], job: "subprocess.Popen[str] | None" = None) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert job is None or job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(job: "subprocess.Popen[str]") -> tuple[int, str]:
    output, _ = job.communicate(timeout=TIMEOUT_S)
    return job.returncode, output


def assert_nothing_left(hosts: list[Host], *, within_s: float = 5) -> None:
    deadline = time.monotonic() + within_s
    while left := {host.name: processes_of(host) for host in hosts if processes_of(host)}:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    """A folder in which stub ranks stand in for sft-dist."""
    (tmp_path / "sft_dist").mkdir()
    (tmp_path / "sft_dist" / "__init__.py").touch()
    shutil.copy(STUB, tmp_path / "sft_dist" / "__main__.py")
    (tmp_path / "run folder").mkdir()
    (tmp_path / "run folder" / "run.yaml").touch()
    return tmp_path


def start_stubs(hosts: list[Host], stub: Path, hostfile: Path, via: str, *words: str) -> "subprocess.Popen[str]":
    run = stub / "run folder"
    job = launch(hosts[0], ["run", str(run / "run.yaml"), *words, "--via", via, "--hostfile", str(hostfile)], cwd=stub)
    until(lambda: len(list(run.glob("rank-*.json"))) == 2, job)
    assert all(processes_of(host) for host in hosts)
    return job


@pytest.mark.parametrize("via", ["deepspeed", "mpirun"])
def test_signals_and_arguments_reach_the_other_host(hosts: list[Host], stub: Path, hostfile: Path, via: str) -> None:
    odd = "a=x $HOME; 'y' \"z\""
    job = start_stubs(hosts, stub, hostfile, via, odd, "all=wait", "helper=1")
    for rank in range(2):
        seen = json.loads((stub / "run folder" / f"rank-{rank}.json").read_text())
        assert odd in seen["argv"]
        assert (seen["env"]["SFT_DIST_LAUNCHER"], seen["env"]["HF_HUB_OFFLINE"]) == (via, "1")
    job.send_signal(signal.SIGUSR1)
    code, output = ended(job)
    assert code == 75, output
    assert all(f"rank {rank} leaves, received ['SIGUSR1']" in output for rank in range(2)), output
    assert_nothing_left(hosts)


@pytest.mark.parametrize("via", ["deepspeed", "mpirun"])
def test_no_rank_on_another_host_outlives_a_launcher_killed_with_9(
    hosts: list[Host], stub: Path, hostfile: Path, via: str
) -> None:
    job = start_stubs(hosts, stub, hostfile, via, "all=deaf", "helper=1")
    job.kill()
    job.wait()
    assert_nothing_left(hosts, within_s=15)


def test_a_rank_killed_on_another_host_is_named_and_ends_the_run(hosts: list[Host], stub: Path, hostfile: Path) -> None:
    job = start_stubs(hosts, stub, hostfile, "mpirun", "all=wait", "helper=1")
    os.kill(json.loads((stub / "run folder" / "rank-1.json").read_text())["pids"][0], signal.SIGKILL)
    code, output = ended(job)
    assert code == 137, output
    assert f"rank 1 on {hosts[1].name} failed first: killed by SIGKILL" in output
    assert_nothing_left(hosts)


@pytest.mark.parametrize("via", ["deepspeed", "mpirun"])
def test_training_over_both_hosts_gives_the_same_losses(
    hosts: list[Host], place: Place, losses: list[float], hostfile: Path, via: str
) -> None:
    run = ["run", str(place.run_file), f"run_dir={place.folder / via}", "--via", via, "--hostfile", str(hostfile)]
    code, output = ended(launch(hosts[0], run, cwd=ROOT))
    assert code == 0, output
    assert [entry["loss"] for entry in place.steps(via)] == losses
    assert_nothing_left(hosts)


def test_a_host_lost_in_the_middle_ends_the_run_which_goes_on_when_it_is_back(
    hosts: list[Host], place: Place, losses: list[float], hostfile: Path
) -> None:
    run = [
        "run",
        str(place.run_file),
        f"run_dir={place.folder / 'lost'}",
        "--via",
        "mpirun",
        "--hostfile",
        str(hostfile),
    ]
    # Rank 0 is held in a step, so that there is a middle to be in.
    environ = {"SFT_DIST_FAULTS": "save.after_shards:rank=0:step=3:restart=0:sleep=300"}
    job = launch(hosts[0], run, cwd=ROOT, environ=environ)
    until(lambda: (place.folder / "lost" / "checkpoints" / "step-00000002" / "manifest.json").exists(), job)
    hosts[1].cut_off()
    code, output = ended(job)
    assert code == 69, output
    assert f"rank 1 on {hosts[1].name}" in output
    assert_nothing_left(hosts, within_s=40)  # on the lost host, too: its keeper misses the launcher
    hosts[1].come_back()
    code, output = ended(launch(hosts[0], run, cwd=ROOT))
    assert code == 0, output
    assert "resumed from" in output
    assert place.steps("lost")[-1]["loss"] == losses[-1]
    assert_nothing_left(hosts)


def test_both_hosts_prepare_the_bytes_that_one_process_does(hosts: list[Host], place: Place, hostfile: Path) -> None:
    alone = place.verb("prepare", str(place.run_file), f"data.cache_dir={place.folder / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    words = ["run", str(place.run_file), f"data.cache_dir={place.folder / 'both'}", "--verb", "prepare"]
    code, output = ended(launch(hosts[0], [*words, "--via", "mpirun", "--hostfile", str(hostfile)], cwd=ROOT))
    assert code == 0, output
    assert output.count("train:") == 1, "one rank speaks"
    assert digests(place.folder / "both") == digests(place.folder / "alone")
    assert_nothing_left(hosts)


def test_the_preflight_has_a_line_for_each_host(hosts: list[Host], place: Place, hostfile: Path) -> None:
    words = ["check", str(place.run_file), f"run_dir={place.folder / 'checked'}", "--via", "mpirun"]
    code, output = ended(launch(hosts[0], [*words, "--hostfile", str(hostfile)], cwd=ROOT))
    assert code == 0, output
    assert all(any(line.startswith(host.name) for line in output.splitlines()) for host in hosts), output
    assert f"2 ranks meet at {hosts[0].address}:" in output and "interface eth0" in output and "GB/s" in output
    assert_nothing_left(hosts)


def test_mpiexec_by_hand_meets_at_an_address_that_both_hosts_reach(
    hosts: list[Host], place: Place, losses: list[float]
) -> None:
    mpiexec = str(Path(sys.executable).with_name("mpiexec"))
    where = ["-localhost", hosts[0].address, "-hosts", ",".join(host.address for host in hosts), "-n", "2"]
    words = [sys.executable, "-m", "sft_dist", "train", str(place.run_file), f"run_dir={place.folder / 'by-hand'}"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        hosts[0].command(mpiexec, *where, *words), env=environ, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    assert [entry["loss"] for entry in place.steps("by-hand")] == losses


def digests(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}
