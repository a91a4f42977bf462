"""Collectives and bytes of one optimizer step under ZeRO-3, counted exactly, two CPU ranks.

    python benchmarks/collectives.py            a random Llama of 8 small layers, every case in one world

What is counted are the calls of torch.distributed between the start of a step and its end, once the order of the
modules is known to DeepSpeed (from the third micro-batch on), so the figures are the same in every run and on every
machine. Bytes are those of the whole tensor of a collective (what an all-gather puts together, what a reduce-scatter
takes apart), given in units of the model's own bytes too; a rank sends (W - 1) / W of them.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from sft_dist.config import BatchConfig, ModelConfig, RunConfig
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example
from sft_dist.distributed.world import World, find_world
from sft_dist.model import engine as engines
from sft_dist.model import sharding, zero
from sft_dist.model.batch import collate
from sft_dist.model.fused_head import LossTerms
from sft_dist.model.layers import decoder_layers
from sft_dist.session import close_session, open_session

RESULTS = Path(__file__).parent / "results" / "collectives.json"
RANKS = 2
NUM_LAYERS, WIDTH = 8, 64
_STEPS = 4  # the last one is counted
_CALLS = {  # name: which argument is the whole tensor
    "all_gather_into_tensor": 0,
    "reduce_scatter_tensor": 1,
    "all_reduce": 0,
    "broadcast": 0,
    "all_gather": 0,
    "reduce_scatter": 1,
}


@dataclass(frozen=True)
class Case:
    """One way to lay out the same step."""

    name: str
    leaves: bool = True
    recompute: bool = True
    accumulation: int = 1
    reduce_once: bool = False
    zero: dict[str, int] = field(default_factory=dict)  # settings of the DeepSpeed file: they win


class Recorder:
    """Counts calls and bytes of torch.distributed. DeepSpeed keeps references, so make it before the first engine."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        for name, position in _CALLS.items():
            setattr(dist, name, self._counted(name, position, getattr(dist, name)))

    def reset(self) -> None:
        self.calls.clear()
        self.num_bytes.clear()

    def _counted(self, name: str, position: int, call: Callable[..., Any]) -> Callable[..., Any]:
        keyword = ("output_tensor", "input")[position]

        @wraps(call)
        def counted(*arguments: Any, **options: Any) -> Any:
            whole = arguments[position] if len(arguments) > position else options.get(keyword, options.get("tensor"))
            tensors = whole if isinstance(whole, (list, tuple)) else [whole]
            self.calls[name] += 1
            self.num_bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            return call(*arguments, **options)

        return counted


def model_config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )


def build_model(folder: Path) -> int:
    """Write the benchmark's model to `folder`; returns its number of parameters."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config())
    model.save_pretrained(folder)
    return int(model.num_parameters())


def example(seed: list[int]) -> Example:
    ids = np.random.default_rng(seed).integers(3, 500, 24).astype(np.int32)
    turns = np.where(np.arange(24) > 8, 0, -1).astype(np.int32)
    return Example(Sample("c", 0, "benchmark", ids, (), num_turns=1), turns, (turns >= 0).astype(np.float32))


def measure(case: Case, model: Path, folder: Path, world: World, recorder: Recorder) -> dict[str, Any]:
    """What one step of this case calls on this rank. A collective."""
    file = folder / f"deepspeed-{world.rank}.json"
    tree = json.loads((engines.deepspeed_folder() / "cpu.json").read_text())
    tree["zero_optimization"] |= case.zero
    file.write_text(json.dumps(tree))
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig(path=str(model), dtype="float32", gradient_checkpointing=case.recompute),
        batch=BatchConfig(global_packs=world.size * case.accumulation, reduce_once=case.reduce_once),
        deepspeed=str(file),
    )
    with nullcontext() if case.leaves else mock.patch.object(engines, "decoder_layers", lambda _: []):
        engine = engines.training_engine(config, world, None)
    engine.train()
    for step in range(_STEPS):
        recorder.reset()
        for number in range(case.accumulation):
            loss, _ = engine.loss(collate([example([step, number, world.rank])]), LossTerms())
            engine.backward(loss / 100, is_last=number == case.accumulation - 1)
        engine.step()
    own = sum(zero.numel(parameter) * parameter.element_size() for parameter in engine.causal_lm.parameters())
    result = {
        "calls": dict(recorder.calls),
        "bytes": dict(recorder.num_bytes),
        "in_model_bytes": {name: round(count / own, 3) for name, count in recorder.num_bytes.items()},
    }
    engine.close()
    return result


def settings_with(bytes_for_weights: int) -> dict[str, int]:
    """What is derived for the benchmark's model where so many bytes are left for weights that stay gathered.

    The gradient is reduced layer by layer, as that of a large model is.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config())
    shapes = sharding.shapes_of(model, decoder_layers(model))
    derived = sharding.training_settings(
        shapes, world_size=RANKS, element_bytes=4, memory_budget_bytes=bytes_for_weights
    )
    return derived.values | {"reduce_bucket_size": max(shapes.layers)}


def cases() -> list[Case]:
    scarce, half, ample = (settings_with(int(share * 459_840 * 4)) for share in (0, 0.75, 1))
    # As DeepSpeed's constants stand to a model of many billions: norms persist, less than a layer is prefetched.
    constants = scarce | {
        "stage3_param_persistence_threshold": WIDTH,
        "stage3_prefetch_bucket_size": scarce["stage3_prefetch_bucket_size"] // 4,
    }
    return [
        Case("modules, constants, recomputed", leaves=False, zero=constants),
        Case("modules, constants", leaves=False, recompute=False, zero=constants),
        Case("layers, constants, recomputed", zero=constants),
        Case("layers, derived, recomputed", zero=scarce),
        Case("layers, derived", recompute=False, zero=scarce),
        Case("layers, derived, nothing prefetched", zero=scarce | {"stage3_max_live_parameters": 0}),
        Case("layers, derived, some weights kept", zero=half),
        Case("layers, derived, all weights kept", zero=ample),
        Case("accumulation 4", accumulation=4, zero=scarce),
        Case("accumulation 4, reduced once", accumulation=4, reduce_once=True, zero=scarce),
        Case("accumulation 4, all weights kept", accumulation=4, zero=ample),
        Case("accumulation 4, all weights kept, reduced once", accumulation=4, reduce_once=True, zero=ample),
        Case(
            "accumulation 4, all weights persist, reduced once",
            accumulation=4,
            reduce_once=True,
            zero=ample | {"stage3_param_persistence_threshold": 10**9},
        ),
    ]


def run_rank(folder: Path, names: list[str]) -> None:
    """One rank of the world that `main` starts, over the cases of these names."""
    world = find_world(os.environ)
    open_session(world)
    recorder = Recorder()
    rows = [
        asdict(case) | measure(case, folder / "model", folder, world, recorder)
        for case in cases()
        if case.name in names
    ]
    if world.is_main:
        (folder / "rows.json").write_text(json.dumps(rows))
    close_session()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cases", nargs="+", default=[case.name for case in cases()], help="only these, by name")
    options = parser.parse_args()
    if options.rank_of is not None:
        run_rank(options.rank_of, options.cases)
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = build_model(Path(folder) / "model")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command += [__file__, "--rank-of", folder, "--cases", *options.cases]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        rows = json.loads((Path(folder) / "rows.json").read_text())
    for row in rows:
        calls, units = row["calls"], row["in_model_bytes"]
        print(
            f"{row['name']:<52} all-gather {calls.get('all_gather_into_tensor', 0):>4} calls "
            f"{units.get('all_gather_into_tensor', 0):>5.2f} x model   reduce-scatter "
            f"{calls.get('reduce_scatter_tensor', 0):>3} calls {units.get('reduce_scatter_tensor', 0):>5.2f} x model"
        )
    result = {
        "benchmark": "collectives of one optimizer step",
        "date": date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/collectives.py", *sys.argv[1:]]),
        "model": f"random Llama, {NUM_LAYERS} layers of width {WIDTH}",
        "parameters": num_parameters,
        "ranks": RANKS,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers", "deepspeed")},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
