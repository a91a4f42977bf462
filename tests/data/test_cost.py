"""FLOPs by hand, by published figures, and by config.json; tests/model/test_cost.py counts them in real models."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft_dist.data.cost import CostModel, DecoderLayer, attended_pairs, cost_of_model

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 50))
def test_attended_pairs_are_those_of_the_mask(lengths: list[int], window: int) -> None:
    for given_window in (None, window):
        masks = [np.tri(length) - np.tri(length, k=-(given_window or length + 1)) for length in lengths]
        assert attended_pairs(lengths, given_window).tolist() == [mask.sum() for mask in masks]


def test_figures_of_8b_are_the_published_ones() -> None:
    cost = cost_of_model(LLAMA_8B)
    assert cost.linear_per_token == 6 * 32 * 218_103_808  # 6.98e9 parameters in the layers, without embeddings and head
    # NeMo (Megatron-Bridge, 25.11) publishes 14,451 tokens/s as 744 TFLOP/s a GPU at 8,192 tokens: causal attention.
    assert cost.flops([8192], 8192) / 8192 == pytest.approx(744e12 / 14_451, rel=2e-3)
    # torchtitan publishes 6,667 tokens/s as 39 % of 989 TFLOP/s: PaLM's formula.
    assert cost.palm_flops(8192, 8192) / 8192 == pytest.approx(0.39 * 989e12 / 6_667, rel=5e-3)


def test_hardware_flops_of_full_recomputation_are_a_third_more_of_the_linear_part() -> None:
    cost = CostModel(6.0, 12.0, 18.0, windowed_per_pair=24.0, window=3)
    assert cost.with_recomputation("none") == CostModel(6.0, 14.0, 18.0, 28.0, 3)
    assert cost.with_recomputation("all_but_attention") == CostModel(8.0, 14.0, 18.0, 28.0, 3)
    assert cost.with_recomputation("full") == CostModel(8.0, 18.0, 18.0, 36.0, 3)


def test_frozen_weights_leave_out_one_product_of_three() -> None:
    """Forward and gradient of the inputs, 2 each; run again, 2 more. Attention has no weights."""
    cost = CostModel(6.0, 12.0, 18.0, windowed_per_pair=24.0, window=3).frozen()
    assert (cost.linear_per_token, cost.head_per_target) == (4.0, 12.0)
    assert (cost.attention_per_pair, cost.windowed_per_pair) == (12.0, 24.0)
    assert [cost.with_recomputation(way).linear_per_token for way in ("none", "full")] == [4.0, 6.0]
    assert cost.with_recomputation("full").attention_per_pair == 18.0


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=9))
def test_flops_of_a_pack_are_the_sum_over_its_samples(samples: list[tuple[int, int]]) -> None:
    cost = CostModel(5.0, 3.0, 7.0, windowed_per_pair=2.0, window=16)
    lengths, targets = (np.array(column) for column in zip(*samples, strict=True))
    by_hand = [
        5 * length + 3 * length * (length + 1) / 2 + 2 * sum(min(i + 1, 16) for i in range(length)) + 7 * num_targets
        for length, num_targets in samples
    ]
    assert cost.of_samples(lengths, targets).tolist() == pytest.approx(by_hand)
    assert cost.flops(lengths, int(targets.sum())) == pytest.approx(sum(by_hand))


def layers_of(kinds: str, window: int) -> list[DecoderLayer]:
    return [DecoderLayer(64, 32, 16, 96, window=window if kind == "w" else None) for kind in kinds]


@pytest.mark.parametrize(
    ("fields", "kinds"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "wwwwww"),
        ({"model_type": "mistral", "sliding_window": None}, "ffffff"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": False, "max_window_layers": 2}, "ffffff"),
        ({"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True, "max_window_layers": 2}, "ffwwww"),
        ({"model_type": "gemma2", "sliding_window": 8}, "wfwfwf"),
        ({"model_type": "gemma3_text", "sliding_window": 8}, "wwwwwf"),
        ({"model_type": "any", "sliding_window": 8, "sliding_window_pattern": 3}, "wwfwwf"),
        ({"sliding_window": 8, "layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2}, "ffffww"),
    ],
)
def test_windows_are_those_of_the_model_type(fields: dict[str, Any], kinds: str) -> None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 100}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 96}
    expected = CostModel.of_layers(layers_of(kinds, 8), vocab_size=100)
    assert cost_of_model(sizes | fields) == expected
    assert cost_of_model({"text_config": sizes | fields}) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
        ({"layer_types": ["linear_attention"] * 32}, "linear_attention is not understood"),
        ({"layer_types": ["full_attention"] * 31}, "names 31 layers of 32"),
        ({"sliding_window": 8, "sliding_window_pattern": "LLG"}, "'LLG' is not understood"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is not understood"),
    ],
)
def test_what_is_not_understood_is_named(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        cost_of_model(LLAMA_8B | change)


def test_windows_of_two_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="8 and 9"):
        CostModel.of_layers([*layers_of("w", 8), *layers_of("w", 9)], vocab_size=5)
