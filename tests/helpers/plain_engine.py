"""A model of transformers as the scoring code asks for one, without DeepSpeed and in any precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from sft_dist.distributed.world import World, find_world, start
from sft_dist.model import attention
from sft_dist.model.attention import SPLIT
from sft_dist.model.batch import Batch
from sft_dist.model.logprobs import TokenLogprobs


class PlainEngine:
    is_classifier = False

    def __init__(self, folder: Path, implementation: str = SPLIT, dtype: torch.dtype = torch.float32) -> None:
        attention.register()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=implementation)
        self._module = TokenLogprobs(model.eval())
        self.tokens_seen = 0

    @property
    def causal_lm(self) -> Any:
        return self._module.model

    def train(self, is_training: bool = True) -> None:
        self._module.train(is_training)

    def logprobs(self, batch: Batch) -> torch.Tensor:
        self.tokens_seen += batch.input_ids.shape[1]
        result: torch.Tensor = self._module(batch).logprob
        return result


@contextmanager
def world_of_one() -> Iterator[World]:
    world = find_world({})
    start(world, on_gpu=False)
    try:
        yield world
    finally:
        dist.destroy_process_group()
