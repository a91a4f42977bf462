"""The formulas of data/cost.py against what torch counts and what models hold."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4MoeConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from sft_dist.data.cost import cost_of_model
from tests.helpers.flops import of_products

SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("num_heads", [4, 2])
def test_flops_are_those_that_torch_counts(num_heads: int) -> None:
    """Forward and backward of a plain model; eager attention computes the whole square, of which causal needs half."""
    config = LlamaConfig(**SIZES | {"num_attention_heads": num_heads}, head_dim=16)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    length = 24
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(length)[None]).logits.sum().backward()
    cost = cost_of_model(config.to_dict())
    square = cost.attention_per_pair * length * length
    assert of_products(counter) == cost.linear_per_token * length + square + cost.head_per_target * length


def test_flops_of_frozen_weights_are_those_that_torch_counts() -> None:
    """As above, without the gradients of weights; those of a layer's inputs are there in every layer."""
    config = LlamaConfig(**SIZES)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(False)
    length = 24
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=torch.randn(1, length, 32, requires_grad=True)).logits.sum().backward()
    cost = cost_of_model(config.to_dict()).frozen()
    square = cost.attention_per_pair * length * length
    assert of_products(counter) == cost.linear_per_token * length + square + cost.head_per_target * length


CONFIGS = [
    LlamaConfig(**SIZES),
    Qwen3Config(**SIZES, head_dim=16),
    Gemma2Config(**SIZES, head_dim=16, sliding_window=8),
    GPT2Config(vocab_size=120, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    PhiConfig(**SIZES),
    MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    Qwen3MoeConfig(
        **SIZES, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1]
    ),
    Glm4MoeConfig(
        **SIZES,
        head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        n_shared_experts=2,
        first_k_dense_replace=1,
    ),
    Qwen2MoeConfig(
        **SIZES,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
        decoder_sparse_step=2,
    ),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
def test_parameters_are_those_of_the_models_layers(config: Any) -> None:
    assert cost_of_model(config.to_dict()).linear_per_token == 6 * active_parameters(config)


def active_parameters(config: Any) -> int:
    """Of the matrices in the decoder layers of the real model; of experts, which are stacked, the share in use."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    active = getattr(config, "num_experts_per_tok", None)
    total = 0
    for name, parameter in model.named_parameters():
        if ".layers." not in name and ".h." not in name:
            continue
        if ".experts." in name:
            total += parameter.numel() * active // parameter.shape[0] if parameter.dim() == 3 else 0
        elif parameter.dim() == 2:
            total += parameter.numel()
    return total


def test_config_json_gives_the_same_as_the_loaded_configuration(tmp_path: Path) -> None:
    for config in CONFIGS:
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert cost_of_model(written) == cost_of_model(loaded.to_dict()) == cost_of_model(config.to_dict())
