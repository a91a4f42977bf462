"""The command line of sft-launch: read the arguments, make a Job, run it or show it, end with its exit code.
Says what went wrong in one line, without a traceback."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_args

from launcher import status, submit
from launcher.commands import Facts, commands, shown
from launcher.host import (
    count_cpus,
    count_gpus,
    every_address,
    first_ephemeral_port,
    free_port,
    is_own,
    master_ports,
    own_addresses,
    require_port,
)
from launcher.hosts import chosen_hosts, read_hostfile
from launcher.job import EXIT_REQUEUE, EXIT_USAGE, Job, LaunchError, Via
from launcher.lifeline import Lifeline
from launcher.mpi import find_mpiexec
from launcher.report import Verdict, judge
from launcher.restarts import EXPLAINED, Restarts, checkpoints, keep_running
from launcher.rundir import ask_run_dir
from launcher.supervise import Ending, prepared, say, supervise

PORT_STRIDE = 97  # between the ports of two starts


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"{message} (see {self.prog} --help)", exit_code=EXIT_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    """The console command; returns the exit code."""
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    except LaunchError as error:
        say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _main(argv: list[str]) -> int:
    arguments, verb_args = _split_at_dashes(argv)
    parser = _Parser(prog="sft-launch", description="Start the ranks of an sft-dist run.", allow_abbrev=False)
    verbs = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_run_parser(verbs)
    _add_check_parser(verbs)
    submit.add_parser(verbs)
    status.add_parser(verbs)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value before the options; those after them come back as unknown.
    unknown = [word for word in rest if word.startswith("-") or "overrides" not in options]
    if unknown:
        verbs.choices[options.command].error(f"unknown argument {unknown[0]}; arguments of the verb itself go after --")
    if verb_args and options.command in ("submit", "status"):
        verbs.choices[options.command].error(f"nothing follows -- here, but there is {verb_args[0]}")
    match options.command:
        case "submit":
            return submit.run(options, (*options.overrides, *rest))
        case "status":
            return status.run(options)
    return _run(options, overrides=(*options.overrides, *rest), verb_args=tuple(verb_args))


def _split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    i = argv.index("--")
    return argv[:i], argv[i + 1 :]


def _add_run_parser(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser(
        "run",
        help="run a verb of sft-dist on the GPUs of this machine or of several",
        usage="sft-launch run RUN_YAML [key=value ...] [options] [-- ARGUMENTS OF THE VERB]",
        description="Run a verb of sft-dist on the GPUs of this machine, or of several, and watch over its ranks: "
        "signals reach all of them, one that fails ends the others, nothing is left behind.",
        epilog="Exit code: that of the first rank to fail (128 + signal when it was killed), 0 when all "
        "ended well, 75 when they stopped on request with a checkpoint; start the same command to go on.",
        allow_abbrev=False,
    )
    parser.add_argument("--verb", default="train", help="what to run: train, score, ... (train)")
    _add_run_options(parser)
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help=EXPLAINED)
    parser.add_argument(
        "--restart-pause-s",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds before a restart, doubled after each that brought no new checkpoint, up to 60 (1)",
    )
    parser.add_argument(
        "--restart-stopped",
        action="store_true",
        help="restart, too, when the ranks stopped on request with a checkpoint (75) and sft-launch was not signalled",
    )


def _add_run_options(parser: _Parser) -> None:
    parser.add_argument("run_file", metavar="RUN_YAML", help="the run file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the run file to change")
    parser.add_argument("--via", choices=get_args(Via), default="local", help="who starts the ranks (local)")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks on each node (one a visible GPU; 1 without GPUs)")
    parser.add_argument(
        "--nodes", type=int, metavar="N", help="nodes: the first N of a hostfile (all), or of Slurm's (1)"
    )
    parser.add_argument("--hostfile", type=Path, metavar="FILE", help="hosts to run on, a line `HOST slots=N` each")
    parser.add_argument(
        "--node-rank", type=int, default=0, metavar="R", help="which of --nodes this is, with torchrun (0)"
    )
    parser.add_argument("--master-addr", metavar="ADDR", help="address of rank 0 (of the first host)")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="port of rank 0 (a free one)")
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="where ranks 1 and up write rank-N.log, each on its host; rank 0 writes to the terminal (--via local: a "
        "temporary folder, kept when the run fails; the other ways: all to the terminal)",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds from the end of the first rank until the others are killed (30)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command lines and start nothing")


def _add_check_parser(verbs: argparse._SubParsersAction[_Parser]) -> None:
    parser = verbs.add_parser(
        "check",
        help="look whether every host is ready for a run, and say all that is wrong at once",
        usage="sft-launch check RUN_YAML [key=value ...] [options of run]",
        description="Start `sft-dist check` as `sft-launch run` would start the run: GPUs, drivers, versions, code, "
        "paths, disk, clocks and stale locks of every host, and an all-reduce between them. Exit code 69 when "
        "something is wrong.",
        allow_abbrev=False,
    )
    _add_run_options(parser)
    parser.set_defaults(verb="check", restarts=0, restart_pause_s=1.0, restart_stopped=False)


def _run(options: argparse.Namespace, *, overrides: tuple[str, ...], verb_args: tuple[str, ...]) -> int:
    if not 0 <= options.grace_s < float("inf"):
        raise LaunchError(f"--grace-s must be 0 or more, not {options.grace_s:g}", exit_code=EXIT_USAGE)
    restarts = _restarts(options)
    job = _job(options, overrides=overrides, verb_args=verb_args)
    facts = Facts(
        python=sys.executable,
        num_cpus=count_cpus(),
        environ=os.environ,
        mpiexec=find_mpiexec(sys.executable) if job.via == "mpirun" else None,
        log_dir=None if options.log_dir is None else str(options.log_dir.absolute()),
    )
    if options.dry_run:
        # Of hosts that need not be there yet.
        note = (
            " (a real start puts a keeper before every rank: python -m launcher.keeper)" if job.num_ranks_kept else ""
        )
        shown_facts = replace(facts, own_address="THIS_HOST")
        print("\n".join(f"# {command.name}{note}\n{shown(command)}" for command in commands(job, shown_facts)))
        return 0
    if job.via in ("local", "deepspeed", "torchrun") and is_own(job.rank_0):
        require_port(job.master_port)
    facts = replace(facts, own_address=_addresses(job)[0])
    return _supervised(job, facts, restarts, log_dir=options.log_dir, grace_s=options.grace_s)


def _addresses(job: Job) -> tuple[str, ...]:
    """At which keepers reach this machine."""
    # Which nodes Slurm gives is not known before it does.
    return every_address() if job.via == "srun" else own_addresses(host.name for host in job.hosts)


def _job(options: argparse.Namespace, *, overrides: tuple[str, ...], verb_args: tuple[str, ...]) -> Job:
    hosts = read_hostfile(options.hostfile) if options.hostfile is not None else ()
    hosts = chosen_hosts(hosts, num_nodes=options.nodes, num_processes=options.nproc)
    num_processes = options.nproc
    if num_processes is None:
        num_processes = max((host.slots for host in hosts), default=0) or max(1, count_gpus(os.environ))
    return Job(
        run_file=options.run_file,
        verb=options.verb,
        overrides=overrides,
        verb_args=verb_args,
        via=options.via,
        num_processes=num_processes,
        num_nodes=len(hosts) or (1 if options.nodes is None else options.nodes),
        hostfile=str(options.hostfile or ""),
        hosts=hosts,
        node_rank=options.node_rank,
        master_addr=options.master_addr,
        master_port=_free_port() if options.master_port is None else options.master_port,
        is_port_asked=options.master_port is not None,
    )


def _free_port(number: int = 0) -> int:
    """A port that is free here, for the start of that number."""
    # A Slurm job has its own, on whichever of its nodes rank 0 is. Other starts are told apart by the process id.
    job_id = os.environ.get("SLURM_JOB_ID", "")
    seed = int(job_id) if job_id.isdecimal() else os.getpid()
    return free_port(master_ports(first_ephemeral_port()), seed=seed + number * PORT_STRIDE)


def _restarts(options: argparse.Namespace) -> Restarts:
    if options.restarts < 0:
        raise LaunchError(f"--restarts must be 0 or more, not {options.restarts}", exit_code=EXIT_USAGE)
    if not 0 <= options.restart_pause_s < float("inf"):
        raise LaunchError(f"--restart-pause-s must be 0 or more, not {options.restart_pause_s:g}", exit_code=EXIT_USAGE)
    return Restarts(budget=options.restarts, pause_s=options.restart_pause_s, after_stop=options.restart_stopped)


def _supervised(job: Job, facts: Facts, restarts: Restarts, *, log_dir: Path | None, grace_s: float) -> int:
    run_dir = ask_run_dir(job, python=sys.executable)
    log_dir_used = log_dir or Path(tempfile.mkdtemp(prefix="sft-launch-"))
    with prepared() as inherited:

        def start(number: int) -> tuple[Ending, Verdict]:
            told = {"SFT_DIST_RESTART": str(number)} if restarts.budget else {}
            # What is left of the start before may still hold its port.
            port = _free_port(number) if number and not job.is_port_asked else job.master_port
            lifeline = None
            if job.num_ranks_kept:
                lifeline = Lifeline(_addresses(job), num_ranks=job.num_ranks_kept, may_queue=job.via == "srun")
            contact = lifeline.contact if lifeline is not None else None
            now = replace(facts, environ={**facts.environ, **told}, contact=contact)
            to_start = commands(replace(job, master_port=port), now)
            to_start = tuple(replace(command, env={**command.env, **told}) for command in to_start)
            ending = supervise(to_start, log_dir=log_dir_used, grace_s=grace_s, inherited=inherited, lifeline=lifeline)
            return ending, judge(ending)

        # Other verbs than train leave no checkpoints to tell progress by.
        published = (lambda: checkpoints(run_dir)) if job.verb == "train" else None
        code = keep_running(start, restarts, published=published)
    if log_dir is None and code in (0, EXIT_REQUEUE):
        shutil.rmtree(log_dir_used, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
