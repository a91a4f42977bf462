"""Launches of the stub as a person would start them: `python -m launcher run ...` in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.processes import all_processes, kill_sessions, send_signal

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60.0


@dataclass
class Launch:
    """A launcher at work, and the run folder its stub ranks write to."""

    process: subprocess.Popen[str]
    run_dir: Path

    def rank(self, rank: int) -> dict:
        """What the stub rank wrote when it was up; waits for it."""
        path = self.run_dir / f"rank-{rank}.json"
        self.wait_until(path.exists, f"rank {rank} did not come up")
        return json.loads(path.read_text())

    def pids(self, num_ranks: int) -> list[int]:
        """Process ids of the ranks and their helpers, once all are up."""
        return [pid for rank in range(num_ranks) for pid in self.rank(rank)["pids"]]

    def let_ranks_exit(self) -> None:
        (self.run_dir / "go").touch()

    def wait_until(self, condition: Callable[[], bool], failure: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, failure
            time.sleep(0.01)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of the launcher."""
        stdout, stderr = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, stdout, stderr


Start = Callable[..., Launch]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `sft-launch run` over stub ranks; whatever a failing test leaves behind is killed afterwards."""
    package = tmp_path / "stub" / "sft_dist"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("stub_rank.py"), package / "__main__.py")
    run_dir = tmp_path / "run folder"
    run_dir.mkdir()
    (run_dir / "run.yaml").touch()
    launches: list[Launch] = []

    def start_one(*arguments: str, env: dict[str, str] | None = None, stderr: int = subprocess.PIPE) -> Launch:
        process = subprocess.Popen(
            [sys.executable, "-m", "launcher", "run", str(run_dir / "run.yaml"), *arguments],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}",
                "TMPDIR": str(tmp_path),
                **(env or {}),
            },
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # pytest itself may have been started with SIGINT ignored (`pytest &` in a script).
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        launches.append(Launch(process, run_dir))
        return launches[-1]

    yield start_one
    for launch in launches:
        launch.process.kill()
    strays = [int(pid) for file in run_dir.glob("rank-*.json") for pid in json.loads(file.read_text())["pids"]]
    # Never our own session, in which ranks of a broken launcher would be: it may be that of the person at the keyboard.
    sessions = {process.session for process in all_processes() if process.pid in strays} - {os.getsid(0)}
    kill_sessions(sessions, timeout_s=TIMEOUT_S)
    send_signal(strays, signal.SIGKILL)
    for launch in launches:
        launch.process.communicate(timeout=TIMEOUT_S)  # after the strays, which hold the other end of its pipes


def assert_gone(pids: list[int], *, within_s: float = 0.0, zombies_allowed: bool = False) -> None:
    """No process of `pids` runs. A zombie counts as one, unless its launcher was killed and process 1 does not reap."""
    deadline = time.monotonic() + within_s
    while True:
        states = {p.pid: p.state for p in all_processes() if p.pid in pids}
        left = {pid: state for pid, state in states.items() if not (zombies_allowed and state == "Z")}
        if not left:
            return
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.02)
