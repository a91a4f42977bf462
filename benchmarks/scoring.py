"""Scoring of whole data sets: memory against their size, and time against a careful loop of plain transformers.

    python benchmarks/scoring.py --data DATA.jsonl.gz --model MODEL

Memory: `sft-dist score` as whole processes over --sizes conversations (the data over and over, with other ids), by a
model of 16 hidden units with MODEL's tokenizer, so that what grows is ours: peak resident memory and conversations a
second. Time: the verb by MODEL on --num conversations of the data, against transformers alone in a process that gets
the same token ids prepared: batches of 8 sorted by length, padded on the right, full logits, log-probs of the answers
picked from them. Both ways' sums of every turn are compared. Cores and threads are the same; ways alternate.
"""

import argparse
import gzip
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "scoring.json"
MAX_LENGTH = 1_024
PLAIN_BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="messages, as .jsonl or .jsonl.gz")
    parser.add_argument("--model", type=Path, required=True, help="folder of a model with its tokenizer")
    parser.add_argument("--num", type=int, default=64, help="conversations that the whole model scores")
    parser.add_argument("--sizes", type=int, nargs="*", default=[5_000, 20_000, 80_000])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)  # the peer, in a process of its own
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.plain:
        plain(options.model, options.plain, options.output)
        return
    load_before = os.getloadavg()[0]
    with gzip.open(options.data, "rt") if options.data.suffix == ".gz" else open(options.data) as file:
        records = [json.loads(line) for line in file]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        result = {
            "date": date.today().isoformat(),
            "command": f"python benchmarks/scoring.py --data {options.data.name} --model {options.model.name} "
            f"--sizes {' '.join(map(str, options.sizes))}",
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "versions": {package: version(package) for package in ("torch", "transformers", "deepspeed")},
            "time": compare(records[: options.num], options.model, options.repeats, place),
            "memory": [grown(records, size, options.model, place) for size in options.sizes],
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
        }
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("time", "memory")}, indent=2))


def grown(records: list[dict[str, Any]], size: int, model: Path, place: Path) -> dict[str, Any]:
    """What scoring `size` conversations by a tiny model takes, its data prepared before."""
    data = place / f"{size}.jsonl"
    with open(data, "w", encoding="utf-8") as file:
        for number in range(size):
            file.write(json.dumps(records[number % len(records)] | {"id": str(number)}) + "\n")
    run_file = write_run_file(place, f"tiny-{size}", tiny_model(model, place), data)
    measure([sys.executable, "-m", "sft_dist", "prepare", str(run_file)], place)
    scored = measure(score_command(run_file, place / f"tiny-{size}.out"), place)
    num_turns = count_lines(place / f"tiny-{size}.out")
    print(size, scored, file=sys.stderr, flush=True)
    return {"conversations": size, "turns": num_turns, "conversations_per_s": round(size / scored["wall_s"])} | scored


def compare(records: list[dict[str, Any]], model: Path, repeats: int, place: Path) -> dict[str, Any]:
    """Both ways over the same conversations by the whole model."""
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    run_file = write_run_file(place, "whole", model, data)
    measure([sys.executable, "-m", "sft_dist", "prepare", str(run_file)], place)
    ids = place / "ids.json"
    ids.write_text(json.dumps(prepared_turns(run_file)))
    measured: dict[str, list[dict[str, float]]] = {"sft-dist": [], "plain transformers": []}
    for repeat in range(repeats):
        ours, theirs = place / f"ours-{repeat}", place / f"theirs-{repeat}"
        measured["sft-dist"].append(measure(score_command(run_file, ours), place))
        peer = [sys.executable, __file__, "--data", str(data), "--model", str(model)]
        measured["plain transformers"].append(measure([*peer, "--plain", str(ids), "--output", str(theirs)], place))
        print({name: runs[-1] for name, runs in measured.items()}, file=sys.stderr, flush=True)
    scores = [json.loads(line) for line in ours.read_text().splitlines()]
    found = [turn["logprob"] for line in scores for turn in line["turns"]]
    expected = json.loads(theirs.read_text())
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    median = {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        for name, runs in measured.items()
    }
    ours_s, theirs_s = median["sft-dist"], median["plain transformers"]
    return {
        "conversations": len(records),
        "turns": len(found),
        "largest_difference_nats": difference,
        "median": median,
        "ratio": {key: round(theirs_s[key] / ours_s[key], 2) for key in ours_s},
    }


def plain(model: Path, ids_file: Path, output: Path) -> None:
    """Log-probs of every turn by transformers alone: batches by length, padding, full logits."""
    import torch
    from transformers import AutoModelForCausalLM

    samples = json.loads(ids_file.read_text())  # [ids, [[first, last] of each turn]]
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums: list[list[float]] = [[] for _ in samples]
    order = sorted(range(len(samples)), key=lambda number: -len(samples[number][0]))
    for first in range(0, len(order), PLAIN_BATCH):
        chosen = order[first : first + PLAIN_BATCH]
        longest = max(len(samples[number][0]) for number in chosen)
        ids, mask = torch.zeros(len(chosen), longest, dtype=torch.int64), torch.zeros(len(chosen), longest)
        for row, number in enumerate(chosen):
            ids[row, : len(samples[number][0])] = torch.tensor(samples[number][0])
            mask[row, : len(samples[number][0])] = 1
        with torch.no_grad():
            logits = causal_lm(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            logprobs = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        for row, number in enumerate(chosen):
            sums[number] = [float(logprobs[row, a - 1 : b - 1].double().sum()) for a, b in samples[number][1]]
    output.write_text(json.dumps([value for of_sample in sums for value in of_sample]))


def prepared_turns(run_file: Path) -> list[Any]:
    """[ids, [[first, end) of every answer]] of every sample, as sft-dist prepared it."""
    from sft_dist.config import load_config
    from sft_dist.data.prepare import prepare
    from sft_dist.data.store import PreparedDataset

    config = load_config(run_file)
    dataset: PreparedDataset = prepare(config.data.train, config.model, config.data)
    samples = [dataset[number] for number in range(len(dataset))]
    return [
        [sample.ids.tolist(), [[span.output_start, span.output_end] for span in sample.spans if span.turn]]
        for sample in samples
    ]


def score_command(run_file: Path, output: Path) -> list[str]:
    data = json.loads(run_file.read_text())["data"]["train"]
    return [sys.executable, "-m", "sft_dist", "score", str(run_file), "--data", data, "--output", str(output)]


def write_run_file(place: Path, name: str, model: Path, data: Path) -> Path:
    tree = {
        "run_dir": str(place / name),
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "max_length": MAX_LENGTH, "cache_dir": str(place / "prepared")},
    }
    path = place / f"{name}.yaml"
    path.write_text(json.dumps(tree))  # JSON is YAML
    return path


def tiny_model(model: Path, place: Path) -> Path:
    folder = place / "tiny"
    if not folder.exists():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.save_pretrained(folder)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=MAX_LENGTH,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measure(command: list[str], place: Path) -> dict[str, float]:
    """Wall and processor seconds of a process, and the largest resident set of it or of one of its children."""
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    started = time.perf_counter()
    with open(place / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((place / "log").read_text()[-4_000:])
    wall_s = time.perf_counter() - started
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return {
        "wall_s": round(wall_s, 2),
        "processor_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_gib": round(usage.ru_maxrss / unit, 3),
    }


def count_lines(path: Path) -> int:
    with open(path, encoding="utf-8") as file:
        return sum(len(json.loads(line)["turns"]) for line in file)


if __name__ == "__main__":
    main()
