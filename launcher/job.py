"""What is to be launched: one frozen Job, checked when it is made. Comes from the command line, goes to
`commands.py`; it never looks at the machine, the run file or the environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Via = Literal["local", "deepspeed"]

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


@dataclass(frozen=True, kw_only=True)
class Job:
    """One verb of sft-dist over the ranks of this machine."""

    run_file: str
    verb: str = "train"
    overrides: tuple[str, ...] = ()
    verb_args: tuple[str, ...] = ()
    via: Via = "local"
    num_processes: int
    master_addr: str = "127.0.0.1"
    master_port: int

    def __post_init__(self) -> None:
        for override in self.overrides:
            key, equals, _ = override.partition("=")
            if not equals or not key or key.startswith("-"):
                raise LaunchError(
                    f"'{override}' is not key=value; arguments of the verb itself go after --",
                    exit_code=EXIT_USAGE,
                )
        if self.num_processes < 1:
            raise LaunchError(f"--nproc must be at least 1, not {self.num_processes}", exit_code=EXIT_USAGE)
        if not 1 <= self.master_port <= 65535:
            raise LaunchError(f"--master-port must be in 1..65535, not {self.master_port}", exit_code=EXIT_USAGE)

    @property
    def program(self) -> tuple[str, ...]:
        """What follows `python -m` (or deepspeed's `--module`) in every rank."""
        return ("sft_dist", self.verb, self.run_file, *self.overrides, *self.verb_args)
