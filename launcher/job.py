"""What is to be launched: one frozen Job, checked when it is made. Comes from the command line, goes to
`commands.py`; it never looks at the machine, the run file or the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Via = Literal["local", "deepspeed", "torchrun", "mpirun", "srun"]

# sysexits.h, as in all of sft-dist.
EXIT_USAGE = 2
EXIT_CLUSTER = 69
EXIT_STUCK = 70
EXIT_REQUEUE = 75
EXIT_NO_PROGRESS = 76


class LaunchError(Exception):
    """A launch that cannot start, told in one line, with the exit code it deserves."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Host:
    """A host by the name its peers know it by, and how many ranks it is to have."""

    name: str
    slots: int


@dataclass(frozen=True, kw_only=True)
class Job:
    """One verb of sft-dist over the ranks of this machine, or of several hosts."""

    run_file: str
    verb: str = "train"
    overrides: tuple[str, ...] = ()
    verb_args: tuple[str, ...] = ()
    via: Via = "local"
    num_processes: int  # on each node
    num_nodes: int = 1
    hostfile: str = ""
    hosts: tuple[Host, ...] = ()  # of the hostfile, those that are used; empty: this machine, or what Slurm has given
    node_rank: int = 0  # torchrun, which is started on every node
    master_addr: str | None = None
    master_port: int
    is_port_asked: bool = False  # for, on the command line; else it is one that is free here

    def __post_init__(self) -> None:
        for override in self.overrides:
            key, equals, _ = override.partition("=")
            if not equals or not key or key.startswith("-"):
                raise _usage(f"'{override}' is not key=value; arguments of the verb itself go after --")
        if self.num_processes < 1:
            raise _usage(f"--nproc must be at least 1, not {self.num_processes}")
        if self.num_nodes < 1:
            raise _usage(f"--nodes must be at least 1, not {self.num_nodes}")
        if not 1 <= self.master_port <= 65535:
            raise _usage(f"--master-port must be in 1..65535, not {self.master_port}")
        self._check_nodes()

    def _check_nodes(self) -> None:
        if self.hosts and self.via not in ("deepspeed", "mpirun"):
            raise _usage(f"--hostfile is for --via deepspeed and --via mpirun, not for --via {self.via}")
        if self.hosts and self.num_nodes != len(self.hosts):
            raise _usage(f"--nodes {self.num_nodes}, but the hostfile has {len(self.hosts)} hosts")
        if not 0 <= self.node_rank < self.num_nodes or (self.node_rank and self.via != "torchrun"):
            raise _usage(
                f"--node-rank {self.node_rank}: it is 0..N-1 with --via torchrun --nodes N, and not given else"
            )
        if self.num_nodes == 1:
            return
        match self.via:
            case "local":
                raise _usage("--via local starts ranks on this machine alone; --nodes goes with the other ways")
            case "deepspeed" | "mpirun" if not self.hosts:
                raise _usage(f"--via {self.via} --nodes {self.num_nodes} needs --hostfile, with lines `HOST slots=N`")
            case "torchrun" if self.master_addr is None or not self.is_port_asked:
                raise _usage(
                    f"--via torchrun --nodes {self.num_nodes} is started on every node, with --node-rank 0, 1, ... and "
                    "on all of them the same --master-addr (of node 0) and --master-port"
                )
            case _:
                pass

    @property
    def program(self) -> tuple[str, ...]:
        """What follows `python -m` (or deepspeed's `--module`) in every rank."""
        return ("sft_dist", self.verb, self.run_file, *self.overrides, *self.verb_args)

    @property
    def rank_0(self) -> str:
        """Where rank 0 is to be met, as far as it is known before the start."""
        return self.master_addr or (self.hosts[0].name if self.hosts else "127.0.0.1")

    @property
    def num_ranks(self) -> int:
        """Of all nodes together."""
        return sum(host.slots for host in self.hosts) or self.num_nodes * self.num_processes

    @property
    def num_ranks_kept(self) -> int:
        """Ranks that get a keeper (keeper.py) of this launcher; the others are its children."""
        match self.via:
            case "local":
                return 0
            case "torchrun":
                return self.num_processes
            case "deepspeed" | "mpirun" | "srun":
                return self.num_ranks

    @property
    def asked_port(self) -> int | None:
        """The port of the command line; mpirun's and srun's ranks agree on one without it."""
        return self.master_port if self.is_port_asked else None


def _usage(message: str) -> LaunchError:
    return LaunchError(message, exit_code=EXIT_USAGE)
