"""Everything that needs a GPU, in one command and within ten minutes: the GPU tests, then training near its floor.

    make gpu-wheels          where there is a network: collects what a bare GPU machine lacks, for Python 3.12
    make gpu-check           on the GPU machine, offline
    python3 benchmarks/gpu_check.py --cpu-rehearsal      the same way through with tiny models, without a GPU

Llama-like models of about 1B and 8B parameters (random weights; 8B with 16-bit optimizer states, since others do not
fit), packs of 4,096 and 8,192, one GPU. sft-dist runs `sft-dist train`, which is ended after its last counted step,
before it writes a checkpoint; plain transformers is benchmarks/training_plain.py. The loss of step 1 must be the same
in all rows of the same conversations. The floor is the hardware FLOPs of a step at the rate of the model's own matrix
products, measured here. A part for which too little time is left is skipped, and said to be.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEAK_FLOPS = 989e12  # H100 and H200 SXM, dense bfloat16, by NVIDIA's data sheet
PUBLIC = {"what": "7B, S = 4,096, full recomputation, one H200 (KempnerForge)", "tokens_per_s": 10_471}
DISCARDED = 2
LOSS_BOUND = 0.03  # nats of the mean loss of a step: bfloat16 forwards by different kernels

Data = Literal["conversations", "documents"]
Sizes = dict[str, int | bool]


@dataclass(frozen=True)
class Row:
    """One training: by us or by plain transformers."""

    way: Literal["sft-dist", "plain"]
    size: str
    length: int
    recompute: bool
    data: Data = "conversations"
    compile: bool = False
    needs_s: float = 60.0  # to start, load and take the steps

    @property
    def name(self) -> str:
        how = ["recomputed" if self.recompute else "kept"] + (["compiled"] if self.compile else [])
        return f"{self.way:<8} {self.size:<3} packs of {self.length:>5,} {self.data:<13} {', '.join(how)}"


@dataclass(frozen=True)
class Setting:
    sizes: dict[str, Sizes]
    rows: list[Row]
    step_tokens: int
    steps: int
    num_steps_of_data: int


def llama(hidden: int, intermediate: int, layers: int, heads: int, keys: int, vocabulary: int, *, tied: bool) -> Sizes:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8_192,
    }


def real_setting(*, can_compile: bool) -> Setting:
    """In the order of what matters most: what the time does not allow is skipped from the end."""
    sizes = {
        "1B": llama(2_048, 8_192, 16, 32, 8, 128_256, tied=True),
        "8B": llama(4_096, 14_336, 32, 32, 8, 128_256, tied=False),
    }
    rows = [
        Row("sft-dist", "8B", 4_096, recompute=False, needs_s=75),
        Row("plain", "8B", 4_096, recompute=True, needs_s=90),
        Row("sft-dist", "8B", 4_096, recompute=True, data="documents", needs_s=75),
        Row("sft-dist", "1B", 4_096, recompute=False, needs_s=40),
        Row("plain", "1B", 4_096, recompute=False, needs_s=45),
        Row("sft-dist", "1B", 8_192, recompute=False, needs_s=40),
        Row("sft-dist", "8B", 8_192, recompute=False, needs_s=75),
        Row("sft-dist", "8B", 4_096, recompute=True, needs_s=75),
    ]
    if can_compile:
        rows[4:4] = [Row("sft-dist", "1B", 4_096, recompute=False, compile=True, needs_s=75)]
        rows[1:1] = [Row("sft-dist", "8B", 4_096, recompute=False, compile=True, needs_s=100)]
    return Setting(sizes, rows, step_tokens=16_384, steps=7, num_steps_of_data=10)


def rehearsal_setting() -> Setting:
    sizes = {"1B": llama(32, 64, 2, 4, 2, 128, tied=True), "8B": llama(64, 96, 2, 4, 2, 128, tied=False)}
    rows = [
        Row("sft-dist", "8B", 64, recompute=False, needs_s=20),
        Row("plain", "8B", 64, recompute=True, needs_s=20),
        Row("sft-dist", "1B", 128, recompute=True, data="documents", needs_s=20),
        Row("sft-dist", "1B", 64, recompute=False, needs_s=1e6),  # never fits: shows how a part is skipped
    ]
    return Setting(sizes, rows, step_tokens=256, steps=4, num_steps_of_data=8)


class Check:
    """One run of the check: where things lie, how much time is left, what came out."""

    def __init__(self, options: argparse.Namespace, place: Path) -> None:
        self.place = place
        self.is_rehearsal: bool = options.cpu_rehearsal
        self._deadline = time.monotonic() + 60 * options.minutes
        self.site = place / "site"
        self.skipped: list[str] = []
        self.tests: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.rates: dict[str, float] = {}

    @property
    def left_s(self) -> float:
        return self._deadline - time.monotonic()

    def say(self, text: str) -> None:
        print(f"[{self.left_s:4.0f} s left] {text}", flush=True)

    def allows(self, what: str, needs_s: float) -> bool:
        """Whether enough time is left; says so and remembers it where it is not."""
        if self.left_s >= needs_s:
            return True
        self.skipped.append(f"{what}: needs about {needs_s:.0f} s, {self.left_s:.0f} s are left")
        self.say(f"skipped {self.skipped[-1]}")
        return False

    def failed(self, what: str, why: str) -> None:
        self.skipped.append(f"{what}: {why}")
        self.say(f"failed: {self.skipped[-1]}")

    def environment(self) -> dict[str, str]:
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.site), str(ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_EXTENSIONS_DIR": str(self.place / "torch_extensions"),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29531",
        }
        if self.is_rehearsal:
            variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        return os.environ | variables

    def run(self, command: Sequence[str], log: Path, *, timeout_s: float, until: Any = None) -> int | None:
        """Exit code; None where the time ran out. `until()` true ends the command: it has done what is measured.

        The command gets a process group of its own, which ends with it whatever happens.
        """
        deadline = time.monotonic() + min(timeout_s, self.left_s)
        with open(log, "w") as file:
            process = subprocess.Popen(
                command, env=self.environment(), stdout=file, stderr=subprocess.STDOUT, start_new_session=True, cwd=ROOT
            )
            try:
                while process.poll() is None:
                    if until is not None and until():
                        return 0
                    if time.monotonic() > deadline:
                        return None
                    time.sleep(0.1)
                return process.returncode
            finally:
                try:
                    os.killpg(process.pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
                process.wait()


def install(check: Check, wheels: Path) -> None:
    """Put the wheels where only this run finds them. Raises SystemExit where pip does not take them."""
    found = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if not found:
        check.say(f"no wheels in {wheels}: what this Python has is used")
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
    command += ["--no-cache-dir", "--upgrade", "--target", str(check.site), *found]
    log = check.place / "pip.log"
    if check.run(command, log, timeout_s=120):
        raise SystemExit(f"gpu-check: the wheels in {wheels} cannot be installed:\n{log.read_text()[-2_000:]}")
    check.say(f"{len(found)} wheels installed")
    sys.path.insert(0, str(check.site))


def run_tests(check: Check) -> None:
    """pytest over tests/gpu, a third of the time at most."""
    report = check.place / "tests.xml"
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--junit-xml", str(report)]
    log = check.place / "tests.log"
    limit_s = check.left_s / 3
    code = check.run(command, log, timeout_s=limit_s)
    lines = log.read_text().splitlines()
    outcome = {None: f"stopped after {limit_s:.0f} s", 0: "passed", 4: "there are none", 5: "there are none"}
    check.tests = {"outcome": outcome.get(code, "FAILED"), "summary": lines[-1] if lines else ""}
    if code not in (0, 4, 5):
        print("\n".join(lines[-60:]), flush=True)
    check.say(f"GPU tests: {check.tests['outcome']}  {check.tests['summary']}")


def build_inputs(check: Check, setting: Setting) -> dict[str, Path]:
    """The models and data that rows need; a model that could not be made is left out."""
    from gpu_inputs import write_conversations, write_documents

    models = {}
    for size in dict.fromkeys(row.size for row in setting.rows):
        folder, log = check.place / f"model-{size}", check.place / f"model-{size}.log"
        started = time.monotonic()
        command = [sys.executable, str(HERE / "gpu_inputs.py"), str(folder), json.dumps(setting.sizes[size])]
        if check.run(command, log, timeout_s=150):
            check.failed(f"the model of {size}", log.read_text()[-1_500:])
            continue
        models[size] = folder
        check.say(f"model of {size} made in {time.monotonic() - started:.0f} s")
    vocabulary = int(next(iter(setting.sizes.values()))["vocab_size"])
    total = setting.num_steps_of_data * setting.step_tokens
    longest = max(row.length for row in setting.rows)
    for row in setting.rows:
        path = data_file(check, row)
        if path.exists():
            continue
        if row.data == "conversations":
            shortest_pack = min(r.length for r in setting.rows if r.data == row.data)
            write_conversations(path, num_tokens=total, longest=min(longest, shortest_pack), vocabulary=vocabulary)
        else:
            write_documents(path, num_tokens=total, length=row.length, vocabulary=vocabulary)
    return models


def data_file(check: Check, row: Row) -> Path:
    return check.place / (f"{row.data}.jsonl" if row.data == "conversations" else f"{row.data}-{row.length}.jsonl")


def write_run_file(check: Check, setting: Setting, row: Row, model: Path) -> Path:
    dtype = "float32" if check.is_rehearsal else "bfloat16"
    section = {"path": str(model), "dtype": dtype, "gradient_checkpointing": row.recompute}
    tree = {
        "run_dir": str(check.place / "run"),
        "model": section | ({"compile": True} if row.compile else {}),
        "data": {
            "train": str(data_file(check, row)),
            "max_length": row.length,
            "cache_dir": str(check.place / "prepared"),
        },
        "batch": {"global_packs": setting.step_tokens // row.length},
        "optimizer": {"learning_rate": 1e-5},
        # One step more than is counted: the run is ended in it, before its checkpoint.
        "schedule": {"name": "constant", "max_steps": setting.steps + 1, "warmup_fraction": 0.0},
        "deepspeed": "cpu" if check.is_rehearsal else ("zero3_16bit" if row.size == "8B" else "zero3"),
        "checkpoint": {"every": 0, "resume": "never"},
        "logging": {"tensorboard": False, "details_every": 0},
    }
    path = check.place / "run.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def write_deepspeed_file(check: Check, row: Row) -> Path:
    """For plain transformers: our DeepSpeed file, and what our run file decides."""
    name = "cpu" if check.is_rehearsal else ("zero3_16bit" if row.size == "8B" else "zero3")
    tree = json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())
    decided = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": not check.is_rehearsal} | tree.get("bf16", {}),
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**62,
    }
    path = check.place / "deepspeed.json"
    path.write_text(json.dumps(tree | decided))
    return path


def entries(path: Path, kind: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text().split("\n")[:-1]  # the last one may be half written
    return [entry for entry in map(json.loads, lines) if entry["kind"] == kind]


def train_ours(check: Check, setting: Setting, row: Row, run_file: Path) -> dict[str, Any] | None:
    """The figures of each step, or None where there are none (which is said)."""
    metrics, log = check.place / "run" / "metrics.jsonl", check.place / "train.log"
    shutil.rmtree(check.place / "run", ignore_errors=True)
    command = [sys.executable, "-m", "sft_dist", "train", str(run_file)]
    code = check.run(
        command, log, timeout_s=3 * row.needs_s, until=lambda: len(entries(metrics, "train")) >= setting.steps
    )
    steps = entries(metrics, "train")[: setting.steps]
    if len(steps) < setting.steps:
        why = "the time ran out" if code is None else f"exit code {code}"
        check.failed(row.name, f"{why} after {len(steps)} steps:\n{log.read_text()[-2_000:]}")
        return None
    keys = {"step_time_s": "seconds", "num_tokens": "tokens", "num_target_tokens": "targets", "loss": "loss"}
    renamed = [{new: step[old] for old, new in keys.items()} for step in steps]
    shares = entries(metrics, "train_time")
    return {
        "first_loss": steps[0]["loss"],
        "steps": renamed,
        "peak_gib": steps[-1]["memory_gib"],
        "time_share": {k: v for k, v in shares[-1].items() if k not in ("kind", "step")} if shares else None,
    }


def train_plain(check: Check, row: Row, batches: Path, model: Path) -> dict[str, Any] | None:
    output, log = check.place / "answer", check.place / "train.log"
    command = [sys.executable, str(HERE / "training_plain.py"), "--model", str(model), "--batches", str(batches)]
    command += ["--deepspeed", str(write_deepspeed_file(check, row)), "--learning-rate", "1e-5"]
    command += ["--output", str(output)] + (["--recompute"] if row.recompute else [])
    code = check.run(command, log, timeout_s=3 * row.needs_s)
    if code != 0:
        why = "the time ran out" if code is None else f"exit code {code}"
        check.failed(row.name, f"{why}:\n{log.read_text()[-2_000:]}")
        return None
    return dict(json.loads(output.with_suffix(".0.json").read_text())) | {"time_share": None}


def matrix_rate(check: Check, row: Row, model: Path, tokens: float, targets: float) -> float | None:
    """FLOP/s of the model's own products at this pack length, measured once."""
    key = f"{row.size} {row.length} {row.data}"
    if key not in check.rates:
        log = check.place / "rate.log"
        command = [sys.executable, str(HERE / "matrix_rate.py"), "--model", str(model)]
        command += ["--tokens", str(round(tokens)), "--targets", str(round(targets))]
        if check.run(command, log, timeout_s=60) != 0:
            check.failed(f"matrix products of {key}", log.read_text()[-1_000:])
            return None
        check.rates[key] = float(log.read_text().splitlines()[-1])
    return check.rates[key]


def measure(check: Check, setting: Setting, row: Row, model: Path) -> None:
    """One row of the table, with its loss against that of the first row of the same model, packs and data."""
    from matrix_rate import Shape
    from training import write_batches

    run_file = write_run_file(check, setting, row, model)
    batches = write_batches(run_file, check.place / "batches.json", ranks=1, steps=setting.steps)
    packs = setting.step_tokens // row.length
    rate = matrix_rate(check, row, model, batches.tokens / packs, batches.targets / packs)
    if row.way == "sft-dist":
        answer = train_ours(check, setting, row, run_file)
    else:
        answer = train_plain(check, row, batches.path, model)
    if answer is None or rate is None:
        return
    counted = answer["steps"][DISCARDED:]
    totals = round(batches.tokens), round(batches.targets), round(batches.squares)
    shape = Shape.of(model)
    model_flops = shape.model_flops(*totals)
    floor_s = shape.hardware_flops(*totals, recompute=row.recompute) / rate
    tokens_per_s = median(step["tokens"] / step["seconds"] for step in counted)
    step_s = totals[0] / tokens_per_s
    same = [r for r in check.rows if (r["size"], r["length"], r["data"]) == (row.size, row.length, row.data)]
    difference = abs(answer["first_loss"] - same[0]["first_loss"]) if same else 0.0
    check.rows.append(
        asdict(row)
        | {
            "name": row.name,
            "tokens_per_s": round(tokens_per_s, 1),
            "target_tokens_per_s": round(median(step["targets"] / step["seconds"] for step in counted), 1),
            "step_s": round(step_s, 4),
            "mfu": None if check.is_rehearsal else round(model_flops / step_s / PEAK_FLOPS, 4),
            "share_of_matrix_rate": round(model_flops / step_s / rate, 4),
            "floor_tokens_per_s": round(totals[0] / floor_s, 1),
            "share_of_floor": round(floor_s / step_s, 4),
            "matrix_tflops": round(rate / 1e12, 4),
            "peak_gib": round(answer["peak_gib"], 2),
            "first_loss": answer["first_loss"],
            "loss_difference": difference,
            "is_loss_equal": difference <= LOSS_BOUND,
            "time_share": answer["time_share"],
            "steps": answer["steps"],
        }
    )
    check.say(line(check.rows[-1]))


def line(row: dict[str, Any]) -> str:
    mfu = "    -" if row["mfu"] is None else f"{row['mfu']:>5.1%}"
    equal = "" if row["is_loss_equal"] else f"  LOSS DIFFERS by {row['loss_difference']:.3f}"
    return (
        f"{row['name']:<52} {row['tokens_per_s']:>9,.0f} {row['target_tokens_per_s']:>9,.0f} {mfu} "
        f"{row['share_of_matrix_rate']:>6.1%} {row['floor_tokens_per_s']:>9,.0f} {row['share_of_floor']:>6.1%} "
        f"{row['peak_gib']:>6.1f}{equal}"
    )


def table(check: Check) -> list[str]:
    heads = f"{'':<52} {'tokens/s':>9} {'targets/s':>9} {'mfu':>5} {'of gemm':>6} {'floor':>9} {'of it':>6} {'GiB':>6}"
    lines = [heads, *(line(row) for row in check.rows)]
    lines.append(f"{'public: ' + PUBLIC['what']:<62} {PUBLIC['tokens_per_s']:>9,} tokens/s; compare with 8B documents")
    for row in check.rows:
        if row["time_share"]:
            lines.append(f"time of {row['name']}: {json.dumps(row['time_share'])}")
    return lines + [f"not done: {item.splitlines()[0]}" for item in check.skipped]


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ["torch", "triton", "transformers", "deepspeed", "datasets"]
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def device_name() -> str:
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU')"
    return subprocess.check_output([sys.executable, "-c", code], text=True).strip()


def write_result(check: Check, output: Path, device: str) -> None:
    result = {
        "benchmark": "gpu-check" + (" (rehearsal on the CPU: its figures mean nothing)" if check.is_rehearsal else ""),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions(),
        "tests": check.tests,
        "public": PUBLIC,
        "skipped": check.skipped,
        "rows": check.rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")


def default_output() -> Path:
    out = os.environ.get("OUT")
    return Path(out) / "gpu.json" if out else HERE / "results" / "gpu.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="installed offline, for this run only")
    parser.add_argument("--minutes", type=float, default=9.5, help="never longer than this")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny models, no GPU: does the way hold?")
    parser.add_argument("--output", type=Path, default=default_output())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check = Check(options, Path(folder))
        device = "CPU" if options.cpu_rehearsal else device_name()
        if device == "CPU" and not options.cpu_rehearsal:
            raise SystemExit("gpu-check: torch sees no GPU here; --cpu-rehearsal goes the same way without one")
        if not options.cpu_rehearsal:
            install(check, options.wheels.resolve())
        sys.path.insert(1, str(ROOT))
        from sft_dist.config import ModelConfig

        can_compile = "compile" in ModelConfig.model_fields
        setting = rehearsal_setting() if options.cpu_rehearsal else real_setting(can_compile=can_compile)
        run_tests(check)
        models = build_inputs(check, setting)
        for row in setting.rows:
            if row.size in models and check.allows(row.name, row.needs_s):
                measure(check, setting, row, models[row.size])
                write_result(check, options.output, device)  # what is done stays if the machine is taken away
        write_result(check, options.output, device)
        print("\n".join(table(check)), flush=True)
    has_failed = check.tests["outcome"] == "FAILED" or any(not row["is_loss_equal"] for row in check.rows)
    return 1 if has_failed or not check.rows else 0


if __name__ == "__main__":
    sys.exit(main())
