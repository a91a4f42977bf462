"""The check before a run: what passes and what is refused, in 16 bits too, where a leak can look like rounding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist import generation
from sft_dist.data.sample import Sample
from sft_dist.data.selection import Example
from sft_dist.errors import ConfigError
from sft_dist.model import probe
from sft_dist.model.attention import SPLIT
from tests.helpers.models import build_tokenizer
from tests.helpers.plain_engine import PlainEngine

COMMON = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
COMMON |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS = {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}


def engine(folder: Path, model_type: str, implementation: str, dtype: torch.dtype, **options: Any) -> PlainEngine:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **COMMON | {"initializer_range": 0.2} | options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return PlainEngine(folder, implementation, dtype)


def samples() -> probe.Probe:
    rng = np.random.default_rng(0)

    def one(length: int) -> Example:
        is_target = np.arange(length) > 0
        ids = rng.integers(1, 97, length).astype(np.int32)
        turns = np.where(is_target, 0, -1).astype(np.int32)
        return Example(Sample("s", 0, "test", ids, (), num_turns=0), turns, is_target.astype(np.float32))

    return one(20), one(25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "implementation"), [("gpt_oss", "eager"), ("nemotron", SPLIT)])
def test_a_kernel_that_mixes_conversations_is_refused(
    tmp_path: Path, model_type: str, implementation: str, dtype: torch.dtype
) -> None:
    options = EXPERTS if model_type == "gpt_oss" else {}
    with pytest.raises(ConfigError, match="its attention mixes them"):
        probe.check(engine(tmp_path, model_type, implementation, dtype, **options), samples())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "implementation"),
    [("gpt_oss", SPLIT), ("nemotron", "sdpa"), ("mixtral", SPLIT), ("llama", "eager"), ("llama", SPLIT)],
)
def test_kernels_that_keep_them_apart_pass(
    tmp_path: Path, model_type: str, implementation: str, dtype: torch.dtype
) -> None:
    options = EXPERTS if model_type in ("gpt_oss", "mixtral") else {}
    checked = engine(tmp_path, model_type, implementation, dtype, **options)
    assert probe.check(checked, samples()) < probe.ROUNDING[dtype]  # type: ignore[arg-type]


@pytest.mark.parametrize("model_type", ["gpt_oss", "afmoe"])
def test_a_model_that_no_mask_can_pack_generates(tmp_path: Path, model_type: str) -> None:
    """One sequence at a time there is nothing to keep apart."""
    options = EXPERTS if model_type == "gpt_oss" else EXPERTS | {"num_experts": 4, "num_dense_layers": 1}
    tokenizer = build_tokenizer()
    engine(tmp_path, model_type, SPLIT, torch.float32, vocab_size=len(tokenizer), **options)
    tokenizer.save_pretrained(tmp_path)
    model, _, _ = generation._load(str(tmp_path), "latest")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, min_new_tokens=2).shape == (1, 5)
