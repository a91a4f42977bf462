"""Write out the command lines of a Job, one per process to start, with the environment each is given.
Pure: a Job and facts of the host in, Commands out; nothing is started here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.host import visible_devices
from launcher.job import EXIT_USAGE, Job, LaunchError


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process to start. It is a rank itself (depth 0), or its descendants at a depth are the ranks."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to the launcher's own environment
    rank_depth: int = 0
    num_ranks: int = 1
    to_terminal: bool = False  # else its output goes to a log file


def commands(job: Job, *, python: str, num_cpus: int, environ: Mapping[str, str]) -> tuple[Command, ...]:
    """The processes of `job`, in rank order. `python` is the interpreter of the environment to run in."""
    match job.via:
        case "local":
            return tuple(_local_rank(job, rank, python, num_cpus, environ) for rank in range(job.num_processes))
        case "deepspeed":
            return (_deepspeed(job, python, num_cpus, environ),)


def shown(command: Command) -> str:
    """The command as a line that can be pasted into a shell."""
    assignments = [f"{key}={shlex.quote(value)}" for key, value in command.env.items()]
    return " ".join([*assignments, shlex.join(command.argv)])


def deepspeed_program(python: str) -> tuple[str, ...]:
    """The `deepspeed` script of the same environment as `python`, or the module it would run."""
    script = Path(python).parent / "deepspeed"
    return (str(script),) if script.is_file() else (python, "-m", "deepspeed.launcher.runner")


def _local_rank(job: Job, rank: int, python: str, num_cpus: int, environ: Mapping[str, str]) -> Command:
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_processes),
        "LOCAL_WORLD_SIZE": str(job.num_processes),
        "MASTER_ADDR": job.master_addr,
        "MASTER_PORT": str(job.master_port),
        **_shared_env(job, num_cpus, environ),
    }
    return Command(name=f"rank {rank}", argv=(python, "-m", *job.program), env=env, to_terminal=rank == 0)


def _deepspeed(job: Job, python: str, num_cpus: int, environ: Mapping[str, str]) -> Command:
    argv = (
        *deepspeed_program(python),
        *_deepspeed_devices(job.num_processes, environ),
        *("--master_addr", job.master_addr, "--master_port", str(job.master_port)),
        # Without it deepspeed puts --local_rank=N before the verb; the environment says it already.
        "--no_local_rank",
        "--module",
        *job.program,
    )
    # The runner starts deepspeed.launcher.launch, which starts the ranks.
    env = _shared_env(job, num_cpus, environ)
    return Command(name="deepspeed", argv=argv, env=env, rank_depth=2, num_ranks=job.num_processes, to_terminal=True)


def _deepspeed_devices(num_processes: int, environ: Mapping[str, str]) -> tuple[str, ...]:
    # --num_gpus N means GPUs 0..N-1 whatever CUDA_VISIBLE_DEVICES says: on a shared machine it would
    # take the GPUs of somebody else. Devices other than those are named.
    devices = (visible_devices(environ) or ())[:num_processes]
    if devices in ((), tuple(str(i) for i in range(num_processes))):
        return ("--num_gpus", str(num_processes))
    if len(devices) < num_processes:
        raise LaunchError(
            f"--nproc {num_processes} with {len(devices)} devices in CUDA_VISIBLE_DEVICES "
            f"({','.join(devices)}): deepspeed starts one rank a device",
            exit_code=EXIT_USAGE,
        )
    if not all(device.isdecimal() for device in devices):
        raise LaunchError(
            f"deepspeed takes GPUs by number only, and CUDA_VISIBLE_DEVICES names {','.join(devices)}; use --via local",
            exit_code=EXIT_USAGE,
        )
    return ("--include", f"localhost:{','.join(devices)}")


def _shared_env(job: Job, num_cpus: int, environ: Mapping[str, str]) -> dict[str, str]:
    env: dict[str, str] = {"SFT_DIST_LAUNCHER": job.via}
    if "OMP_NUM_THREADS" not in environ:
        # Every rank would otherwise start a thread for each CPU of the machine.
        env["OMP_NUM_THREADS"] = str(max(1, num_cpus // job.num_processes))
    return env
