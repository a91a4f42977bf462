"""Preparation of one data set by sft-dist and by TRL, as users run them: whole processes, cold caches, same cores.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl
    python benchmarks/prepare.py --data DATA.jsonl.gz --model MODEL --trl-python /tmp/trl/bin/python

The data are prepared as they are and, with --times N, N times over with changed ids and first words. Both render the
same ChatML template, mask everything but answers and pack to max_length by best fit; ours also verifies every span by
decoding and stores the place of every message. TRL needs a model: it gets one of 8 hidden units with MODEL's tokenizer;
what its imports and that model cost alone is measured too. Runs alternate; medians count. Wall time suffers from
neighbours, CPU time (of all processes) less. Peak memory is the largest sum of resident sets of the process tree.
"""

import argparse
import datetime
import gzip
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
MAX_LENGTH = 2_048
# The marks say which tokens are the assistant's: TRL's masks need them, ours do not.
TEMPLATE = """\
{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="messages, as .jsonl or .jsonl.gz")
    parser.add_argument("--model", type=Path, required=True, help="folder with a tokenizer")
    parser.add_argument("--trl-python", required=True, help="Python of an environment with trl")
    parser.add_argument("--times", type=int, default=1, help="repeat the data with changes, for a longer run too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "prepare.json")
    options = parser.parse_args()
    cores, load_before = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "template.jinja").write_text(TEMPLATE)
        build_tiny_model(options.model, place / "model")
        runs = {}
        for times in sorted({1, options.times}):
            data = repeated(options.data, times, place / f"data-{times}.jsonl")
            runs[f"times {times}"] = compare(data, place, options.trl_python, cores, options.repeats)
        result = {
            "date": datetime.date.today().isoformat(),
            "command": f"python benchmarks/prepare.py --data {options.data.name} --model {options.model.name} "
            f"--trl-python … --times {options.times} --repeats {options.repeats}",
            "cores": cores,
            "cpu": cpu_name(),
            "load_average": {"before": load_before, "after": os.getloadavg()[0]},
            "python": platform.python_version(),
            "versions": versions(options.trl_python),
            "max_length": MAX_LENGTH,
            "runs": runs,
        }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(runs, indent=2))


def compare(data: Path, place: Path, trl_python: str, cores: int, repeats: int) -> dict[str, Any]:
    """Medians of both, and their ratios."""
    trl = [trl_python, str(HERE / "prepare_trl.py"), "--model", str(place / "model"), "--output", str(place / "trl")]
    trl += ["--template", str(place / "template.jinja"), "--max-length", str(MAX_LENGTH)]
    trl += ["--num-processes", str(cores), "--data"]
    run_file = place / "run.yaml"
    tree = {
        "run_dir": str(place / "unused"),
        "model": {"path": str(place / "model")},
        "data": {
            "train": str(data),
            "chat_template": str(place / "template.jinja"),
            "max_length": MAX_LENGTH,
            "cache_dir": str(place / "prepared"),
        },
    }
    run_file.write_text(json.dumps(tree))  # JSON is YAML
    commands = {
        "sft-dist": [sys.executable, "-m", "sft_dist", "prepare", str(run_file)],
        "trl": [*trl, str(data)],
        "trl, imports and model only": [*trl, "none"],
    }
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            measured[name].append(measure(command, place))
            print(data.name, name, measured[name][-1], file=sys.stderr, flush=True)
    median = {
        name: {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        for name, runs in measured.items()
    }
    ours, theirs, start = median["sft-dist"], median["trl"], median["trl, imports and model only"]
    with open(data, encoding="utf-8") as file:
        num_records = sum(1 for _ in file)
    return {
        "records": num_records,
        "mib": round(data.stat().st_size / 2**20, 1),
        "median": median,
        "all": measured,
        "ratio": {
            "wall": round(theirs["wall_s"] / ours["wall_s"], 2),
            "wall, trl without imports and model": round((theirs["wall_s"] - start["wall_s"]) / ours["wall_s"], 2),
            "cpu": round(theirs["cpu_s"] / ours["cpu_s"], 2),
            "peak memory": round(theirs["peak_gib"] / ours["peak_gib"], 2),
        },
    }


def measure(command: list[str], place: Path) -> dict[str, float]:
    """Wall and CPU seconds of a process with its children, and the peak of their memory; nothing cached before."""
    for name in ("prepared", "trl", "hf", "scratch"):
        shutil.rmtree(place / name, ignore_errors=True)
    (place / "scratch").mkdir()
    env = os.environ | {
        "PYTHONPATH": str(HERE.parent),
        "HF_HOME": str(place / "hf"),
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(place / "scratch"),
        "DS_ACCELERATOR": "cpu",
    }
    started = time.perf_counter()
    with open(place / "log", "w") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        peak = Peak(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    if status:
        raise SystemExit((place / "log").read_text()[-4_000:])
    return {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_gib": peak.end() / 2**30}


class Peak:
    """The largest sum of resident sets of a process tree, looked at ten times a second."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def end(self) -> int:
        self._ended.set()
        self._thread.join()
        return self._bytes

    def _run(self) -> None:
        while not self._ended.wait(0.1):
            total = 0
            try:
                for process in (self._process, *self._process.children(recursive=True)):
                    total += process.memory_info().rss
            except psutil.Error:
                continue  # one has just ended
            self._bytes = max(self._bytes, total)


def repeated(source: Path, times: int, target: Path) -> Path:
    """The records `times` over, unpacked; ids and the first message differ in every copy."""
    with (
        gzip.open(source, "rt", encoding="utf-8") if source.suffix == ".gz" else open(source, encoding="utf-8") as file
    ):
        lines = list(file)
    with open(target, "w", encoding="utf-8") as file:
        for copy in range(times):
            for line in lines:
                record = json.loads(line)
                if copy:
                    record["id"] = f"{record['id']}-{copy}"
                    first = record["messages"][0]
                    first["content"] = f"{copy}. {first['content']}"
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return target


def build_tiny_model(tokenizer_dir: Path, folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def versions(trl_python: str) -> dict[str, dict[str, str]]:
    names = ["trl", "transformers", "tokenizers", "datasets", "torch"]
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    ours = code.replace("'trl', ", "")
    return {
        "trl": json.loads(subprocess.check_output([trl_python, "-c", code])),
        "sft-dist": json.loads(subprocess.check_output([sys.executable, "-c", ours])),
    }


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
