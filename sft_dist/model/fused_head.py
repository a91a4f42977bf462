"""Log-probs of target rows, their weighted loss and its gradient, from one computation of the logits.

In: hidden states of the rows that have a target, their targets and weights, and the head. Out: a value per target, and
in training Σ w ℓ, connected to the graph. The weights are known beforehand, so the derivative by a row's logits is
known as soon as these are: the forward takes a chunk of rows, computes its logits, overwrites them with that derivative
and adds to the gradients of the rows and of the head. Three matrix products a chunk in all (two with the rows or the
head frozen, one without gradients), and one chunk of logits at a time; the backward multiplies by the number that
comes in. Nothing here knows of batches, ranks or sharding: the head's weight must be whole while the forward runs.

R target rows, C rows of a chunk, V entries of the vocabulary, D hidden width. `wide` is float32, for float64 inputs
float64: logits, log-probs, losses and the head's gradient are kept in it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MIB = 2**20
_ENTROPY_ROWS = 64


@dataclass(frozen=True, slots=True)
class LossTerms:
    """What a target costs: (1 − ε)·nll + ε·mean_v(−log p_v) + ζ·log² Z + β·KL(p̂ ‖ p). docs/objective.md, section 5.

    ε: label smoothing, Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016, section 7.
    ζ: z-loss, Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, section 5.
    β: distillation from the model that training starts from, Li and Hoiem, "Learning without Forgetting", 2016, eq. 2
    with temperature 1.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    kl: float = 0.0  # needs a Reference or a TopReference, whose distribution is p̂


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to what its head gives: z → c·tanh(factor·z / c), c the softcap; factor·z without one."""

    factor: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class LinearHead:
    """The last layer: logits = transform(x Wᵀ + b)."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    transform: LogitTransform = LogitTransform()


@dataclass(frozen=True, slots=True)
class Reference:
    """A frozen model's own last hidden states for the same rows, and its head. Nothing of it is differentiated."""

    rows: Tensor  # [R, D]
    head: LinearHead


@dataclass(frozen=True, slots=True)
class TopReference:
    """What a frozen model said at the same rows, as far as it was kept: k tokens, and all others as one outcome.

    The divergence is then that of k + 1 outcomes, never more than that of all: docs/objective.md, section 8.
    """

    ids: Tensor  # int32 [R, k], distinct in each row
    logprobs: Tensor  # [R, k + 1], the last of all others together, -inf where there are none


class TokenValues(NamedTuple):
    """What one forward says of its targets, in the order of the row. Only the losses are connected to the graph."""

    logprob: Tensor  # wide [R], log Pr(target | all before it in its sample)
    is_top: Tensor | None = None  # wide [R], 1 where the target is the likeliest token (the first of those), else 0
    loss: Tensor | None = None  # wide [], Σ w ℓ
    logits: Tensor | None = None  # wide [n, C], of a prediction head for each sample of the row
    label_loss: Tensor | None = None  # wide [], Σ W ℓ over the labels of a head beside the language model's
    entropy: Tensor | None = None  # wide [R], nats: −Σ_v p_v log p_v of the distribution at the target


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows whose logits exist at a time.

    The head's float32 gradient is read and written once a chunk: 8 V D bytes against 6 C V D operations. On a GPU that
    does 180 of these per byte (H200, bfloat16) this is 12 % of the products' time with C = 2,048 and 6 % with 4,096;
    hence 2 GiB of logits, 4,096 rows of a vocabulary of 128k. On a CPU 256 rows are enough, and more than 128 MiB
    gained nothing (benchmarks/head.py).
    """
    if device_type == "cpu":
        return max(128 * _MIB // (4 * vocab_size), 256)
    return min(max(2048 * _MIB // (4 * vocab_size), 2_048), 8_192)


def values(rows: Tensor, targets: Tensor, head: LinearHead, *, with_details: bool = False) -> TokenValues:
    """Log-probs of targets (int64 [R]) that follow hidden rows ([R, D]), without gradients; details on request:
    `is_top` and `entropy`.
    """
    with torch.no_grad():
        softmaxes = [
            _softmax(_logits(rows[chunk], head, buffer), targets[chunk], with_details=with_details, with_mean=False)
            for chunk, buffer in _chunks(rows, head)
        ]
        logprob, is_top, entropy = (
            _joined([getattr(softmax, name) for softmax in softmaxes]) for name in ("logprob", "is_top", "entropy")
        )
        return TokenValues(logprob, is_top, entropy=entropy)


def top_logprobs(rows: Tensor, head: LinearHead, k: int) -> TopReference:
    """The k likeliest tokens at hidden rows [R, D] and the mass of all others, without gradients; k is at most V."""
    ids, logprobs = [], []
    with torch.no_grad():
        for chunk, buffer in _chunks(rows, head):
            logits = _logits(rows[chunk], head, buffer)
            likeliest = logits.topk(k, -1).indices
            outcomes = _apart(logits, likeliest).outcomes
            ids.append(likeliest.int())
            logprobs.append(outcomes - outcomes.logsumexp(-1, keepdim=True))
    return TopReference(torch.cat(ids), torch.cat(logprobs))


def weighted_loss(
    rows: Tensor,
    targets: Tensor,
    weights: Tensor,
    head: LinearHead,
    terms: LossTerms,
    *,
    with_details: bool = False,
    reference: Reference | TopReference | None = None,
) -> TokenValues:
    """As `values`, and the loss Σ w ℓ with weights [R], which can be differentiated once by rows, weight and bias.

    R may be 0: a zero that is connected to the graph.
    """
    assert (reference is not None) == bool(terms.kl)
    loss, logprob, is_top, entropy = _WeightedLoss.apply(
        rows, head.weight, head.bias, targets, weights, head.transform, terms, with_details, torch.is_grad_enabled(),
        reference,
    )  # fmt: skip
    return TokenValues(logprob, is_top, loss, entropy=entropy)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        transform: LogitTransform,
        terms: LossTerms,
        with_details: bool,
        with_gradient: bool,
        reference: Reference | TopReference | None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        head = LinearHead(weight, bias, transform)
        wide = _wide(rows)
        of_rows, of_weight, of_bias = (
            torch.zeros_like(tensor, dtype=dtype) if with_gradient and is_needed and tensor is not None else None
            for tensor, dtype, is_needed in zip(
                (rows, weight, bias), (rows.dtype, wide, wide), ctx.needs_input_grad, strict=False
            )
        )
        is_needed = any(gradient is not None for gradient in (of_rows, of_weight, of_bias))
        weights = weights.to(wide)
        loss = torch.zeros((), dtype=wide, device=rows.device)
        logprobs, is_top, entropies = [], [], []
        for chunk, buffer, *more in _chunks(rows, head, num_buffers=3 if isinstance(reference, Reference) else 1):
            logits = _logits(rows[chunk], head, buffer)
            slope = _softcap_slope(logits, transform) if is_needed else None
            top = _kept(reference, chunk) if isinstance(reference, TopReference) else None
            of_reference = _compare(logits, reference, chunk, more) if isinstance(reference, Reference) else None
            softmax = _softmax(
                logits, targets[chunk], with_details=with_details, with_mean=bool(terms.label_smoothing),
                apart=None if top is None else top.ids,
            )  # fmt: skip
            losses = _losses(softmax, terms)
            if top is not None:
                losses += terms.kl * _divergence(top.logprobs, softmax)
            if of_reference is not None:
                losses += terms.kl * (of_reference.surplus + softmax.log_normaliser)
            loss += (weights[chunk] * losses).sum()
            logprobs.append(softmax.logprob)
            is_top.append(softmax.is_top)
            entropies.append(softmax.entropy)
            if not is_needed:
                continue
            of_logits = weights[chunk] * transform.factor
            gradient = _logit_gradient(softmax, targets[chunk], of_logits, terms, top)  # [C, V]
            if of_reference is not None:
                gradient.addcmul_(of_reference.probabilities, (of_logits * terms.kl)[:, None], value=-1)
            if slope is not None:
                gradient.mul_(slope)
            if of_bias is not None:
                of_bias += gradient.sum(0)
            narrow = gradient.to(rows.dtype)
            if of_rows is not None:
                torch.mm(narrow, weight, out=of_rows[chunk])
            if of_weight is not None:
                _add_product(of_weight, narrow if rows.is_cuda else gradient, rows[chunk])
        ctx.save_for_backward(of_rows, of_weight, of_bias)
        ctx.dtypes = rows.dtype, weight.dtype, None if bias is None else bias.dtype
        found = _joined(logprobs), _joined(is_top), _joined(entropies)
        ctx.mark_non_differentiable(*(tensor for tensor in found if tensor is not None))
        return loss, *found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            # Rounded once, after the product, and on the device: reading the number would make the host wait.
            None if gradient is None else torch.mul(gradient, of_loss, out=torch.empty_like(gradient, dtype=dtype))
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None, None, None)


class _Apart(NamedTuple):
    """Logits of k tokens, and all others as one outcome with the logit log Σ exp(z_v)."""

    outcomes: Tensor  # [C, k + 1], the last of all others; -inf where there are none
    exponentials: Tensor  # [C, V], exp(z_v − max of the others), 0 at the k
    total: Tensor  # [C], their sums; 1 where there are no others


class _Softmax(NamedTuple):
    exponentials: Tensor  # [C, V], exp(z_v − max z), or those of `apart`
    total: Tensor  # [C], their sums
    log_normaliser: Tensor  # [C], log Z = log Σ_v exp(z_v)
    logprob: Tensor  # [C], of the target
    mean_logprob: Tensor | None  # [C], (1/V) Σ_v log p_v
    is_top: Tensor | None  # [C]
    entropy: Tensor | None  # [C]
    outcomes: Tensor | None  # [C, k + 1], log-probs of what is kept apart


class _Compared(NamedTuple):
    probabilities: Tensor  # [C, V], q_v of the reference
    surplus: Tensor  # [C], Σ_v q_v (log q_v − z_v): with log Z of the logits z it is KL(q ‖ p)


def _compare(logits: Tensor, reference: Reference, chunk: slice, buffers: list[Tensor]) -> _Compared:
    """Writes to two buffers [C, V] and leaves `logits` as they are."""
    log_q = _logits(reference.rows[chunk], reference.head, buffers[0])
    top = log_q.amax(-1, keepdim=True)
    q = torch.sub(log_q, top, out=buffers[1]).exp_()
    total = q.sum(-1, keepdim=True)
    q /= total
    log_q -= top + total.log()
    return _Compared(q, log_q.sub_(logits).mul_(q).sum(-1))


def _apart(logits: Tensor, ids: Tensor) -> _Apart:
    """Overwrites `logits`. What is left of Z without the k is summed by itself: as a difference it would be rounding.

    ids: int64 [C, k].
    """
    kept = logits.gather(-1, ids)
    logits.scatter_(-1, ids, -torch.inf)
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    exponentials = logits.sub_(top).exp_()
    total = exponentials.sum(-1)
    others = top[:, 0] + total.log()
    return _Apart(torch.cat([kept, others[:, None]], -1), exponentials, total.clamp_min(1))


def _kept(reference: TopReference, chunk: slice) -> TopReference:
    return TopReference(reference.ids[chunk].long(), reference.logprobs[chunk])


def _divergence(log_q: Tensor, softmax: _Softmax) -> Tensor:
    """[C]: Σ q (log q − log p) over k + 1 outcomes, those without mass left out."""
    assert softmax.outcomes is not None
    log_q = log_q.to(softmax.outcomes.dtype)
    q = log_q.exp()
    return torch.where(q > 0, q * (log_q - softmax.outcomes), 0).sum(-1)


def _wide(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)


def _chunks(rows: Tensor, head: LinearHead, *, num_buffers: int = 1) -> list[tuple[Any, ...]]:
    """Chunks of nearly equal size, each a slice and memory for its logits, the same for all; at least one, if empty.

    With more than one buffer chunks have half the rows.
    """
    num_rows, vocab_size = len(rows), len(head.weight)
    largest = max(chunk_rows(vocab_size, rows.device.type) // (1 if num_buffers == 1 else 2), 1)
    num_chunks = max(-(-num_rows // largest), 1)
    size = -(-num_rows // num_chunks)
    buffers = [torch.empty(size, vocab_size, dtype=_wide(rows), device=rows.device) for _ in range(num_buffers)]
    starts = range(0, num_rows, size) if num_rows else (0,)
    return [
        (slice(start, start + size), *(buffer[: min(size, num_rows - start)] for buffer in buffers)) for start in starts
    ]


def _logits(rows: Tensor, head: LinearHead, out: Tensor) -> Tensor:
    """wide [C, V], written to `out`: what the model's own forward gives for these rows."""
    if rows.dtype == out.dtype:
        torch.mm(rows, head.weight.t(), out=out)
    elif rows.is_cuda:
        torch.mm(rows, head.weight.t(), out_dtype=out.dtype, out=out)
    else:
        out.copy_(rows @ head.weight.t())
    if head.bias is not None:
        out += head.bias
    if head.transform.factor != 1:
        out *= head.transform.factor
    softcap = head.transform.softcap
    return out if softcap is None else out.div_(softcap).tanh_().mul_(softcap)


def _add_product(out: Tensor, gradient: Tensor, rows: Tensor) -> None:
    """out [V, D] += gradientᵀ [V, C] · rows [C, D], summed in the precision of `out`."""
    if rows.is_cuda and rows.dtype != out.dtype:
        torch.addmm(out, gradient.t(), rows, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, gradient.t(), rows.to(out.dtype), out=out)


def _softmax(
    logits: Tensor, targets: Tensor, *, with_details: bool, with_mean: bool, apart: Tensor | None = None
) -> _Softmax:
    """Overwrites `logits`. `apart`: int64 [C, k], tokens that are kept apart from all others."""
    is_top = top = None
    if with_details:
        top, places = logits.max(-1, keepdim=True)
        is_top = (places[:, 0] == targets).to(logits.dtype)
    of_target = logits.gather(-1, targets[:, None])[:, 0]
    mean = logits.mean(-1) if with_mean else None
    outcomes = entropy = None
    if apart is None:
        if top is None:
            top = logits.amax(-1, keepdim=True)
        exponentials = logits.sub_(top).exp_()
        total = exponentials.sum(-1)
        log_normaliser = top[:, 0] + total.log()
        if with_details:
            entropy = _entropy(exponentials, total)
    else:
        outcomes, exponentials, total = _apart(logits, apart)
        log_normaliser = outcomes.logsumexp(-1)
        outcomes = outcomes - log_normaliser[:, None]
        if with_details:  # of the k + 1 outcomes, and within the last one
            p = outcomes.exp()
            entropy = torch.special.entr(p).sum(-1) + p[:, -1] * _entropy(exponentials, total)
    mean_logprob = None if mean is None else mean - log_normaliser
    logprob = of_target - log_normaliser
    return _Softmax(exponentials, total, log_normaliser, logprob, mean_logprob, is_top, entropy, outcomes)


def _entropy(exponentials: Tensor, total: Tensor) -> Tensor:
    """[C]: of p_v = e_v / Σ e it is log Σ e − Σ e_v log e_v / Σ e. A few rows at a time: no second [C, V]."""
    parts = [torch.special.entr(rows).sum(-1) for rows in exponentials.split(_ENTROPY_ROWS)]
    return total.log() + torch.cat(parts) / total


def _losses(softmax: _Softmax, terms: LossTerms) -> Tensor:
    """[C]: ℓ of every target."""
    losses = (terms.label_smoothing - 1) * softmax.logprob
    if softmax.mean_logprob is not None:
        losses -= terms.label_smoothing * softmax.mean_logprob
    if terms.z_loss:
        losses += terms.z_loss * softmax.log_normaliser**2
    return losses


def _logit_gradient(
    softmax: _Softmax, targets: Tensor, weights: Tensor, terms: LossTerms, reference: TopReference | None
) -> Tensor:
    """[C, V]: w ∂ℓ/∂z_v = w·[(1 + 2ζ log Z + β)·p_v − (1 − ε)·1(v = target) − ε/V], to which −w·β·q_v is to be added.

    With a TopReference it has been: q_v of a token that is kept apart, of all others p_v · Σ q / Σ p, the sums over
    those. Overwrites the exponentials.
    """
    of_probability = weights * (1 + terms.kl + 2 * terms.z_loss * softmax.log_normaliser)
    if reference is None:
        gradient = softmax.exponentials.mul_((of_probability / softmax.total)[:, None])
    else:
        assert softmax.outcomes is not None
        of_outcomes = softmax.outcomes.exp().mul_(of_probability[:, None])  # [C, k + 1]
        of_outcomes -= reference.logprobs.to(of_outcomes.dtype).exp() * (weights * terms.kl)[:, None]
        gradient = softmax.exponentials.mul_((of_outcomes[:, -1] / softmax.total)[:, None])
        gradient.scatter_(-1, reference.ids, of_outcomes[:, :-1])
    if terms.label_smoothing:
        gradient -= (weights * (terms.label_smoothing / gradient.shape[1]))[:, None]
    return gradient.scatter_add_(-1, targets[:, None], (weights * (terms.label_smoothing - 1))[:, None])


def _softcap_slope(logits: Tensor, transform: LogitTransform) -> Tensor | None:
    """[C, V]: the derivative of c·tanh(z / c) where it gives `logits`, 1 − (logits / c)²."""
    return None if transform.softcap is None else 1 - (logits / transform.softcap) ** 2


def _joined(parts: list[Any]) -> Any:
    return None if parts[0] is None else torch.cat(parts)
