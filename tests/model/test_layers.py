"""Decoder layers are found in any family, and training by them is training without them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from sft_dist.model.layers import decoder_layers
from tests.helpers.conversations import make_records, write_jsonl
from tests.helpers.models import FAMILIES, build_model
from tests.helpers.worlds import run_world

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16}
_MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": _EXPERTS | {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "phi3": {},
    "gpt2": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "cohere": {},
    "olmo2": {},
}


def build(model_type: str, **values: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **_COMMON, **values))


@pytest.mark.parametrize("model_type", _MODELS)
def test_the_decoder_layers_of_a_family_are_found(model_type: str) -> None:
    """Its own name for them is the oracle: the classes that transformers never splits over devices."""
    model = build(model_type, **_MODELS[model_type])
    expected = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    found = decoder_layers(model)
    assert len(found) == 3
    assert found == expected


class Backbone(nn.Module):
    """A model of nothing but its lists."""

    def __init__(self, **lists: list[nn.Module]) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(10, 4)
        for name, modules in lists.items():
            setattr(self, name, nn.ModuleList(modules))

    @property
    def base_model(self) -> nn.Module:
        return self


def block(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))


def test_two_lists_of_one_class_are_both_decoder_layers_and_smaller_other_lists_are_not() -> None:
    class Other(nn.Sequential):
        pass

    first, second = [block(8), block(8)], [block(8)]
    norms: list[nn.Module] = [nn.LayerNorm(8) for _ in range(20)]
    others: list[nn.Module] = [Other(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(5)]
    model = Backbone(norms=norms, others=others, dense=first, sparse=second)
    assert decoder_layers(model) == [*first, *second]


def test_lists_inside_a_layer_belong_to_it() -> None:
    layers: list[nn.Module] = [Backbone(experts=[block(16) for _ in range(6)]) for _ in range(2)]
    assert decoder_layers(Backbone(layers=layers)) == layers


def test_layers_that_share_parameters_are_left_alone() -> None:
    shared = block(8)
    assert decoder_layers(Backbone(layers=[shared, shared])) == []
    tied = Backbone(layers=[block(8), block(8)])
    tied.layers[1][0].weight = tied.layers[0][0].weight
    assert decoder_layers(tied) == []
    outside = Backbone(layers=[block(8), block(8)])
    outside.head = nn.Linear(8, 8)
    outside.head.weight = outside.layers[0][0].weight
    assert decoder_layers(outside) == []


def test_a_model_without_blocks_has_no_decoder_layers() -> None:
    assert decoder_layers(Backbone()) == []
    assert decoder_layers(Backbone(layers=[nn.Linear(4, 4)], empty=[])) == []


@pytest.mark.slow
def test_loss_and_gradient_are_those_of_the_run_without_leaves(tmp_path: Path) -> None:
    data = str(write_jsonl(tmp_path / "train.jsonl", make_records(12, max_words=8)))
    cases = [
        {"case": "gradient", "model": str(build_model(tmp_path / family, family)), "data": data, "global_packs": 3}
        | {"leaves": leaves, "gradient_checkpointing": recompute, "dtype": "float32"}
        for family in FAMILIES
        for recompute in (True, False)
        for leaves in (True, False)
    ]
    answers = run_world(2, cases, tmp_path / "world")
    for case, with_leaves, without in zip(cases[::2], answers[::2], answers[1::2], strict=True):
        assert (with_leaves["settings"]["decoder_layers"], without["settings"]["decoder_layers"]) == (3, 0)
        assert with_leaves["loss"] == without["loss"], case
        for name, value in without["gradients"].items():
            assert value.abs().max() > 0, name
            # To the rounding of sums: hooks change the order in which autograd adds.
            assert (with_leaves["gradients"][name] - value).abs().max() <= 1e-6 * value.abs().max(), (case, name)
