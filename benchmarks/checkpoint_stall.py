"""How long training waits for a checkpoint: written in the background against written while it waits.

    python benchmarks/checkpoint_stall.py [--folder FOLDER]       two CPU ranks, a random Llama of about 30M parameters
    python benchmarks/checkpoint_stall.py --device cuda --layers 24 --width 2048      one GPU, about 1.3B

One run trains and saves now one way, now the other; both write the same bytes to FOLDER (a temporary one by default: it
should lie on the disk that matters). Stall is the time that the calls of train/saver.py take in the step loop, so it
holds the copy and all agreements. A forward over two short samples (the probe that export compares with) comes before
each save either way, and stands beside it. What the background costs otherwise, steps that compete with it for cores,
stands there too: the time of the steps up to the publish against that of as many undisturbed ones.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sft_dist.config import CheckpointConfig, LoggingConfig, ModelConfig, RunConfig  # noqa: E402
from sft_dist.data.sample import Sample  # noqa: E402
from sft_dist.data.selection import Example  # noqa: E402
from sft_dist.distributed import collectives  # noqa: E402
from sft_dist.distributed.world import find_world  # noqa: E402
from sft_dist.model import engine as engines  # noqa: E402
from sft_dist.model import probe  # noqa: E402
from sft_dist.model.batch import Batch, collate  # noqa: E402
from sft_dist.model.fused_head import LossTerms  # noqa: E402
from sft_dist.session import close_session, open_session  # noqa: E402
from sft_dist.train.checkpoint import TrainState  # noqa: E402
from sft_dist.train.metrics import Metrics  # noqa: E402
from sft_dist.train.saver import Saver  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "checkpoint_stall.json"
VOCABULARY = 16_000
PROBE_TOKENS = 64  # two of the shortest samples


def build_model(folder: Path, layers: int, width: int) -> int:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(sum(parameter.numel() for parameter in model.parameters()))


def example(length: int, rng: np.random.Generator) -> Example:
    ids = rng.integers(3, VOCABULARY, length).astype(np.int32)
    turns = np.where(np.arange(length) > 0, 0, -1).astype(np.int32)
    return Example(Sample("s", 0, "benchmark", ids, (), num_turns=0), turns, (turns >= 0).astype(np.float32))


def run_rank(options: argparse.Namespace) -> None:
    world = find_world(os.environ)
    open_session(world)
    folder: Path = options.rank_of
    config = RunConfig(run_dir=str(folder / "run"), model=ModelConfig(path=str(folder / "model")))
    engine = engines.training_engine(config, world, None)
    (folder / "run" / "checkpoints").mkdir(parents=True, exist_ok=True)
    metrics = Metrics(folder / "run", LoggingConfig(tensorboard=False), first_step=0, is_main=world.is_main)
    savers = {
        name: Saver(
            CheckpointConfig(keep=1, asynchronous=name == "background"),
            folder / "run",
            world,
            engine,
            TrainState(),
            metrics,
        )
        for name in ("waiting", "background")
    }
    batch = collate([example(options.tokens, np.random.default_rng(world.rank))])
    answer = measured(engine, savers, batch, options.repeats)
    if world.is_main:
        (folder / "answer.json").write_text(json.dumps(answer))
    close_session()
    sys.stdout.flush()
    os._exit(0)


def measured(engine: engines.Engine, savers: dict[str, Saver], batch: Batch, repeats: int) -> dict[str, Any]:
    """Seconds of stalls by way, of steps with and without a checkpoint on its way, and of the probe. A collective."""
    asked = tuple(example(PROBE_TOKENS, np.random.default_rng(number)) for number in range(2))
    stalls: dict[str, list[float]] = {name: [] for name in savers}
    steps: dict[str, list[float]] = {"undisturbed": [], "during": []}
    probes: list[float] = []
    done = 0

    def step() -> float:
        nonlocal done
        started = time.perf_counter()
        engine.train()
        loss, _ = engine.loss(batch, LossTerms())
        engine.backward(loss / batch.num_targets, is_last=True)
        engine.step()
        if engine.device.type == "cuda":
            torch.cuda.synchronize()
        done += 1
        return time.perf_counter() - started

    for _ in range(2):
        step()
    for number in range(2 * (repeats + 1)):
        name = ("waiting", "background")[number % 2]
        saver = savers[name]
        steps["undisturbed"] += [step() for _ in range(2)]
        collectives.barrier()
        started = time.perf_counter()
        facts = {"probe": {"logprobs": probe.logprobs(engine, asked)}}
        probes.append(time.perf_counter() - started)
        collectives.barrier()
        started = time.perf_counter()
        saver.begin(TrainState(step=done), facts)
        stall = time.perf_counter() - started
        while saver.published_step != saver.begun_step:
            seconds = step()
            started = time.perf_counter()
            saver.poll()
            stall += time.perf_counter() - started
            if number > 1:
                steps["during"].append(seconds)
        if number > 1:  # the first of each way takes memory and opens files for the first time
            stalls[name].append(stall)
    num_bytes = engine.capture().num_bytes
    return {"stall_s": stalls, "step_s": steps, "probe_s": probes, "bytes_a_rank": num_bytes}


def figures(answer: dict[str, Any]) -> dict[str, Any]:
    stalls, steps = answer["stall_s"], answer["step_s"]
    medians = {name: statistics.median(values) for name, values in stalls.items()}
    undisturbed, during = statistics.median(steps["undisturbed"]), steps["during"]
    saves = len(stalls["background"])
    return {
        "stall_s": {name: {"median": medians[name], "min": min(stalls[name]), "all": stalls[name]} for name in stalls},
        "background_over_waiting": {
            "of medians": medians["background"] / medians["waiting"],
            "of minima": min(stalls["background"]) / min(stalls["waiting"]),
        },
        "step_s": {
            "undisturbed": undisturbed,
            "during": statistics.median(during),
            "steps_during": len(during) / saves,
        },
        "probe_s": statistics.median(answer["probe_s"]),
        "lost_beside_the_stall_s": (sum(during) - undisturbed * len(during)) / saves,
        "gib_a_rank": answer["bytes_a_rank"] / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--repeats", type=int, default=7, help="checkpoints each way")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=448)
    parser.add_argument("--tokens", type=int, default=256, help="of a rank in a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        run_rank(options)
    ranks = 2 if options.device == "cpu" else torch.cuda.device_count()
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        num_parameters = build_model(Path(folder) / "model", options.layers, options.width)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command += [__file__, "--rank-of", folder, "--repeats", str(options.repeats), "--tokens", str(options.tokens)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        subprocess.run(command, check=True, env=environment)
        found = figures(json.loads((Path(folder) / "answer.json").read_text()))
    stall, ratio, step = found["stall_s"], found["background_over_waiting"], found["step_s"]
    print(
        f"{num_parameters / 1e6:,.0f}M parameters, {found['gib_a_rank']:.2f} GiB a rank: training waits "
        f"{stall['waiting']['median']:.3f} s (min {stall['waiting']['min']:.3f}), with the background "
        f"{stall['background']['median']:.3f} s (min {stall['background']['min']:.3f}): {ratio['of medians']:.3f} of it"
        f" (of minima {ratio['of minima']:.3f})\n"
        f"probe {found['probe_s']:.3f} s either way; steps {step['undisturbed']:.3f} s, "
        f"{step['during']:.3f} s beside the background "
        f"({step['steps_during']:.1f} of them a checkpoint, {found['lost_beside_the_stall_s']:.3f} s lost)"
    )
    result = {
        "benchmark": "stall of the step loop by a checkpoint",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/checkpoint_stall.py", *sys.argv[1:]]),
        "parameters": num_parameters,
        "ranks": ranks,
        "device": options.device,
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": before,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        **found,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
