"""Python processes that begin with torch, transformers and deepspeed imported, which costs each one six seconds else.

`start(arguments, environment)` is `python ARGUMENTS` as a real process of its own: a fork of a server that has imported
those libraries and nothing of this project. Servers with different hash seeds take turns, so that neither ranks nor a
run and the one that resumes it agree on the order of a set by accident. What the launchers start is started from
nothing, and so is a process whose environment differs from the server's in what libraries read as they are imported,
and every process where there is a GPU, which does not outlive a fork.

`python -m tests.helpers.warm SOCKET` is a server. To each connection it forks a watcher, and that the process; the
watcher answers with a line for its id and one for how it ended.
"""

import atexit
import gc
import importlib
import itertools
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from launcher.processes import die_with_parent, living_members

ROOT = Path(__file__).resolve().parents[2]
NUM_SERVERS = 3
LIBRARIES = ("torch._dynamo", "transformers.modeling_utils", "deepspeed", "datasets", "torch.utils.tensorboard")
# Not those that torch and deepspeed set in the tests' own process, which only they read, and late.
READ_AT_IMPORT = ("CUDA", "HF_H", "HOME", "LANG", "LC_", "LD_", "MKL_", "OMP_", "PYTHON", "TRANSFORMERS", "XDG_")
_START_S = 120.0
_turns = itertools.count()


def with_one_thread(environment: Mapping[str, str]) -> dict[str, str]:
    return dict(environment) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


class Process:
    """As much of subprocess.Popen as tests ask of a process that a server started; its output lies in files."""

    def __init__(self, connection: socket.socket, args: list[str], stdout: IO[str], stderr: IO[str] | None) -> None:
        self._connection = connection
        self._answers = connection.makefile("r")
        self._outputs = stdout, stderr
        self.args = args
        self.pid = int(self._answers.readline())
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self.returncode = os.waitstatus_to_exitcode(int(self._answers.readline()))
            self._connection.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(timeout=0)
        except subprocess.TimeoutExpired:
            return None

    def communicate(self, timeout: float | None = None) -> tuple[str, str | None]:
        """Waits, as for a pipe, until nothing that this process started is left, too."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self.wait(timeout)
        while living_members({self.pid}):
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        return tuple(None if file is None else Path(file.name).read_text() for file in self._outputs)  # type: ignore[return-value]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Started = Process | subprocess.Popen[str]


def next_turn() -> int:
    """For `server` of `start`: another one than last time."""
    return next(_turns)


def start(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    cwd: Path = ROOT,
    server: int | None = None,
    separate_stderr: bool = False,
) -> Started:
    """`python -m MODULE ...` in `environment`, which is the whole of it; stderr goes to stdout, or beside it."""
    args = [sys.executable, *arguments]
    servers = None if torch.cuda.is_available() else _servers()
    if servers is None or arguments[0] != "-m" or _read_at_import(environment) != servers.environment:
        stderr_to = subprocess.PIPE if separate_stderr else subprocess.STDOUT
        return subprocess.Popen(args, env=environment, cwd=cwd, stdout=subprocess.PIPE, stderr=stderr_to, text=True)
    stdout = tempfile.NamedTemporaryFile("r", prefix="stdout-")  # noqa: SIM115
    stderr = tempfile.NamedTemporaryFile("r", prefix="stderr-") if separate_stderr else None  # noqa: SIM115
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(servers.addresses[(next_turn() if server is None else server) % NUM_SERVERS])
    wanted = {
        "argv": list(arguments[1:]),
        "environment": dict(environment),
        "cwd": str(cwd),
        "outputs": [stdout.name, stderr.name if stderr else stdout.name],
    }
    connection.sendall(json.dumps(wanted).encode() + b"\n")
    return Process(connection, args, stdout, stderr)


def _read_at_import(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_IMPORT)}


@dataclass(frozen=True)
class _Servers:
    addresses: list[str]
    environment: dict[str, str]  # what of it libraries read as they were imported


@cache
def _servers() -> _Servers:
    """They end with this process; all are there, so that no rank waits for another one's."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    atexit.register(shutil.rmtree, folder)
    tests, environment = os.getpid(), with_one_thread(os.environ)
    sockets = [folder / str(number) for number in range(NUM_SERVERS)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.warm", str(path)],
            env=environment | {"PYTHONHASHSEED": str(number + 1)},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(tests),
        )
        for number, path in enumerate(sockets)
    ]
    deadline = time.monotonic() + _START_S
    while not all(path.exists() for path in sockets):
        is_late = time.monotonic() > deadline
        assert not is_late and all(process.poll() is None for process in processes), "no server of warm processes"
        time.sleep(0.02)
    return _Servers([str(path) for path in sockets], _read_at_import(environment))


def _serve(path: Path) -> list[str]:
    """Serve for ever; returns only in the processes that are to run something: the module's name and arguments."""
    for library in LIBRARIES:
        importlib.import_module(library)
    gc.freeze()  # else the first collection of every fork copies each page there is
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    os.rename(f"{path}.new", path)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a watcher
    while True:
        connection, _ = listener.accept()
        server = os.getpid()
        if os.fork() == 0:
            listener.close()
            die_with_parent(server)
            return _watch(connection)
        connection.close()


def _watch(connection: socket.socket) -> list[str]:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    wanted: dict[str, Any] = json.loads(connection.makefile("r").readline())
    watcher = os.getpid()
    child = os.fork()
    if child == 0:
        connection.close()
        die_with_parent(watcher)
        return _become(wanted)
    connection.sendall(f"{child}\n".encode())
    _, status = os.waitpid(child, 0)
    try:
        connection.sendall(f"{status}\n".encode())
    finally:  # whoever asked may be gone
        os._exit(0)


def _become(wanted: dict[str, Any]) -> list[str]:
    for descriptor, output in zip((1, 2), wanted["outputs"], strict=True):
        opened = os.open(output, os.O_WRONLY | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.setsid()
    os.chdir(wanted["cwd"])
    np.random.seed()
    os.environ.clear()
    os.environ.update(wanted["environment"])
    argv: list[str] = wanted["argv"]
    return argv


if __name__ == "__main__":
    sys.argv = _serve(Path(sys.argv[1]))
    # As `python -m`: exceptions, exit codes and what happens at the end of the interpreter are its own.
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
