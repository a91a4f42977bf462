"""Stands before a rank that another launcher started (deepspeed, torchrun, mpiexec, srun), on whichever host: passes on
the signals that sft-launch sends, tells it how the rank ended, and ends the rank when sft-launch is gone.

    python -m launcher.keeper WORD          WORD: see parcel.py

It leaves only when it is told to, so that the launcher in between sees all ranks end together and stays quiet."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

from launcher.job import EXIT_CLUSTER, EXIT_REQUEUE
from launcher.logs import Log, Quote, open_log, tail
from launcher.parcel import Contact, decode
from launcher.processes import adopt_orphans, die_with_parent, kill_descendants, send_signal

CONNECT_TIMEOUT_S = 10.0
KILL_TIMEOUT_S = 10.0
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
# The innermost launcher's first: a batch script has a SLURM_PROCID, too, which what it starts inherits.
RANK_VARIABLES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
# A peer that does not answer for this long is lost. By the kernel, so that a stopped process (Ctrl-Z) is not.
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
LOST_AFTER_S = 25


def main() -> int:
    parcel = decode(sys.argv[1])
    env = {**os.environ, **parcel.env}
    argv = [sys.executable, "-u", "-m", *parcel.program]
    if parcel.contact is None:
        os.execve(sys.executable, argv, env)
    rank = next((os.environ[name] for name in RANK_VARIABLES if name in os.environ), "?")
    launcher = _connect(parcel.contact, rank)
    woken, waker = socket.socketpair()
    waker.setblocking(False)
    signal.set_wakeup_fd(waker.fileno(), warn_on_full_buffer=False)
    for signum in (*PASSED_ON, signal.SIGCHLD):
        signal.signal(signum, lambda *_: None)
    adopt_orphans()
    try:
        log, output = (None, None) if parcel.log_dir is None or rank == "0" else _log(Path(parcel.log_dir), rank)
        # close_fds: MPI's launchers talk to their ranks through inherited descriptors.
        child = subprocess.Popen(
            argv,
            env=env,
            close_fds=False,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            preexec_fn=_before_exec(os.getpid()),
        )
    except OSError as error:
        _tell(launcher, {"returncode": None, "reason": f"it could not be started: {error}"})
        return _until_let_go(launcher)
    try:
        code = _keep(child, launcher, woken, log)
    finally:
        kill_descendants(timeout_s=KILL_TIMEOUT_S)
    return code


def watch_peer(connection: socket.socket) -> None:
    """Have the kernel notice when the host at the other end is gone, also with data on their way to it."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * LOST_AFTER_S)


def _connect(contact: Contact, rank: str) -> socket.socket:
    problems = []
    for address in contact.addresses:
        try:
            connection = socket.create_connection((address, contact.port), timeout=CONNECT_TIMEOUT_S)
        except OSError as error:
            problems.append(f"{address}: {error.strerror or error}")
            continue
        connection.settimeout(None)
        watch_peer(connection)
        connection.sendall(f"{contact.word} {rank} {socket.gethostname()}\n".encode())
        return connection
    print(
        f"sft-launch: rank {rank} on {socket.gethostname()} cannot reach sft-launch at port {contact.port} "
        f"({'; '.join(problems)}); is there a firewall between the hosts? Start it on one of them",
        file=sys.stderr,
    )
    sys.exit(EXIT_CLUSTER)


def _log(folder: Path, rank: str) -> tuple[Log, IO[bytes]]:
    try:
        return open_log(folder, f"rank {rank}")
    except OSError as error:
        raise OSError(f"--log-dir {folder}: {error.strerror}") from error


def _before_exec(keeper: int) -> Callable[[], None]:
    def prepare() -> None:
        die_with_parent(keeper)
        for signum in (*PASSED_ON, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)

    return prepare


def _keep(child: subprocess.Popen[bytes], launcher: socket.socket, woken: socket.socket, log: Log | None) -> int:
    """Until the launcher says that all is over, or is gone; returns the code to leave with."""
    received = b""
    told = False
    while True:
        if child.poll() is not None and not told:
            kill_descendants(timeout_s=KILL_TIMEOUT_S)  # helpers that it left behind
            _tell(launcher, {"returncode": child.returncode, "quote": _quote(child.returncode, log)})
            told = True
        readable, _, _ = select.select([launcher, woken], [], [])
        if woken in readable:
            for signum in woken.recv(64):
                if signum in PASSED_ON and child.returncode is None:
                    send_signal([child.pid], signum)
        if launcher in readable:
            try:
                chunk = launcher.recv(4096)
            except OSError:
                chunk = b""
            if not chunk:
                print("sft-launch is gone; its rank is ended", file=sys.stderr, flush=True)
                return EXIT_CLUSTER
            *lines, received = (received + chunk).split(b"\n")
            for line in lines:
                if line == b"leave":
                    return _last_code(child.poll())
                if child.poll() is None:
                    send_signal([child.pid], int(line))


def _last_code(returncode: int | None) -> int:
    """What the launcher in between is shown: sft-launch knows the rank's code, and 75 is no failure to report."""
    if returncode is None:
        return EXIT_CLUSTER
    return 0 if returncode in (0, EXIT_REQUEUE) else returncode if returncode > 0 else 128 - returncode


def _tell(launcher: socket.socket, ended: Mapping[str, object]) -> None:
    """How the rank ended (lifeline.parse_end)."""
    with suppress(OSError):  # seen when reading
        launcher.sendall(json.dumps(ended).encode() + b"\n")


def _quote(returncode: int, log: Log | None) -> dict[str, object] | None:
    """The end of a log, which may lie on a disk that sft-launch does not see.

    After 0 it may be asked for, too: sft-launch alone knows whether the others had ended.
    """
    if log is None or returncode == EXIT_REQUEUE:
        return None
    return asdict(Quote(f"{socket.gethostname()}:{log.path}", tuple(tail(log))))


def _until_let_go(launcher: socket.socket) -> int:
    """Stay, without a rank, as `_keep` does after its end; returns the code to leave with."""
    received = b""
    with suppress(OSError):
        while (chunk := launcher.recv(4096)) and b"leave\n" not in (received := received + chunk):
            pass
    return EXIT_CLUSTER


if __name__ == "__main__":
    sys.exit(main())
