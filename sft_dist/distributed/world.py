"""Who am I among the processes of this run, and how do we reach each other.

`find_world` reads the launcher's variables once into a frozen value; `start` opens the process group. The order of
precedence: RANK/WORLD_SIZE (torchrun, deepspeed, sft-launch), then Slurm's, then MPI's through mpi4py, else one
process. A launcher that promises several processes but gave us no rank is an error, never N separate runs.
"""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from sft_dist.errors import ClusterError

StartedBy = Literal["torchrun-like", "slurm", "mpi", "nothing"]

_MPI_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_SIZE")
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


def find_world(env: Mapping[str, str]) -> World:
    """Read rank and size from the launcher's variables. Raises ClusterError where they contradict each other."""
    if "RANK" in env or "WORLD_SIZE" in env:
        world = _from_variables(env, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "torchrun-like")
    elif int(env.get("SLURM_NTASKS", "1")) > 1:
        if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
            raise ClusterError(
                f"this job has SLURM_NTASKS={env['SLURM_NTASKS']} tasks but this process is not one of them; "
                "start it with srun (see slurm/train.sbatch)"
            )
        world = _from_variables(env, "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_TASKS_PER_NODE", "slurm")
    elif any(int(env.get(name, "1")) > 1 for name in _MPI_SIZE_VARIABLES):
        world = _from_mpi(env)
    else:
        world = World(0, 1, 0, 1, "127.0.0.1", 0, "nothing")
    if not 0 <= world.rank < world.size or not 0 <= world.local_rank < world.local_size:
        raise ClusterError(f"the launcher's variables contradict each other: {world}")
    return world


def start(world: World, *, on_gpu: bool, timeout_s: float = 1_800.0) -> None:
    """Open the default process group: NCCL for GPU tensors, gloo for CPU tensors. Raises ClusterError."""
    import torch.distributed as dist

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
        raise ClusterError(f"rank {world.rank} of {world.size} cannot join the others at {where}: {error}") from error


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


def _from_variables(
    env: Mapping[str, str], rank: str, size: str, local_rank: str, local_size: str, started_by: StartedBy
) -> World:
    missing = [name for name in (rank, size) if name not in env]
    if missing:
        raise ClusterError(f"{' and '.join(missing)} not set although its siblings are; is the launcher complete?")
    try:
        number, count = int(env[rank]), int(env[size])
        here = int(env.get(local_rank, number))
        # Slurm writes "8(x2)" or "2,1"; deepspeed calls it LOCAL_SIZE. The first number is that of uniform nodes.
        local_text = env.get(local_size) or env.get("LOCAL_SIZE") or str(count)
        local_count = int(re.split("[(,]", local_text)[0])
        port = int(env.get("MASTER_PORT", DEFAULT_PORT))
    except ValueError as error:
        raise ClusterError(f"a launcher variable is no number: {error}") from None
    return World(
        number,
        count,
        here,
        max(local_count, here + 1),
        env.get("MASTER_ADDR", "127.0.0.1"),
        port,
        started_by,
    )


def _from_mpi(env: Mapping[str, str]) -> World:
    import mpi4py

    mpi4py.rc.finalize = False  # MPI_Finalize is a collective: a failing rank would hang in it
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD
    promised = max(int(env.get(name, "1")) for name in _MPI_SIZE_VARIABLES)
    if communicator.Get_size() != promised:
        raise ClusterError(
            f"the launcher started {promised} processes but MPI sees {communicator.Get_size()}: mpiexec and mpi4py "
            "belong to different MPI installations; use the mpiexec beside this Python"
        )
    hosts = communicator.allgather(socket.gethostname())
    rank = communicator.Get_rank()
    address, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    if address is None:
        alone = len(set(hosts)) == 1
        address = communicator.bcast("127.0.0.1" if alone else socket.gethostbyname(hosts[0]))
    return World(
        rank=rank,
        size=communicator.Get_size(),
        local_rank=hosts[:rank].count(hosts[rank]),
        local_size=hosts.count(hosts[rank]),
        master_addr=address,
        master_port=int(port or communicator.bcast(_free_port())),
        started_by="mpi",
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
