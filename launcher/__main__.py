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

from launcher.commands import commands, shown
from launcher.host import count_cpus, count_gpus, first_ephemeral_port, free_port, master_ports, require_port
from launcher.job import EXIT_REQUEUE, EXIT_USAGE, Job, LaunchError, Via
from launcher.report import Verdict, judge
from launcher.restarts import EXPLAINED, Restarts, checkpoints, keep_running
from launcher.rundir import ask_run_dir, outcome_mark, read_outcome
from launcher.supervise import Ending, say, signals_held, supervise

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
    run_parser = _add_run_parser(verbs)
    options, rest = parser.parse_known_args(arguments)
    # argparse takes key=value before the options; those after them come back as unknown.
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        run_parser.error(f"unknown argument {unknown[0]}; arguments of the verb itself go after --")
    return _run(options, overrides=(*options.overrides, *rest), verb_args=tuple(verb_args))


def _split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    i = argv.index("--")
    return argv[:i], argv[i + 1 :]


def _add_run_parser(verbs: argparse._SubParsersAction[_Parser]) -> _Parser:
    parser = verbs.add_parser(
        "run",
        help="run a verb of sft-dist on the GPUs of this machine",
        usage="sft-launch run RUN_YAML [key=value ...] [options] [-- ARGUMENTS OF THE VERB]",
        description="Run a verb of sft-dist on the GPUs of this machine and watch over its ranks: signals "
        "reach all of them, one that fails ends the others, nothing is left behind.",
        epilog="Exit code: that of the first rank to fail (128 + signal when it was killed), 0 when all "
        "ended well, 75 when they stopped on request with a checkpoint; start the same command to go on.",
        allow_abbrev=False,
    )
    parser.add_argument("run_file", metavar="RUN_YAML", help="the run file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="keys of the run file to change")
    parser.add_argument("--verb", default="train", help="what to run: train, score, ... (train)")
    parser.add_argument("--via", choices=get_args(Via), default="local", help="who starts the ranks (local)")
    parser.add_argument("--nproc", type=int, metavar="N", help="ranks (one a visible GPU; 1 without GPUs)")
    parser.add_argument("--master-port", type=int, metavar="PORT", help="port of rank 0 (a free one)")
    parser.add_argument(
        "--log-dir",
        type=Path,
        metavar="DIR",
        help="where ranks 1 and up write rank-N.log; rank 0 writes to the terminal (a temporary folder, "
        "kept when the run fails)",
    )
    parser.add_argument(
        "--grace-s",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds from the end of the first rank until the others are killed (30)",
    )
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
    parser.add_argument("--dry-run", action="store_true", help="print the command lines and start nothing")
    return parser


def _run(options: argparse.Namespace, *, overrides: tuple[str, ...], verb_args: tuple[str, ...]) -> int:
    if not 0 <= options.grace_s < float("inf"):
        raise LaunchError(f"--grace-s must be 0 or more, not {options.grace_s:g}", exit_code=EXIT_USAGE)
    restarts = _restarts(options)
    nproc = max(1, count_gpus(os.environ)) if options.nproc is None else options.nproc
    port = options.master_port
    if port is None:
        port = free_port(master_ports(first_ephemeral_port()), seed=os.getpid())
    job = Job(
        run_file=options.run_file,
        verb=options.verb,
        overrides=overrides,
        verb_args=verb_args,
        via=options.via,
        num_processes=nproc,
        master_port=port,
    )
    require_port(port)
    to_start = commands(job, python=sys.executable, num_cpus=count_cpus(), environ=os.environ)
    if options.dry_run:
        print("\n".join(f"# {command.name}\n{shown(command)}" for command in to_start))
        return 0
    fixed_port = options.master_port is not None
    return _supervised(job, restarts, fixed_port=fixed_port, log_dir=options.log_dir, grace_s=options.grace_s)


def _restarts(options: argparse.Namespace) -> Restarts:
    if options.restarts < 0:
        raise LaunchError(f"--restarts must be 0 or more, not {options.restarts}", exit_code=EXIT_USAGE)
    if not 0 <= options.restart_pause_s < float("inf"):
        raise LaunchError(f"--restart-pause-s must be 0 or more, not {options.restart_pause_s:g}", exit_code=EXIT_USAGE)
    return Restarts(budget=options.restarts, pause_s=options.restart_pause_s, after_stop=options.restart_stopped)


def _supervised(job: Job, restarts: Restarts, *, fixed_port: bool, log_dir: Path | None, grace_s: float) -> int:
    run_dir = ask_run_dir(job, python=sys.executable)
    log_dir_used = log_dir or Path(tempfile.mkdtemp(prefix="sft-launch-"))
    with signals_held() as mask:

        def start(number: int) -> tuple[Ending, Verdict]:
            told = {"SFT_DIST_RESTART": str(number)} if restarts.budget else {}
            port = job.master_port
            if number and not fixed_port:
                # What is left of the start before may still hold its port.
                port = free_port(master_ports(first_ephemeral_port()), seed=os.getpid() + number * PORT_STRIDE)
            again = replace(job, master_port=port)
            to_start = commands(again, python=sys.executable, num_cpus=count_cpus(), environ=os.environ | told)
            to_start = tuple(replace(command, env={**command.env, **told}) for command in to_start)
            mark = outcome_mark(run_dir)
            ending = supervise(to_start, log_dir=log_dir_used, grace_s=grace_s, mask=mask)
            # deepspeed flattens exit codes, so what rank 0 wrote comes first; our own children tell the truth.
            outcome = read_outcome(run_dir, mark_before=mark) if job.via == "deepspeed" else None
            return ending, judge(ending, via=job.via, outcome=outcome)

        # Other verbs than train leave no checkpoints to tell progress by.
        published = (lambda: checkpoints(run_dir)) if job.verb == "train" else None
        code = keep_running(start, restarts, published=published)
    if log_dir is None and code in (0, EXIT_REQUEUE):
        shutil.rmtree(log_dir_used, ignore_errors=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
