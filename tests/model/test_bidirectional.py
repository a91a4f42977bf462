"""Attention of encoders over a packed row, against torch's kernel for each sample alone."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sft_dist.errors import ConfigError
from sft_dist.model import bidirectional

_HEADS, _WIDTH = 2, 4


@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8), seed=st.integers(0, 100))
def test_every_sample_attends_to_itself_and_nothing_else(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    shape = (1, _HEADS, sum(lengths), _WIDTH)
    packed = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weights = torch.randn(1, sum(lengths), _HEADS, _WIDTH, dtype=torch.float64)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    found, _ = bidirectional.attention(
        nn.Module(), *packed, None, scaling=0.3, host_cu_seqlens=bounds, cu_seqlens=bounds, max_seqlen=max(lengths)
    )
    (found * weights).sum().backward()
    alone = [tensor.detach().clone().requires_grad_() for tensor in packed]
    parts = [
        F.softmax(q @ k.mT * 0.3, -1) @ v
        for q, k, v in zip(*(tensor.split(lengths, 2) for tensor in alone), strict=True)
    ]
    expected = torch.cat(parts, 2).transpose(1, 2)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for a, b in zip(packed, alone, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-12)


def test_dropout_takes_whole_weights_out_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    query, key = torch.zeros(1, 1, 6_000, 8), torch.zeros(1, 1, 6_000, 8)
    bounds = torch.arange(0, 6_001, 2, dtype=torch.int32)  # every weight is 1/2
    out, _ = bidirectional.attention(nn.Module(), query, key, torch.ones_like(query), None, 0.25, None, bounds)
    values = out.unique().tolist()
    assert values == pytest.approx([0, 2 / 3, 4 / 3], abs=1e-6)
    assert float(out.mean()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("asked", ["sliding_window", "position_bias", "attention_mask"])
def test_what_a_layer_asks_for_and_is_not_computed_is_refused_by_name(asked: str) -> None:
    row = torch.zeros(1, 1, 3, 8)
    mask = torch.zeros(1) if asked == "attention_mask" else None
    options = {} if asked == "attention_mask" else {asked: 3}
    with pytest.raises(ConfigError, match=asked):
        bidirectional.attention(nn.Module(), row, row, row, mask, **options)
