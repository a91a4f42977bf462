"""Who am I among the processes of this run, and how do we reach each other.

`find_world` reads the launcher's variables once into a frozen value; `start` opens the process group. The order of
precedence, innermost first: RANK and WORLD_SIZE (torchrun, deepspeed, sft-launch); MPI's, through mpi4py, where they
promise another world than Slurm's (mpirun inside a job); Slurm's; MPI's; else one process. A launcher that promises
several processes but gave us no rank, and launchers that contradict each other, are errors, never N separate runs.
"""

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sft_dist.distributed import network, slurm
from sft_dist.errors import ClusterError

StartedBy = Literal["torchrun-like", "slurm", "mpi", "nothing"]

# By implementation: Open MPI; MPICH, Intel MPI and srun --mpi=pmi2; MVAPICH.
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE"),
)
DEFAULT_PORT = 29_500


@dataclass(frozen=True, slots=True)
class World:
    rank: int
    size: int
    local_rank: int
    local_size: int
    master_addr: str
    master_port: int
    started_by: StartedBy

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True, slots=True)
class _Seat:
    """What one launcher says of this process."""

    rank: int
    size: int
    names: str  # of the variables


def find_world(env: Mapping[str, str]) -> World:
    """Read rank and size from the launcher's variables. Raises ClusterError where they contradict each other."""
    task, mpi = _slurm_seat(env), _mpi_seat(env)
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _from_variables(env)
        for outer in (task, mpi):
            if outer is not None:
                _check_nested(world, outer)
    elif mpi is not None and (task is None or (mpi.rank, mpi.size) != (task.rank, task.size)):
        world = _from_mpi(env, mpi.size)
    elif task is not None:
        world = _from_slurm(env, task)
    elif _number(env, "SLURM_NTASKS", 1) > 1:
        raise ClusterError(
            f"this job has SLURM_NTASKS={env['SLURM_NTASKS']} tasks but this process is not one of them; "
            "start it with srun (see slurm/train.sbatch)"
        )
    else:
        world = World(0, 1, 0, 1, "127.0.0.1", 0, "nothing")
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size:
        raise ClusterError(f"the launcher's variables contradict each other: {world}")
    return world


def start(world: World, *, on_gpu: bool, timeout_s: float = 1_800.0) -> None:
    """Open the default process group: NCCL for GPU tensors, gloo for CPU tensors. Raises ClusterError."""
    import torch.distributed as dist

    # Here, in the rank, because only here the way to rank 0 is known, whoever started us and on whichever host.
    os.environ |= network.interface_variables(world.master_addr, world.master_port, os.environ)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        _export(world)
        return
    _export(world)
    try:
        dist.init_process_group(backend, rank=world.rank, world_size=world.size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{world.master_addr}:{world.master_port}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise ClusterError(
                f"port {world.master_port} of {world.master_addr} is in use by another process; "
                "choose another one (MASTER_PORT, or --master-port of the launcher)"
            ) from error
        raise ClusterError(
            f"rank {world.rank} of {world.size}, on {socket.gethostname()}, cannot join the others at {where} through "
            f"interface {os.environ.get('GLOO_SOCKET_IFNAME', '(unknown)')} (GLOO_SOCKET_IFNAME): {error}"
        ) from error


def time_all_reduce(num_bytes: int, *, on_gpu: bool) -> float:
    """Seconds of an all-reduce of float32 over all ranks, the best of three after one to warm up. A collective.

    `on_gpu` must be the same on all of them. Raises ClusterError where they do not get through to each other.
    """
    import torch
    import torch.distributed as dist

    try:
        group = dist.new_group(backend="nccl") if on_gpu else dist.group.WORLD
        return _time_all_reduce(torch.zeros(num_bytes // 4, device="cuda" if on_gpu else "cpu"), group)
    except RuntimeError as error:
        raise ClusterError(f"all-reduce between {'GPUs' if on_gpu else 'hosts'}: {error}") from error


def _time_all_reduce(tensor: Any, group: Any) -> float:
    import torch
    import torch.distributed as dist

    times = []
    for _ in range(4):
        dist.barrier()
        begun = time.monotonic()
        dist.all_reduce(tensor, group=group)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.monotonic() - begun)
    return min(times[1:])


def _export(world: World) -> None:
    """DeepSpeed and torch read these names, whatever the launcher calls them."""
    os.environ |= {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": world.master_addr,
        "MASTER_PORT": str(world.master_port),
    }


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ClusterError(f"{name}={text!r} is no number; it comes from the launcher or the environment") from None


def _slurm_seat(env: Mapping[str, str]) -> _Seat | None:
    """Of a task of srun with siblings."""
    if not slurm.is_task(env):
        return None
    # SLURM_NTASKS may still be that of the whole job.
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    return _Seat(_number(env, "SLURM_PROCID"), size, "SLURM_PROCID, SLURM_NTASKS") if size > 1 else None


def _mpi_seat(env: Mapping[str, str]) -> _Seat | None:
    """Of a process of mpirun with siblings."""
    for rank, size in _MPI_VARIABLES:
        if _number(env, size, 1) > 1:
            return _Seat(_number(env, rank), _number(env, size), f"{rank}, {size}")
    return None


def _check_nested(world: World, outer: _Seat) -> None:
    """A launcher within a launcher: the outer one started either every rank or one agent for each group of ranks."""
    every_rank = (world.rank, world.size) == (outer.rank, outer.size)
    # Agents may deal the ranks out in another order than the outer launcher its tasks.
    agents = world.size == outer.size * world.local_size
    if not every_rank and not agents:
        raise ClusterError(
            f"two launchers contradict each other: RANK, WORLD_SIZE say {world.rank} of {world.size} "
            f"({world.local_size} on this host), but {outer.names} say {outer.rank} of {outer.size}. This would be "
            "several separate runs: start the ranks with one launcher, or one agent a node (torchrun --nnodes N)"
        )


def _from_variables(env: Mapping[str, str]) -> World:
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in env]
    if missing:
        raise ClusterError(f"{' and '.join(missing)} not set although its siblings are; is the launcher complete?")
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    local_rank = _number(env, "LOCAL_RANK", rank)
    # deepspeed calls it LOCAL_SIZE.
    local_size = _number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", size))
    return World(
        rank,
        size,
        local_rank,
        max(local_size, local_rank + 1),
        env.get("MASTER_ADDR", "127.0.0.1"),
        _number(env, "MASTER_PORT", DEFAULT_PORT),
        "torchrun-like",
    )


def _from_slurm(env: Mapping[str, str], task: _Seat) -> World:
    layout = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(task.size)
    local_size = slurm.tasks_on_node(layout, _number(env, "SLURM_NODEID", 0))
    address = env.get("MASTER_ADDR")
    if address is None:
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST", "")
        # Rank 0 is on the first node, unless the tasks were told to go elsewhere (--distribution=arbitrary).
        address = "127.0.0.1" if local_size == task.size else slurm.address(slurm.first_host(nodes))
    derived = network.job_port(_number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0))
    port = _number(env, "MASTER_PORT", derived)
    local_rank = _number(env, "SLURM_LOCALID", task.rank)
    return World(task.rank, task.size, local_rank, local_size, address, port, "slurm")


def _from_mpi(env: Mapping[str, str], promised: int) -> World:
    import mpi4py

    mpi4py.rc.finalize = False  # MPI_Finalize is a collective: a failing rank would hang in it
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != promised:
        raise ClusterError(
            f"the launcher started {promised} processes but MPI sees {communicator.Get_size()}: mpiexec and mpi4py "
            "belong to different MPI installations, and this would be separate runs; use the mpiexec beside this "
            f"Python, or sft-launch run --via mpirun, which finds it ({MPI.Get_library_version().splitlines()[0]})"
        )
    hosts = communicator.allgather(network.this_host())
    rank = communicator.Get_rank()
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if address is None or port is None:
        seed = _number(env, "SLURM_JOB_ID", os.getpid())
        met_address, met_port = _meet(communicator, seed=seed, is_alone=len(set(hosts)) == 1)
        address, port = address or met_address, port or str(met_port)
    return World(
        rank=rank,
        size=communicator.Get_size(),
        local_rank=hosts[:rank].count(hosts[rank]),
        local_size=hosts.count(hosts[rank]),
        master_addr=address,
        master_port=_number({"MASTER_PORT": port}, "MASTER_PORT"),
        started_by="mpi",
    )


def _meet(communicator: Any, *, seed: int, is_alone: bool) -> tuple[str, int]:
    """An address of rank 0 at which every rank has got through to it, and its free port. Raises ClusterError."""
    if communicator.Get_rank() == 0:
        with network.meeting_point(seed=seed, is_alone=is_alone) as point:
            return _agreed(communicator, point)
    return _agreed(communicator, None)


def _agreed(communicator: Any, offered: network.MeetingPoint | None) -> tuple[str, int]:
    point: network.MeetingPoint = communicator.bcast(offered)
    reached = communicator.allgather((socket.gethostname(), point.reachable()))
    for address in point.addresses:
        if all(address in theirs for _, theirs in reached):
            return address, point.port
    cut_off = sorted({f"{host} ({', '.join(theirs) or 'none'})" for host, theirs in reached})
    raise ClusterError(
        f"no address of rank 0 is reached by every host; its addresses are {', '.join(point.addresses) or 'none'}, "
        f"port {point.port}; reached from: {'; '.join(cut_off)}. Is there a firewall? MASTER_ADDR and MASTER_PORT "
        "name another one"
    )
