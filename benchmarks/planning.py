"""Planning: rates of packing, fill, balance over ranks, and what balancing over a window of steps costs in randomness.

    python benchmarks/planning.py

One core, no torch. Lengths are drawn, with a fixed seed. Rates are medians of three, by the clock and in processor
time, which neighbours disturb less; everything else is counted and the same everywhere. About half a minute.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.cost import CostModel, DecoderLayer
from sft_dist.data.packing import best_fit_decreasing, pack_table
from sft_dist.data.plan import Plan

HERE = Path(__file__).resolve().parent
Lengths = NDArray[np.int64]
CAPACITIES = (2048, 8192, 32_768, 131_072)
WINDOWS = (1, 2, 4, 8, 16)
RANKS = 64
LAYER_8B = DecoderLayer(hidden_size=4096, query_size=4096, key_value_size=1024, mlp_size=14_336)
COST_8B = CostModel.of_layers([LAYER_8B] * 32, vocab_size=128_256)


def conversations(num: int, capacity: int, *, median: float = 600, sigma: float = 1.5) -> Lengths:
    """Lognormal; what is longer than a pack is cut to it."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), sigma, num)
    return np.clip(drawn, 8, capacity).astype(np.int64)


DISTRIBUTIONS: dict[str, Callable[[int, int], Lengths]] = {
    "lognormal, median 600, sigma 1.5": lambda num, capacity: conversations(num, capacity),
    "lognormal, median 250, sigma 1": lambda num, capacity: conversations(num, capacity, median=250, sigma=1),
    "lognormal, median capacity / 20": lambda num, capacity: conversations(
        num, capacity, median=capacity / 20, sigma=1.2
    ),
    "uniform up to capacity": lambda num, capacity: np.random.default_rng(0).integers(1, capacity + 1, num),
    "a third to a half of capacity": lambda num, capacity: np.random.default_rng(0).integers(
        capacity // 3, capacity // 2, num
    ),
    "all equal": lambda num, capacity: np.full(num, capacity // 7),
}


def seconds(action: Callable[[], object], clock: Callable[[], float], *, repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        started = clock()
        action()
        times.append(clock() - started)
    return statistics.median(times)


def packing(num: int) -> list[dict[str, Any]]:
    rows = []
    for name, draw in DISTRIBUTIONS.items():
        for capacity in CAPACITIES:
            lengths = draw(num, capacity)
            action = partial(best_fit_decreasing, lengths, capacity)
            num_packs = len(pack_table(lengths, capacity))
            rows.append(
                {
                    "lengths": name,
                    "capacity": capacity,
                    "distinct_lengths": len(np.unique(lengths)),
                    "conversations_per_s": round(num / seconds(action, time.perf_counter)),
                    "conversations_per_cpu_s": round(num / seconds(action, time.process_time)),
                    "packs": num_packs,
                    "fill": round(float(lengths.sum()) / (num_packs * capacity), 5),
                }
            )
    return rows


def plan_of(lengths: Lengths, capacity: int, global_packs: int, balance_steps: int) -> Plan:
    return Plan(
        lengths,
        np.maximum(lengths * 2 // 5, 1),
        cost_model=COST_8B,
        max_length=capacity,
        global_packs=global_packs,
        balance_steps=balance_steps,
        seed=0,
        epochs=1,
    )


def balance(num: int) -> list[dict[str, Any]]:
    """Mean over maximum of the predicted cost of a micro-step, 8B model, 64 ranks."""
    rows = []
    for capacity in CAPACITIES:
        lengths = conversations(num, capacity)
        for accumulation in (1, 2, 4, 8):
            plans = [plan_of(lengths, capacity, RANKS * accumulation, window) for window in WINDOWS]
            found = {f"window_{plan.balance_steps}": round(plan.balance(RANKS, 1), 4) for plan in plans}
            rows.append({"capacity": capacity, "accumulation": accumulation, "steps": plans[0].num_steps} | found)
    return rows


def randomness(num: int) -> list[dict[str, Any]]:
    """How lengths are spread over steps; `window: null` are samples in random order, as many in every step."""
    rows = []
    for capacity in (8192, 32_768):
        lengths = conversations(num, capacity)
        for global_packs in (8, 64, 512):
            for window in WINDOWS:
                plan = plan_of(lengths, capacity, global_packs, window)
                steps = [np.array([i for pack in plan.packs(s) for i in pack]) for s in range(plan.num_steps)]
                rows.append(
                    {"capacity": capacity, "global_packs": global_packs, "window": window} | spread(lengths, steps)
                )
            steps = np.array_split(np.random.default_rng(1).permutation(num), len(steps))
            rows.append({"capacity": capacity, "global_packs": global_packs, "window": None} | spread(lengths, steps))
    return rows


def spread(lengths: Lengths, steps: list[Lengths]) -> dict[str, float]:
    """Figures of the mean sample length of steps, and the share of the variance of log length that is between them."""
    means = np.array([lengths[step].mean() for step in steps])
    logs = np.log(lengths)
    between = sum(len(step) * (logs[step].mean() - logs.mean()) ** 2 for step in steps)
    return {
        "steps": len(steps),
        "correlation_with_step_number": round(float(np.corrcoef(np.arange(len(steps)), means)[0, 1]), 4),
        "correlation_of_consecutive_steps": round(float(np.corrcoef(means[:-1], means[1:])[0, 1]), 4),
        "chance": round(len(steps) ** -0.5, 4),  # standard deviation of a correlation of as many random numbers
        "relative_spread_of_means": round(float(means.std() / means.mean()), 4),
        "variance_between_steps": round(float(between / ((logs - logs.mean()) ** 2).sum()), 4),
    }


def plan_times(num: int) -> list[dict[str, Any]]:
    rows = []
    for capacity in (2048, 8192, 32_768):
        lengths = conversations(num, capacity)
        started = time.process_time()
        plan = plan_of(lengths, capacity, 64, 4)
        made_s = time.process_time() - started
        per_step_s = (
            seconds(lambda plan=plan: [(plan.packs(s), plan.denominator(s)) for s in range(100)], time.process_time)
            / 100
        )
        rows.append(
            {"capacity": capacity, "samples": num, "plan_cpu_s": round(made_s, 2), "step_cpu_s": round(per_step_s, 6)}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num", type=int, default=200_000, help="conversations of each distribution")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "planning.json")
    options = parser.parse_args()
    load_before = os.getloadavg()[0]
    results = {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "cores": len(os.sched_getaffinity(0)),
        "conversations": options.num,
        "packing": packing(options.num),
        "plans": plan_times(5 * options.num),
        "balance_of_64_ranks_8b": balance(options.num),
        "randomness": randomness(options.num),
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    for name in ("packing", "plans", "balance_of_64_ranks_8b", "randomness"):
        print(name)
        for row in results[name]:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
