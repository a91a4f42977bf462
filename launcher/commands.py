"""Write out the command lines of a Job, one per process to start, with the environment each is given.
Pure: a Job and facts of the host in, Commands out; nothing is started here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.host import visible_devices
from launcher.job import EXIT_USAGE, Job, LaunchError
from launcher.mpi import Mpiexec
from launcher.parcel import Contact, Parcel, encode

# What ranks on other hosts need of this environment where the launcher in between does not hand on all of it.
_FORWARDED = re.compile(
    r"(SFT|HF|TRANSFORMERS|TOKENIZERS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|CUDA|NCCL|GLOO|UCX|FI|I_MPI|OMP|MKL|KMP|DS|THP)"
    r"_\w+"
    r"|PYTHON\w+|PATH|LD_LIBRARY_PATH|VIRTUAL_ENV|XDG_CACHE_HOME|(HTTPS?|NO|https?|no)_(PROXY|proxy)"
)
_LOGIN = re.compile(r"\w+://[^/@\s]*@")  # a proxy with user and password
_KEPT_BACK = re.compile(r"CUDA_VISIBLE_DEVICES|DS_ENV_FILE|PYTHONSTARTUP|.*(_|^)(TOKEN|KEY|SECRET|PASSWORD)(_\w*)?")


@dataclass(frozen=True, kw_only=True)
class Command:
    """One process to start. It is a rank itself, or it starts ranks, each behind a keeper."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]  # added to the launcher's own environment
    to_terminal: bool = False  # else its output goes to a log file


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What command lines depend on beside the Job."""

    python: str  # interpreter of the environment to run in
    num_cpus: int
    environ: Mapping[str, str]
    contact: Contact | None = None  # where keepers report; None: ranks without keepers
    log_dir: str | None = None  # where keepers have their ranks write
    mpiexec: Mpiexec | None = None
    own_address: str = "127.0.0.1"  # at which the hosts of the job reach this one


def commands(job: Job, facts: Facts) -> tuple[Command, ...]:
    """The processes of `job`, in rank order."""
    match job.via:
        case "local":
            return tuple(_local_rank(job, rank, facts) for rank in range(job.num_processes))
        case "deepspeed":
            return (_deepspeed(job, facts),)
        case "torchrun":
            return (_torchrun(job, facts),)
        case "mpirun":
            return (_mpirun(job, facts),)
        case "srun":
            return (_srun(job, facts),)


def shown(command: Command) -> str:
    """The command as a line that can be pasted into a shell."""
    assignments = [f"{key}={shlex.quote(value)}" for key, value in command.env.items()]
    return " ".join([*assignments, shlex.join(command.argv)])


def program_of(python: str, script: str, module: str) -> tuple[str, ...]:
    """The script of that name in the environment of `python`, or the module it would run."""
    path = Path(python).parent / script
    return (str(path),) if path.is_file() else (python, "-m", module)


def forwarded(environ: Mapping[str, str]) -> dict[str, str]:
    """What other hosts are told of the environment. No secrets: command lines are seen by everyone there. Pure."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if _FORWARDED.fullmatch(name) and not _KEPT_BACK.fullmatch(name) and not _LOGIN.search(value)
    }


def _local_rank(job: Job, rank: int, facts: Facts) -> Command:
    env = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(job.num_processes),
        "LOCAL_WORLD_SIZE": str(job.num_processes),
        "MASTER_ADDR": job.rank_0,
        "MASTER_PORT": str(job.master_port),
        **_shared_env(job, facts),
    }
    return Command(name=f"rank {rank}", argv=(facts.python, "-m", *job.program), env=env, to_terminal=rank == 0)


def _deepspeed(job: Job, facts: Facts) -> Command:
    env = _shared_env(job, facts)
    where: tuple[str, ...]
    if job.hosts:
        slots = "@".join(f"{host.name}:{','.join(map(str, range(host.slots)))}" for host in job.hosts)
        # Without --force_multi a single host is taken for this one. deepspeed's check of ssh hides what ssh says.
        where = ("--hostfile", job.hostfile, "--include", slots, "--force_multi", "--no_ssh_check")
    else:
        where = _deepspeed_devices(job.num_processes, facts.environ)
    argv = (
        *program_of(facts.python, "deepspeed", "deepspeed.launcher.runner"),
        *where,
        *("--master_addr", job.rank_0, "--master_port", str(job.master_port)),
        # Without it deepspeed puts --local_rank=N before the verb; the environment says it already.
        "--no_local_rank",
        "--module",
        *_program(job, facts, env),
    )
    return Command(name="deepspeed", argv=argv, env=env, to_terminal=True)


def _torchrun(job: Job, facts: Facts) -> Command:
    env = _shared_env(job, facts)
    argv = (
        *program_of(facts.python, "torchrun", "torch.distributed.run"),
        *(f"--nnodes={job.num_nodes}", f"--nproc-per-node={job.num_processes}", f"--node-rank={job.node_rank}"),
        # Static: with a dynamic rendezvous rank 0 need not be where --master-addr says.
        *("--rdzv-backend=static", f"--master-addr={job.rank_0}", f"--master-port={job.master_port}"),
        "--max-restarts=0",
        "-m",
        *_program(job, facts, env),
    )
    return Command(name="torchrun", argv=argv, env=env, to_terminal=True)


def _mpirun(job: Job, facts: Facts) -> Command:
    if facts.mpiexec is None:
        raise ValueError("mpirun without an mpiexec")
    env = _shared_env(job, facts) | _asked_address(job)
    hosts = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
    how: tuple[str, ...]
    match facts.mpiexec.family:
        case "mpich":
            how = ("-localhost", facts.own_address, "-hosts", hosts) if hosts else ()
        case "openmpi":
            # Its own default binds each rank to one core, data workers and all. Names without values: they travel apart
            # from the command line, whatever is in them.
            names = sorted(forwarded(facts.environ).keys() | env.keys()) if hosts else []
            slots = hosts or f"localhost:{job.num_processes}"
            how = ("--host", slots, "--bind-to", "none", *(word for name in names for word in ("-x", name)))
    argv = (facts.mpiexec.path, *how, "-n", str(job.num_ranks), facts.python, "-m", *_program(job, facts, env))
    return Command(name="mpirun", argv=argv, env=env, to_terminal=True)


def _srun(job: Job, facts: Facts) -> Command:
    env = _shared_env(job, facts) | _asked_address(job)
    if "SLURM_CPUS_PER_TASK" in facts.environ and "SRUN_CPUS_PER_TASK" not in facts.environ:
        # Since 22.05 srun takes it no longer from sbatch and salloc.
        env["SRUN_CPUS_PER_TASK"] = facts.environ["SLURM_CPUS_PER_TASK"]
    argv = (
        *("srun", f"--nodes={job.num_nodes}", f"--ntasks-per-node={job.num_processes}", f"--ntasks={job.num_ranks}"),
        *("--kill-on-bad-exit=1", "--wait=60", facts.python, "-m"),
        *_program(job, facts, env),
    )
    return Command(name="srun", argv=argv, env=env, to_terminal=True)


def _program(job: Job, facts: Facts, env: Mapping[str, str]) -> tuple[str, ...]:
    """What the launcher in between is to start: a keeper, or the verb itself where nobody listens to keepers."""
    if facts.contact is None and not (job.hosts and job.via == "deepspeed"):
        return job.program
    carried = {**forwarded(facts.environ), **env} if job.hosts else {}
    return ("launcher.keeper", encode(Parcel(job.program, carried, facts.contact, facts.log_dir)))


def _asked_address(job: Job) -> dict[str, str]:
    """Where rank 0 is to be met as far as the command line says; the rest the ranks find out, through MPI or Slurm."""
    found = {} if job.master_addr is None else {"MASTER_ADDR": job.master_addr}
    return found if job.asked_port is None else found | {"MASTER_PORT": str(job.asked_port)}


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


def _shared_env(job: Job, facts: Facts) -> dict[str, str]:
    env: dict[str, str] = {"SFT_DIST_LAUNCHER": job.via}
    if "OMP_NUM_THREADS" not in facts.environ and job.num_nodes == 1 and not job.hosts and job.via != "srun":
        # Every rank would otherwise start a thread for each CPU of the machine. Elsewhere ranks count for themselves.
        env["OMP_NUM_THREADS"] = str(max(1, facts.num_cpus // job.num_processes))
    return env
