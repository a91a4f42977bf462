"""What a task gains and everything else loses, setting by setting: task NLL against general NLL on a real model.

    python benchmarks/moderation.py --model MODEL --task TASK.jsonl.gz --general A.jsonl.gz B.jsonl.gz [...]

Every setting is a whole training (`sft-dist train`) from the same pre-trained weights on the same steps, or points on
the way to the first one (`sft-dist evaluate --interpolate`). The records of the task are cut into training and held-out
ones, those of each general file into data.retention and what the setting "rehearsal" trains on beside the task. NLLs
are nats per token; nothing is timed.
"""

import argparse
import json
import os
import platform
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "moderation.json"
SEED = 1
RATE = 3e-4  # high for fine-tuning: so few steps shall move the weights
POINTS = (0.7, 0.5)  # on the way from the pre-trained weights (0) to the first setting's (1)


@dataclass(frozen=True)
class Setting:
    """A training and what it has in its run file beyond the others; FOLDER stands for where the data are."""

    name: str
    overrides: tuple[str, ...] = ()


# The first one is that which points lie on the way to. `--setting` adds others.
SETTINGS = (
    Setting("plain"),
    Setting("learning rate / 4", (f"optimizer.learning_rate={RATE / 4:g}",)),
    Setting("rates fall by layer", ("optimizer.layer_decay=0.9",)),
    Setting("lowest ten layers frozen", ("model.freeze=['*embed_tokens*', '*.layers.?.*']",)),
    Setting("decay toward start", ("anchor.decay=300",)),
    Setting("KL", ("anchor.kl=1",)),
    Setting("rehearsal", ("data.train=[FOLDER/train.jsonl, FOLDER/rehearsal.jsonl]",)),
    Setting("LoRA", ("adapter.kind=lora", f"optimizer.learning_rate={4 * RATE:g}")),
)


@dataclass(frozen=True)
class Row:
    name: str
    task: float
    general: dict[str, float]  # by source


def records(path: Path, num: int) -> Iterator[dict[str, Any]]:
    """`num` records of a JSON Lines file, the same ones every time, in random order."""
    import gzip

    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    for line in islice(random.Random(SEED).sample(lines, len(lines)), num):
        yield json.loads(line)


def is_short(record: dict[str, Any], most_characters: int) -> bool:
    return len(json.dumps(record.get("messages", record), ensure_ascii=False)) <= most_characters


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_run_file(folder: Path, options: argparse.Namespace) -> Path:
    """Data and the run file that all settings share."""
    most = 2 * options.max_length  # characters: what is sure to fit, whatever the tokenizer
    task = [r for r in records(Path(options.task), 10**9) if is_short(r, most)]
    train, heldout = task[options.heldout :], task[: options.heldout]
    retention, rehearsed = [], []
    for source in options.general:
        name = Path(source).name.split(".")[0]
        general = [r for r in records(Path(source), 10**9) if is_short(r, most)]
        retention.append({"path": write(folder / f"{name}.jsonl", general[: options.heldout]), "name": name})
        rehearsed += general[options.heldout :][: 10 * options.steps]
    write(folder / "rehearsal.jsonl", rehearsed)
    tree = {
        "run_dir": str(folder / "runs" / "unused"),
        "seed": SEED,
        "model": {"path": str(Path(options.model).resolve()), "gradient_checkpointing": False},
        "data": {
            "train": write(folder / "train.jsonl", train[: 40 * options.steps]),
            "heldout": write(folder / "heldout.jsonl", heldout),
            "retention": retention,
            "max_length": options.max_length,
            "cache_dir": str(folder / "prepared"),
        },
        "batch": {"global_packs": 4},
        "optimizer": {"learning_rate": RATE},
        "schedule": {"max_steps": options.steps, "warmup_fraction": 0.1},
        "evaluate": {"every": 0},
        "checkpoint": {"every": 0, "keep_best": False},
        "logging": {"tensorboard": False},
    }
    run_file = folder / "run.yaml"
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


def sft_dist(*arguments: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-m", "sft_dist", *arguments], cwd=ROOT, env=env, check=True)


def trained(run_file: Path, folder: Path, setting: Setting) -> tuple[Row, Row]:
    """Before and after a training."""
    run_dir = folder / "runs" / setting.name.replace(" ", "-").replace("/", "by")
    overrides = [override.replace("FOLDER", str(folder)) for override in setting.overrides]
    sft_dist("train", str(run_file), f"run_dir={run_dir}", *overrides)
    summary = json.loads((run_dir / "summary.json").read_text())
    kept = summary["retention"]
    before = Row(
        "pre-trained", summary["heldout_nll_before"], {name: values["before"] for name, values in kept.items()}
    )
    after = Row(setting.name, summary["heldout_nll_after"], {name: values["nll"] for name, values in kept.items()})
    if setting != SETTINGS[0]:
        shutil.rmtree(run_dir)
        return before, after
    points = ",".join(f"{point:g}" for point in POINTS)
    sft_dist("evaluate", str(run_file), f"run_dir={run_dir}", "--checkpoint", "last", "--interpolate", points)
    return before, after


def on_the_way(folder: Path) -> list[Row]:
    content = json.loads((folder / "runs" / SETTINGS[0].name / "evaluation.json").read_text())
    return [
        Row(
            f"{SETTINGS[0].name}, --interpolate {point['coefficient']:g}",
            point["heldout"]["all"]["nll"],
            {name: figures["nll"] for name, figures in point["retention"].items()},
        )
        for point in content["points"]
    ]


def table(rows: list[Row]) -> list[str]:
    """NLLs with their changes over the first row; the last column is the mean change of the general sources."""
    first = rows[0]
    lines = [["setting", "task", *first.general, "general, mean change"]]
    for row in rows:
        changes = {name: row.general[name] - first.general[name] for name in first.general}
        mean = sum(changes.values()) / len(changes)
        cells = [f"{row.general[name]:.4f} ({changes[name]:+.4f})" for name in first.general]
        lines.append([row.name, f"{row.task:.4f} ({row.task - first.task:+.4f})", *cells, f"{mean:+.4f}"])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--task", required=True, help="JSON Lines file (.gz too) of the task's conversations")
    parser.add_argument("--general", required=True, nargs="+", help="JSON Lines files of what is to be kept")
    parser.add_argument(
        "--setting",
        action="append",
        nargs="+",
        default=[],
        metavar=("NAME", "key=value"),
        help="one more training, under this name with these overrides (FOLDER: where the data are); may be repeated",
    )
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--heldout", type=int, default=40, help="records that are scored, of each file")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    settings = (*SETTINGS, *(Setting(name, tuple(overrides)) for name, *overrides in options.setting))
    before = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="moderation-") as private:
        folder = Path(private)
        run_file = make_run_file(folder, options)
        rows: list[Row] = []
        for setting in settings:
            start, end = trained(run_file, folder, setting)
            if not rows:
                rows = [start, end, *on_the_way(folder)]
                shutil.rmtree(folder / "runs" / setting.name)
            else:
                rows.append(end)
    print("\n".join(table(rows)))
    content = {
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/moderation.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": {"before": before, "after": os.getloadavg()},
        "steps": options.steps,
        "learning_rate": RATE,
        "settings": {setting.name: list(setting.overrides) for setting in settings},
        "nll_per_token": {row.name: {"task": row.task, "general": row.general} for row in rows},
    }
    options.results.parent.mkdir(exist_ok=True)
    options.results.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
