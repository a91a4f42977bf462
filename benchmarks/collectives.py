"""Collectives and bytes of one optimizer step under ZeRO-3, counted exactly, two CPU ranks.

    python benchmarks/collectives.py            a random Llama of 8 small layers, every case in one world

What is counted are the calls of torch.distributed between the start of a step and its end, once the order of the
modules is known to DeepSpeed (the third step of a run), so the figures are the same in every run and on every machine.
Bytes are those of the whole tensor of a collective (what an all-gather puts together, what a reduce-scatter takes
apart), given in units of the model's own bytes; a rank sends (W - 1) / W of them.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

from sft_dist.config import BatchConfig, ModelConfig, RunConfig
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example
from sft_dist.distributed.world import World
from sft_dist.model import engine as engines
from sft_dist.model.batch import collate

RESULTS = Path(__file__).parent / "results" / "collectives.json"
RANKS = 2
NUM_LAYERS, WIDTH = 8, 64
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


def build_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def example(seed: int) -> Example:
    ids = np.random.default_rng(seed).integers(3, 500, 24).astype(np.int32)
    turns = np.where(np.arange(24) > 8, 0, -1).astype(np.int32)
    return Example(Sample(f"s{seed}", 0, "benchmark", ids, (), num_turns=1), turns, (turns >= 0).astype(np.float32))


def measure(case: Case, model: Path, folder: Path, world: World, recorder: Recorder) -> dict[str, Any]:
    """What one step of this case calls; a collective of all ranks."""
    file = folder / f"{case.name.replace(' ', '-')}-{world.rank}.json"
    tree = json.loads((engines.deepspeed_folder() / "cpu.json").read_text())
    tree["zero_optimization"] |= case.zero
    file.write_text(json.dumps(tree))
    config = RunConfig(
        run_dir="unused",
        model=ModelConfig(path=str(model), dtype="float32", gradient_checkpointing=case.recompute),
        batch=BatchConfig(global_packs=world.size * case.accumulation),
        deepspeed=str(file),
    )
    found = engines.decoder_layers
    with mock.patch.object(engines, "decoder_layers", found if case.leaves else lambda _: []):
        engine = engines.training_engine(config, world, None)
    engine.train()
    for step in range(4):
        recorder.reset()
        for number in range(case.accumulation):
            logprobs = engine.logprobs(collate([example(100 * step + 10 * number + world.rank)]))
            engine.backward(-logprobs.sum() / 100, is_last=number == case.accumulation - 1)
        engine.step()
    parameters = list(engine.causal_lm.parameters())
    own = sum(parameter.ds_numel * parameter.element_size() for parameter in parameters)
    result = {
        "calls": dict(recorder.calls),
        "model_bytes": {name: round(count / own, 3) for name, count in recorder.num_bytes.items()},
        "num_parameters": own // 4,
    }
    engine.close()
    return result
