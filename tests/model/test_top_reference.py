"""The divergence from what is kept of a frozen model's answer: k tokens, and all others as one outcome.

The reference is autograd of torch in float64 over log_softmax of all logits, with the k + 1 outcomes written out.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sft_dist.model import fused_head
from sft_dist.model.fused_head import (
    LinearHead,
    LogitTransform,
    LossTerms,
    TokenValues,
    TopReference,
    top_logprobs,
    weighted_loss,
)
from tests.model.test_head import TRANSFORMS, VOCAB, WIDTH, Sizes, draw, leaves, reference_of

TERMS = (LossTerms(kl=0.7), LossTerms(0.2, 0.01, kl=1.5))
KS = (1, 5, VOCAB)
CLOSE = {"rtol": 1e-10, "atol": 1e-12}


def logits_of(rows: Tensor, weight: Tensor, bias: Tensor | None, how: LogitTransform) -> Tensor:
    logits = F.linear(rows, weight, bias) * how.factor
    return logits if how.softcap is None else how.softcap * torch.tanh(logits / how.softcap)


def outcomes(logprobs: Tensor, ids: Tensor) -> Tensor:
    """[R, k + 1]: of these tokens and of all others together."""
    is_kept = torch.zeros_like(logprobs, dtype=torch.bool).scatter_(-1, ids, True)
    others = logprobs.masked_fill(is_kept, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logprobs.gather(-1, ids), others], -1)


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """[R]"""
    terms = [(q.exp() * (q - p) if q > -torch.inf else p.new_zeros(())) for q, p in zip_flat(log_q, log_p)]
    return torch.stack(terms).view(log_q.shape).sum(-1) if terms else log_p.new_zeros(len(log_p))


def zip_flat(log_q: Tensor, log_p: Tensor) -> Any:
    return zip(log_q.flatten(), log_p.flatten(), strict=True)


def written_out(drawn: dict[str, Any], how: LogitTransform, terms: LossTerms, log_q: Tensor, k: int | None) -> Tensor:
    """Σ w ℓ; log_q [R, V] of the frozen model, of which the k likeliest are kept, or all."""
    logits = logits_of(drawn["rows"], drawn["weight"], drawn["bias"], how)
    log_p = logits.log_softmax(-1)
    losses = F.cross_entropy(logits, drawn["targets"], reduction="none", label_smoothing=terms.label_smoothing)
    losses = losses + terms.z_loss * logits.logsumexp(-1) ** 2
    if k is None:
        compared = F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    else:
        ids = log_q.topk(k).indices
        compared = divergence(outcomes(log_q, ids), outcomes(log_p, ids))
    return ((losses + terms.kl * compared) * drawn["weights"]).sum()


def start_of(drawn: dict[str, Any], how: LogitTransform) -> tuple[Any, Tensor]:
    """Another model's rows and head, and its log-probs."""
    other = reference_of(drawn["rows"], drawn["bias"], how)
    return other, logits_of(other.rows, other.head.weight, other.head.bias, how).log_softmax(-1)


def fused(drawn: dict[str, Any], how: LogitTransform, terms: LossTerms, reference: Any) -> TokenValues:
    head = LinearHead(drawn["weight"], drawn["bias"], how)
    return weighted_loss(
        drawn["rows"], drawn["targets"], drawn["weights"], head, terms, with_details=True, reference=reference
    )


@pytest.fixture
def chunks_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda num_rows: monkeypatch.setattr(fused_head, "chunk_rows", lambda *_: num_rows)


@settings(deadline=None, max_examples=60)
@given(
    num_rows=st.integers(0, 9),
    size=st.sampled_from([1, 4, 8]),
    with_bias=st.booleans(),
    how=st.sampled_from(TRANSFORMS),
    terms=st.sampled_from(TERMS),
    k=st.sampled_from(KS),
    factor=st.sampled_from([1.0, -0.25]),
    seed=st.integers(0, 99),
)
def test_loss_values_and_gradients_are_those_of_all_logits_at_once(
    num_rows: int, size: int, with_bias: bool, how: LogitTransform, terms: LossTerms, k: int, factor: float, seed: int
) -> None:
    drawn = draw(num_rows, with_bias=with_bias, seed=seed)
    other, log_q = start_of(drawn, how)
    plain = written_out(drawn, how, terms, log_q, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_head, "chunk_rows", lambda *_: size)
        found = fused(drawn, how, terms, top_logprobs(other.rows, other.head, k))
    logits = logits_of(drawn["rows"], drawn["weight"], drawn["bias"], how).detach()
    expected = logits.log_softmax(-1).gather(-1, drawn["targets"][:, None])[:, 0]
    torch.testing.assert_close(found.loss, plain, **CLOSE)
    torch.testing.assert_close(found.logprob, expected, **CLOSE)
    assert found.is_top is not None and torch.equal(found.is_top.bool(), logits.argmax(-1) == drawn["targets"])
    logprobs = logits.log_softmax(-1)
    torch.testing.assert_close(found.entropy, -(logprobs.exp() * logprobs).sum(-1), **CLOSE)
    gradients = torch.autograd.grad(found.loss * factor, leaves(drawn))
    torch.testing.assert_close(gradients, torch.autograd.grad(plain * factor, leaves(drawn)), **CLOSE)


@pytest.mark.parametrize("how", TRANSFORMS, ids=str)
@pytest.mark.parametrize("k", KS)
def test_the_gradient_is_that_of_finite_differences(
    chunks_of: Callable[[int], None], how: LogitTransform, k: int
) -> None:
    chunks_of(2)
    drawn = draw(3, with_bias=True)
    other, _ = start_of(drawn, how)
    kept = top_logprobs(other.rows, other.head, k)

    def loss(rows: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return fused(drawn | {"rows": rows, "weight": weight, "bias": bias}, how, TERMS[1], kept).loss

    assert torch.autograd.gradcheck(loss, leaves(drawn))


@pytest.mark.parametrize("how", TRANSFORMS, ids=str)
def test_with_every_token_kept_it_is_the_divergence_from_the_frozen_model(how: LogitTransform) -> None:
    drawn = draw(9, with_bias=True)
    other, _ = start_of(drawn, how)
    kept = top_logprobs(other.rows, other.head, VOCAB)
    assert (kept.logprobs[:, -1] == -torch.inf).all()
    whole, found = (fused(drawn, how, TERMS[1], reference) for reference in (other, kept))
    assert whole.loss is not None and found.loss is not None
    torch.testing.assert_close(found.loss, whole.loss, **CLOSE)
    expected = torch.autograd.grad(whole.loss, leaves(drawn))
    torch.testing.assert_close(torch.autograd.grad(found.loss, leaves(drawn)), expected, **CLOSE)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 999), scale=st.sampled_from([0.1, 1.0, 10.0]), how=st.sampled_from(TRANSFORMS))
def test_it_rises_with_k_to_the_whole_and_what_it_misses_is_the_divergence_within_the_others(
    seed: int, scale: float, how: LogitTransform
) -> None:
    drawn = draw(1, with_bias=False, seed=seed) | {"weights": torch.ones(1)}
    with torch.no_grad():
        drawn["rows"] *= scale
        other, log_q = start_of(drawn, how)
        log_p = logits_of(drawn["rows"], drawn["weight"], None, how).log_softmax(-1)

        def found(reference: Any, beta: float) -> float:
            loss = fused(drawn, how, LossTerms(kl=beta), reference).loss
            assert loss is not None
            return float(loss)

        # A large β, beside which the NLL does not round the divergence away.
        nll = -float(log_p[0, drawn["targets"][0]])
        whole = found(other, 100.0) - nll
        before = 0.0
        for k in range(1, VOCAB + 1):
            now = found(top_logprobs(other.rows, other.head, k), 100.0) - nll
            rounding = 1e-9 * max(whole, 1.0)
            assert before - rounding <= now <= whole + rounding
            others = log_q[0].topk(k).indices
            rest = [v for v in range(VOCAB) if v not in others.tolist()]
            missed = 0.0
            if rest:
                q, p = log_q[0, rest], log_p[0, rest]
                within = (q.softmax(-1) * (q.log_softmax(-1) - p.log_softmax(-1))).sum()
                missed = 100 * float(q.exp().sum() * within)
            assert now == pytest.approx(whole - missed, rel=1e-7, abs=rounding)
            before = now


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_is_the_likeliest_first_and_the_mass_of_all_others(
    chunks_of: Callable[[int], None], dtype: torch.dtype
) -> None:
    chunks_of(4)
    drawn = draw(11, with_bias=True, dtype=dtype)
    head = LinearHead(drawn["weight"].detach(), drawn["bias"].detach(), TRANSFORMS[1])
    kept = top_logprobs(drawn["rows"].detach(), head, 3)
    logits = fused_head._logits(drawn["rows"].detach(), head, torch.empty(11, VOCAB))
    expected = logits.double().log_softmax(-1)
    assert kept.ids.dtype == torch.int32 and kept.logprobs.dtype == torch.float32
    torch.testing.assert_close(kept.logprobs[:, :3].double(), expected.topk(3).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(kept.logprobs.double(), outcomes(expected, kept.ids.long()), rtol=1e-5, atol=1e-6)


def test_a_model_that_gives_the_others_next_to_nothing_has_a_finite_divergence_and_gradient() -> None:
    """As a difference from 1, or after one exponential with the largest logit, the others would be 0."""
    rows = torch.eye(1, WIDTH).requires_grad_()
    weight = torch.zeros(VOCAB, WIDTH)
    weight[:, 0] = torch.tensor([0.0] + [-400.0 - v for v in range(1, VOCAB)])
    weight.requires_grad_()
    kept = TopReference(torch.tensor([[0]], dtype=torch.int32), torch.tensor([[0.75, 0.25]]).log())
    found = weighted_loss(
        rows, torch.tensor([0]), torch.ones(1), LinearHead(weight, None), LossTerms(kl=1.0), reference=kept
    )
    exact = weight.detach()[:, 0].double().requires_grad_()
    log_p = exact.log_softmax(-1)
    q = torch.tensor([0.75, 0.25], dtype=torch.float64)
    expected = (q * (q.log() - outcomes(log_p[None], torch.tensor([[0]]))[0])).sum() - log_p[0]
    assert found.loss is not None
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6) and found.loss.item() > 90
    found.loss.backward()
    (gradient,) = torch.autograd.grad(expected, exact)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[:, 0].double(), gradient, rtol=1e-5, atol=1e-7)


def test_it_costs_no_matrix_product_and_no_tensor_of_the_vocabulary(chunks_of: Callable[[int], None]) -> None:
    """Chunks are as large as without it; with the frozen model they have half the rows."""
    num_rows = 400
    drawn = draw(num_rows, with_bias=True, dtype=torch.float32)
    other, _ = start_of(drawn, TRANSFORMS[0])
    for size in (16, 32):
        chunks_of(size)
        with Sizes() as made:
            kept = top_logprobs(other.rows, other.head, 5)
        assert made.largest == max(size * VOCAB, num_rows * WIDTH) and made.reads == []
        with Sizes() as made, FlopCounterMode(display=False) as counter:
            loss = fused(drawn, TRANSFORMS[0], TERMS[1], kept).loss
            assert loss is not None
            loss.backward()
        assert made.largest == max(size * VOCAB, num_rows * WIDTH) and made.reads == []
        assert counter.get_total_flops() == 3 * 2 * num_rows * WIDTH * VOCAB
