"""Kill a tiny training on two CPU ranks at random instants, restart it each time, and compare every bit at the end.

    python benchmarks/chaos.py --kills 20           one run; adds to results/chaos.json
    python benchmarks/chaos.py --kills 20 --folder DIR      keeps the undisturbed run there for the next time

What is killed (a rank, sft-launch itself), by which signal and in which phase is drawn from --seed, which is printed.
The run has dropout, accumulation, an evaluation every other step and a checkpoint every step. It ends with an error
where the run does, or where one bit of parameters, moments or losses differs from the undisturbed run; that is written
down, too.
"""

import argparse
import json
import os
import platform
import random
import shlex
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from sft_dist.train import goodput  # noqa: E402
from tests.end_to_end.conftest import Place, make_place  # noqa: E402
from tests.helpers.chaos import RANK_SIGNALS, Chaos, recoveries_s  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "chaos.json"
EVALUATE_EVERY = 2
LAUNCH = ["--nproc", "2", "--restarts", "1000", "--restart-stopped", "--restart-pause-s", "0.05", "--grace-s", "1"]


def undisturbed(folder: Path, num_steps: int) -> Place:
    """A place with a whole run `whole`, made unless it is there."""
    place = Place(folder, folder / "run.yaml")
    if not (folder / "whole" / "summary.json").exists():
        place = make_place(
            folder,
            schedule={"epochs": 100, "max_steps": num_steps},
            evaluate={"every": EVALUATE_EVERY},
            checkpoint={"every": 1, "keep": 2},
        )
        done = place.train("whole", "checkpoint.every=0", "checkpoint.keep_best=false")
        assert [process.returncode for process in done] == [0, 0], done[0].stdout
    return place


def is_equal(place: Place, run: str, num_steps: int) -> bool:
    """Every bit of parameters and moments at the end, and the loss of every step, each once."""
    expected, found = place.state("whole", num_steps), place.state(run, num_steps)
    tensors = expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [[(entry["step"], entry["loss"]) for entry in place.steps(name)] for name in ("whole", run)]
    return tensors and losses[0] == losses[1]


def one_run(place: Place, num_steps: int, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    run = f"killed-{seed}"
    run_dir = place.folder / run
    chaos = Chaos(
        [str(place.run_file), f"run_dir={run_dir}", *LAUNCH, *options.override],
        run_dir,
        evaluate_every=EVALUATE_EVERY,
        rng=random.Random(seed),
        rank_signals=tuple(options.signals.split(",")),
    )
    begun, load = time.monotonic(), os.getloadavg()
    problem = None
    try:
        chaos.run(options.kills)
        equal = is_equal(place, run, num_steps)
    except AssertionError as error:
        equal, problem = False, str(error)
    entries = goodput.read(run_dir)
    times = goodput.account(entries)
    print(*times.lines(), sep="\n")
    kills = chaos.kills
    return {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/chaos.py", *sys.argv[1:]]),
        "seed": seed,
        "equal": equal,
        "problem": problem,
        "kills": len(kills),
        "seconds": time.monotonic() - begun,
        "load_average": {"before": load, "after": os.getloadavg()},
        "steps": num_steps,
        "time": times.as_dict(),
        "recoveries_s": recoveries_s(kills, entries),
        "blows": [f"{kill.phase}, {kill.signal}, {kill.target}, after step {kill.step}" for kill in kills],
        "versions": {name: version(name) for name in ("torch", "deepspeed", "transformers")},
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }


def totals(runs: list[dict[str, Any]]) -> dict[str, Any]:
    def counted(names: Iterable[str]) -> dict[str, int]:
        return dict(sorted(Counter(names).items()))

    blows = [blow.split(", ") for run in runs for blow in run["blows"]]
    recoveries = sorted(seconds for run in runs for seconds in run["recoveries_s"])
    return {
        "kills": len(blows),
        "runs": len(runs),
        "all_equal": all(run["equal"] for run in runs),
        "by_phase": counted(blow[0] for blow in blows),
        "by_signal": counted(blow[1] for blow in blows),
        "by_target": counted(blow[2] for blow in blows),
        "recovery_s": {
            "what": "from a blow to the end of the first new step, start-up included; several before it count as one",
            "count": len(recoveries),
            "median": statistics.median(recoveries),
            "p90": recoveries[int(0.9 * (len(recoveries) - 1))],
            "max": recoveries[-1],
        }
        if recoveries
        else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--steps", type=int, help="of the run (default: 4 a kill and 4 more, so that none is left over)"
    )
    parser.add_argument("--seed", type=int, help="default: a random one")
    parser.add_argument("--signals", default=",".join(RANK_SIGNALS), help="drawn from, those to ranks")
    parser.add_argument(
        "--folder", type=Path, help="keep the undisturbed run here and use it again (with the same --steps)"
    )
    parser.add_argument("override", nargs="*", metavar="key=value", help="keys of the run file, for the killed run")
    options = parser.parse_args()
    seed = random.randrange(10**6) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    num_steps = options.steps or 4 * options.kills + 4
    with tempfile.TemporaryDirectory(prefix="chaos-") as temporary:
        place = undisturbed(options.folder or Path(temporary), num_steps)
        run = one_run(place, num_steps, options, seed)
    before = json.loads(RESULTS.read_text())["invocations"] if RESULTS.exists() else []
    runs = [*before, run]
    RESULTS.write_text(json.dumps({"totals": totals(runs), "invocations": runs}, indent=1) + "\n")
    print(json.dumps(totals(runs), indent=1))
    sys.exit(0 if run["equal"] else 1)


if __name__ == "__main__":
    main()
