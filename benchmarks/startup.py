"""Start-up of every verb: time of `sft-dist VERB --help`, whole processes, and what they import.

    python benchmarks/startup.py            11 repeats of every verb, interleaved

Beside each verb, in the same run: an interpreter that does nothing, and one that only imports torch, transformers and
deepspeed, which is what a verb waits for that imports them before it reads its arguments.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "startup.json"
HEAVY = ("torch", "transformers", "deepspeed", "numpy", "pyarrow", "pydantic")


def verbs() -> list[str]:
    from sft_dist.cli import verb_names

    return list(verb_names())


def commands() -> dict[str, list[str]]:
    help_of = {verb: [sys.executable, "-m", "sft_dist", verb, "--help"] for verb in verbs()}
    return {
        "python that does nothing": [sys.executable, "-c", "pass"],
        "sft-dist --help": [sys.executable, "-m", "sft_dist", "--help"],
        **{f"sft-dist {verb} --help": command for verb, command in help_of.items()},
        "import torch, transformers, deepspeed": [sys.executable, "-c", "import torch, transformers, deepspeed"],
    }


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment(), check=True, capture_output=True)
    return time.perf_counter() - started


def imported(command: list[str]) -> dict[str, object]:
    """The number of modules a command imports, and which of the heavy packages are among them."""
    timed = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(timed, cwd=ROOT, env=environment(), check=True, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = [line.rsplit("|", 1)[1].strip() for line in lines[1:]]
    return {"modules": len(names), "heavy": [name for name in HEAVY if name in names]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    options = parser.parse_args()
    before = os.getloadavg()
    times: dict[str, list[float]] = {name: [] for name in commands()}
    for repeat in range(options.repeats):
        for name, command in commands().items():
            if name.startswith("import") and repeat >= 3:
                continue  # ten times as slow as all others together
            times[name].append(seconds(command))
    cases = {}
    for name, command in commands().items():
        facts = imported(command)
        cases[name] = {"median_s": statistics.median(times[name]), "min_s": min(times[name]), **facts}
        print(f"{name:<40} median {cases[name]['median_s']:6.3f} s   {facts['modules']:>5} modules  {facts['heavy']}")
    RESULTS.parent.mkdir(exist_ok=True)
    content = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": {"before": before, "after": os.getloadavg()},
        "repeats": options.repeats,
        "cases": cases,
    }
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
