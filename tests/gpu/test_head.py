"""The fused head on a GPU: bfloat16 products summed in float32, and a host that never waits."""

import pytest
import torch

from sft_dist.model import fused_head
from sft_dist.model.fused_head import (
    LinearHead,
    LogitTransform,
    LossTerms,
    TopReference,
    top_logprobs,
    values,
    weighted_loss,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROWS, WIDTH, VOCAB = 1_000, 256, 5_003


@pytest.mark.parametrize("how", [LogitTransform(), LogitTransform(factor=0.5, softcap=3.0)], ids=str)
@pytest.mark.parametrize("terms", [LossTerms(), LossTerms(0.1, 0.01)], ids=str)
def test_loss_and_gradients_in_bfloat16_are_those_of_float64_to_rounding_and_the_host_never_waits(
    monkeypatch: pytest.MonkeyPatch, how: LogitTransform, terms: LossTerms
) -> None:
    monkeypatch.setattr(fused_head, "chunk_rows", lambda *_: 48)
    torch.manual_seed(0)
    exact = [torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH) / WIDTH**0.5, torch.randn(VOCAB)]
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in exact]
    targets, weights = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS) + 0.5
    expected = weighted_loss(exact[0], targets, weights, LinearHead(exact[1], exact[2], how), terms, with_details=True)
    expected.loss.backward()
    rows, weight, bias = (tensor.detach().cuda().bfloat16().requires_grad_() for tensor in exact)
    targets, weights = targets.cuda(), weights.cuda()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = weighted_loss(rows, targets, weights, LinearHead(weight, bias, how), terms, with_details=True)
        (found.loss * 0.5).backward()
        scored = values(rows, targets, LinearHead(weight, bias, how))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert found.logprob.dtype == found.loss.dtype == torch.float32
    # The logits are never rounded to bfloat16.
    torch.testing.assert_close(found.logprob.cpu().double(), expected.logprob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy.cpu().double(), expected.entropy, rtol=1e-4, atol=1e-4)
    assert torch.equal(scored.logprob, found.logprob)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for tensor, reference in zip((rows, weight, bias), exact, strict=True):
        assert tensor.grad.dtype == torch.bfloat16
        difference = tensor.grad.cpu().double() - reference.grad / 2
        assert difference.norm() < 2**-8 * reference.grad.norm() / 2 * 1.5


@pytest.mark.parametrize("how", [LogitTransform(), LogitTransform(factor=0.5, softcap=3.0)], ids=str)
def test_the_divergence_from_what_is_kept_is_that_of_float64_to_rounding_and_the_host_never_waits(
    monkeypatch: pytest.MonkeyPatch, how: LogitTransform
) -> None:
    monkeypatch.setattr(fused_head, "chunk_rows", lambda *_: 48)
    torch.manual_seed(0)
    rows, weight, start = torch.randn(ROWS, WIDTH), torch.randn(VOCAB, WIDTH) / WIDTH**0.5, torch.randn(ROWS, WIDTH)
    targets, weights, terms = torch.randint(VOCAB, (ROWS,)), torch.rand(ROWS) + 0.5, LossTerms(0.1, 0.01, kl=2.0)
    exact = [tensor.bfloat16().double().requires_grad_() for tensor in (rows, weight)]
    kept = top_logprobs(start.bfloat16().double(), LinearHead(exact[1].detach(), None, how), 64)
    expected = weighted_loss(exact[0], targets, weights, LinearHead(exact[1], None, how), terms, reference=kept)
    expected.loss.backward()
    rows, weight = (tensor.detach().cuda().bfloat16().requires_grad_() for tensor in exact)
    start, targets, weights = start.cuda().bfloat16(), targets.cuda(), weights.cuda()
    on_device = TopReference(kept.ids.cuda(), kept.logprobs.float().cuda())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = top_logprobs(start, LinearHead(weight, None, how), 64)
        found = weighted_loss(rows, targets, weights, LinearHead(weight, None, how), terms, reference=on_device)
        found.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(again.logprobs.cpu().double(), kept.logprobs, rtol=1e-4, atol=1e-4)
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-4)
    for tensor, reference in zip((rows, weight), exact, strict=True):
        difference = tensor.grad.cpu().double() - reference.grad
        assert difference.norm() < 2**-8 * reference.grad.norm() * 1.5


def test_memory_of_the_head_does_not_grow_with_the_rows() -> None:
    """Beyond the rows, their gradient (both twice: kept and scaled) and those of the weight."""

    def peak(num_rows: int) -> int:
        rows = torch.randn(num_rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(50_000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        targets, weights = torch.zeros(num_rows, dtype=torch.int64, device="cuda"), torch.ones(num_rows, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        weighted_loss(rows, targets, weights, LinearHead(weight, None), LossTerms()).loss.backward()
        return torch.cuda.max_memory_allocated() - before

    peak(100)  # cuBLAS keeps a workspace
    chunk = fused_head.chunk_rows(50_000, "cuda")
    per_row = 64 * 2 * 2 + 64  # its gradient twice, values of targets
    assert peak(8 * chunk) - peak(chunk) < 8 * chunk * per_row
