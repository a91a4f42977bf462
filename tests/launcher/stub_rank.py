"""Stands in for sft-dist: the tests copy this file to FOLDER/sft_dist/__main__.py and put FOLDER on PYTHONPATH.

`config` answers with the folder of the run file. Any other verb writes RUN_DIR/rank-N.json (its arguments, environment
and process ids) once its signal handlers are in place, then does what the override `rankN=ACTION` or `all=ACTION` says:
    wait      stay until signalled, then end with 75, as a run with a checkpoint does
    deaf      stay, whatever the signal
    exit:C    end with code C; a file RUN_DIR/go is waited for first
    startup   stay without any handler, as in the first seconds of Python
    lives:A,B,...   A in the first start, B after one restart, ...; the last in all that follow. RUN_DIR/starts has a
                    line of rank 0 for each; `new:C` is exit:C after a new checkpoint
`outcome=C` has rank 0 write outcome.json with that exit code before it ends; `helper=1` gives each rank a child.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def main() -> int:
    verb, run_file, *rest = sys.argv[1:]
    options = dict(word.split("=", 1) for word in rest if "=" in word)
    run_dir = Path(run_file).resolve().parent
    if verb == "config":
        return config(options, run_dir)
    rank = int(os.environ["RANK"])
    wish = options.get(f"rank{rank}", options.get("all", "exit:0"))
    if wish.startswith("lives:"):
        wish = life(wish.removeprefix("lives:").split(","), run_dir, rank)
    action, _, code = wish.partition(":")
    received: list[int] = []
    if action != "startup":
        for signum in SIGNALS:
            signal.signal(signum, lambda number, _: received.append(number))
    helper = subprocess.Popen(["sleep", "1000"]).pid if "helper" in options else None
    write(
        run_dir / f"rank-{rank}.json",
        {"argv": sys.argv[1:], "env": dict(os.environ), "pids": [os.getpid(), *([helper] if helper else [])]},
    )
    print(f"rank {rank} is up", flush=True)
    until(lambda: (action == "exit" and (run_dir / "go").exists()) or (action == "wait" and bool(received)))
    if rank == 0 and "outcome" in options:
        reason = f"received {received}"
        write(run_dir / "outcome.json", {"exit_code": int(options["outcome"]), "reason": reason, "step": 3})
    print(f"rank {rank} leaves, received {[signal.Signals(number).name for number in received]}", flush=True)
    return int(code) if action == "exit" else 75


def life(wishes: list[str], run_dir: Path, rank: int) -> str:
    """What this start is to do; rank 0 notes the start, and publishes a checkpoint where one is asked for."""
    number = os.environ.get("SFT_DIST_RESTART")
    wish = wishes[min(int(number or 0), len(wishes) - 1)]
    if rank == 0:
        with (run_dir / "starts").open("a") as file:
            file.write(json.dumps({"pid": os.getpid(), "restart": number, "port": os.environ["MASTER_PORT"]}) + "\n")
        if wish.startswith("new:"):
            folder = run_dir / "checkpoints" / "step-00000007"
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "manifest.json", {})
    return wish.replace("new:", "exit:")


def config(options: dict[str, str], run_dir: Path) -> int:
    if "refuse" in options:
        print("ConfigError: no such key 'refuse'", file=sys.stderr)
        return 78
    print(json.dumps({"run_dir": str(run_dir)}))
    return 0


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def write(path: Path, content: dict) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
