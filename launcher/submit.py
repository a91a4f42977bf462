"""Submit a run to Slurm: compose `sbatch slurm/train.sbatch RUN_YAML ...`. A Submission in, an argv out, by one pure
function; what the job then does stands in the script, which can be submitted by hand as well."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.commands import Command, shown
from launcher.job import EXIT_CLUSTER, EXIT_USAGE, Job, LaunchError
from launcher.rundir import ask_run_dir
from launcher.supervise import say

WARNING_S = 300  # before the time limit, as in train.sbatch
SCRIPT = Path("slurm", "train.sbatch")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A job for Slurm; None leaves what train.sbatch says."""

    run_file: str
    overrides: tuple[str, ...] = ()
    nodes: int = 1
    gpus_per_node: int
    cpus_per_task: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    array: str | None = None
    depend_on: str | None = None  # a job id
    may_requeue: bool = True
    sbatch_options: tuple[str, ...] = ()  # handed on as they are, last

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.gpus_per_node < 0:
            self._refuse("--nodes must be at least 1, and --gpus-per-node 0 (one CPU rank a node) or more")
        if self.array is not None and self.depend_on is not None:
            self._refuse("--array or --depend-on, not both: the elements of an array are runs of their own")
        for override in self.overrides:
            if not re.match(r"[\w.]+=", override):
                self._refuse(f"'{override}' is not key=value")
        for option in self.sbatch_options:
            if not option.startswith("-"):
                self._refuse(f"--sbatch={option}: expected an option of sbatch, such as --sbatch=--qos=long")
        if self.time is not None:
            time_limit_s(self.time)

    @staticmethod
    def _refuse(message: str) -> None:
        raise LaunchError(message, exit_code=EXIT_USAGE)


def sbatch_argv(submission: Submission, script: Path) -> tuple[str, ...]:
    """The command line of sbatch. One task a GPU, whatever the script says."""
    s = submission
    options = {
        "job-name": Path(s.run_file).stem,
        "nodes": s.nodes,
        "ntasks-per-node": max(1, s.gpus_per_node),
        "gpus-per-node": s.gpus_per_node,
        "cpus-per-task": s.cpus_per_task,
        "partition": s.partition,
        "account": s.account,
        "time": s.time,
        "signal": _signal(s.time),
        "array": s.array,
        "output": None if s.array is None else "slurm-%x-%A_%a.out",
        # Whatever became of it: one that was killed, too, leaves its last checkpoint to go on from.
        "dependency": None if s.depend_on is None else f"afterany:{s.depend_on}",
    }
    return (
        "sbatch",
        "--parsable",
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        *(() if s.may_requeue else ("--no-requeue",)),
        *s.sbatch_options,
        str(script),
        s.run_file,
        *s.overrides,
    )


def time_limit_s(text: str) -> float:
    """Seconds of a time as sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises LaunchError."""
    if text.lower() in ("infinite", "unlimited"):
        return float("inf")
    if re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", text) is None:
        raise LaunchError(f"--time {text}: expected minutes, H:MM:SS or D-HH:MM:SS", exit_code=EXIT_USAGE)
    days, dash, clock = text.rpartition("-")
    numbers = [int(number) for number in clock.split(":")]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _signal(time: str | None) -> str | None:
    # A short job would be told to stop as soon as it has begun.
    if time is None or not 0 < time_limit_s(time) < 4 * WARNING_S:  # 0: no limit
        return None
    return f"USR1@{time_limit_s(time) // 4:.0f}"


def find_script() -> Path:
    """train.sbatch of this checkout, or of the installed package. Raises LaunchError."""
    checkout = Path(__file__).resolve().parents[1] / SCRIPT
    # Of a package at the top find_spec tells the place without importing it.
    spec = importlib.util.find_spec("sft_dist")
    installed = [Path(folder) / SCRIPT for folder in (spec.submodule_search_locations or ())] if spec else []
    for script in (checkout, *installed):
        if script.is_file():
            return script
    raise LaunchError(f"{checkout}: no such file, and no installed sft-dist has it", exit_code=EXIT_CLUSTER)


def add_parser(verbs: argparse._SubParsersAction[Any]) -> None:
    """The command `sft-launch submit`."""
    parser = verbs.add_parser(
        "submit",
        help="submit a training to Slurm",
        usage="sft-launch submit RUN_YAML [key=value ...] --gpus-per-node N [options]",
        description="Compose `sbatch slurm/train.sbatch` and run it: one task a GPU, requeued with a checkpoint before "
        "the time limit and when preempted. Prints the job's id alone to stdout.",
        epilog="In an array %%a in the arguments is the element's index, and each element has its own run folder.",
        allow_abbrev=False,
    )
    parser.add_argument("run_file", metavar="RUN_YAML", help="the run file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the run file to change")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="(1)")
    parser.add_argument("--gpus-per-node", type=int, required=True, metavar="N", help="GPUs, and ranks, on each node")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="cores for each GPU (as in the script: 12)")
    parser.add_argument("--partition", metavar="P")
    parser.add_argument("--account", metavar="A")
    parser.add_argument("--time", metavar="T", help="limit of one start; a requeued job has it anew (24 hours)")
    parser.add_argument("--array", metavar="SPEC", help="several runs: 0-4, 1,3,7 or 0-99%%8")
    parser.add_argument("--depend-on", metavar="JOB", help="begin when JOB has ended, in whatever way")
    parser.add_argument("--no-requeue", action="store_true", help="for sites without requeue: chain with --depend-on")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="--sbatch=--qos=long, repeatable"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command line and submit nothing")


def run(options: argparse.Namespace, overrides: tuple[str, ...]) -> int:
    """Check the run file, submit, print the job's id."""
    submission = Submission(
        run_file=options.run_file,
        overrides=overrides,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        cpus_per_task=options.cpus_per_task,
        partition=options.partition,
        account=options.account,
        time=options.time,
        array=options.array,
        depend_on=options.depend_on,
        may_requeue=not options.no_requeue,
        sbatch_options=tuple(options.sbatch),
    )
    argv = sbatch_argv(submission, find_script())
    if options.dry_run:
        print(shown(Command(name="sbatch", argv=argv, env={})))
        return 0
    if not any("%a" in text for text in (submission.run_file, *overrides)):
        # A mistake in the run file is told now, not after hours in the queue.
        ask_run_dir(
            Job(run_file=submission.run_file, overrides=overrides, num_processes=1, master_port=1),
            python=sys.executable,
        )
    try:
        answer = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
    except FileNotFoundError:
        raise LaunchError(
            "sbatch: no such program; is this a login node of the cluster?", exit_code=EXIT_CLUSTER
        ) from None
    if answer.returncode != 0:
        raise LaunchError(
            f"sbatch refused the job (exit status {answer.returncode}); see above", exit_code=EXIT_CLUSTER
        )
    job = answer.stdout.strip().partition(";")[0]  # ID;CLUSTER where there are several
    element = "" if submission.array is None else "_INDEX"
    say(
        f"submitted job {job}; its output goes to slurm-{Path(submission.run_file).stem}-{job}{element}.out (unless "
        f"--sbatch says otherwise), that of the ranks to slurm-logs/{job}{element}/"
    )
    print(job)
    return 0
