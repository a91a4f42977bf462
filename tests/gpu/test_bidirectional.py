"""Attention of encoders by varlen_attn, against the kernel for each length of a row."""

import pytest
import torch
from torch import nn

from sft_dist.model import bidirectional

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_row_in_16_bits_is_one_call_with_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    lengths = (5, 64, 1, 17, 64, 300)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    row = {"cu_seqlens": bounds.cuda(), "max_seqlen": max(lengths)}
    shape = (1, 4, sum(lengths), 64)
    packed = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    exact = [tensor.detach().double().requires_grad_() for tensor in packed]
    weights = torch.randn(1, sum(lengths), 4, 64, device="cuda")
    found, _ = bidirectional.attention(nn.Module(), *packed, None, host_cu_seqlens=bounds, **row)
    expected, _ = bidirectional.attention(nn.Module(), *exact, None, host_cu_seqlens=bounds, **row)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-2)
    for a, b in zip(packed, exact, strict=True):
        assert a.grad is not None and b.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, rtol=0.05, atol=5e-2)
