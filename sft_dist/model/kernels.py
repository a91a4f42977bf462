"""Causal attention within each conversation of a packed row: one operation with a backward of its own.

torch.compile sees one node that takes `cu_seqlens` as a tensor, so other lengths are no other graph, and nothing of
size T x T is kept. On the CPU a conversation goes through torch's flash kernel; windows that a conversation exceeds,
softcaps, values of another width than queries and other devices are computed as written here, in blocks of queries.

With keys j that query t sees, c the softcap and b the sink of the head (either may be absent):

    s_tj = c tanh(scale q_t·k_j / c),   L_t = log(exp b + Σ_j exp s_tj),   p_tj = exp(s_tj − L_t),   o_t = Σ_j p_tj v_j,
    D_t = do_t·o_t,   ds_tj = p_tj (do_t·v_j − D_t),   db = −Σ_t exp(b − L_t) D_t.

The backward recomputes p from L: Dao et al., "FlashAttention", 2022, algorithm 4. Softcap: Gemma Team, "Gemma 2", 2024,
section 2. Sinks: a logit per head that takes weight and gives no value, as in OpenAI's gpt-oss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# Queries whose scores exist at a time where they are written out: x 32 heads x 8,192 keys x 4 B = 0.5 GB.
_BLOCK_QUERIES = 512

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, slots=True)
class Scores:
    """How a query's scores follow from its products with the keys."""

    scale: float
    window: int | None  # keys that a query sees, itself included; None: all before it
    softcap: float | None

    def blocks(self, length: int) -> Iterator[tuple[int, int, int]]:
        """(first query, end of queries and keys, first key) of every block of a conversation."""
        for first in range(0, length, _BLOCK_QUERIES):
            start = 0 if self.window is None else max(0, first - self.window + 1)
            yield first, min(first + _BLOCK_QUERIES, length), start

    def of(self, query: Tensor, key: Tensor) -> Tensor:
        """[H, n, m] of queries [H, n, D], the last n of the m positions of keys [K, m, D]; -inf where hidden."""
        num_queries, num_keys = query.shape[1], key.shape[1]
        scores = _matmul(query, key.mT) * self.scale
        if self.softcap is not None:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        keys = torch.arange(num_keys, device=query.device)
        queries = keys[num_keys - num_queries :, None]
        hidden = keys > queries
        if self.window is not None:
            hidden |= keys <= queries - self.window
        return scores.masked_fill_(hidden, -math.inf)

    def slope(self, scores: Tensor) -> Tensor | float:
        """What a change of scale q·k does to the score. Hidden scores get a finite slope: 0 x inf would be NaN."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (scores.clamp_min(-self.softcap) / self.softcap).square())


def _matmul(of_heads: Tensor, of_groups: Tensor) -> Tensor:
    """[H, n, a] x [K, a, b] -> [H, n, b], K dividing H: neighbouring heads share one of the K."""
    num_groups = of_groups.shape[0]
    product = of_heads.reshape(num_groups, -1, of_heads.shape[-1]) @ of_groups
    return product.view(*of_heads.shape[:2], -1)


def _matmul_over_queries(left: Tensor, right: Tensor, num_groups: int) -> Tensor:
    """[H, n, a], [H, n, b] -> [K, a, b], summed over queries and over the heads that share one of the K."""
    return left.reshape(num_groups, -1, left.shape[-1]).mT @ right.reshape(num_groups, -1, right.shape[-1])


def _written_out(
    query: Tensor, key: Tensor, value: Tensor, scores: Scores, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One conversation, [H, l, D], [K, l, D], [K, l, E] -> o [H, l, E] and L [H, l]."""
    outs, normalisers = [], []
    for first, end, start in scores.blocks(query.shape[1]):
        s = scores.of(query[:, first:end], key[:, start:end])
        normaliser = s.logsumexp(-1)
        if sinks is not None:
            normaliser = torch.logaddexp(normaliser, sinks[:, None])
        outs.append(_matmul((s - normaliser[..., None]).exp(), value[:, start:end]))
        normalisers.append(normaliser)
    return torch.cat(outs, 1), torch.cat(normalisers, 1)


def _written_out_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, normaliser: Tensor, *, scores: Scores
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value of one conversation."""
    grad_query, grad_key, grad_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    through_out = (grad * out).sum(-1, keepdim=True)  # D [H, l, 1]
    for first, end, start in scores.blocks(query.shape[1]):
        own, seen = slice(first, end), slice(start, end)
        s = scores.of(query[:, own], key[:, seen])
        weights = (s - normaliser[:, own, None]).exp()
        grad_value[:, seen] += _matmul_over_queries(weights, grad[:, own], len(value))
        grad_scores = weights * (_matmul(grad[:, own], value[:, seen].mT) - through_out[:, own]) * scores.slope(s)
        grad_query[:, own] = _matmul(grad_scores, key[:, seen])
        grad_key[:, seen] += _matmul_over_queries(grad_scores, query[:, own], len(key))
    return grad_query, grad_key, grad_value


def _is_flash(query: Tensor, value: Tensor, length: int, scores: Scores) -> bool:
    """Whether torch's flash kernel for the CPU computes a conversation of this length."""
    in_window = scores.window is None or length <= scores.window
    return query.device.type == "cpu" and scores.softcap is None and in_window and query.shape[-1] == value.shape[-1]


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype is torch.float64 else torch.float32


def _conversations(cu_seqlens: Tensor, num_tokens: int) -> list[tuple[int, int]]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens:
        raise ValueError(f"cu_seqlens run from {bounds[0]} to {bounds[-1]}, but the row has {num_tokens} tokens")
    return list(pairwise(bounds))


@torch.library.custom_op("sft_dist::packed_attention", mutates_args=())
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """[1, H, T, D], [1, K, T, D], [1, K, T, E] -> o [1, T, H, E] and L float32 [1, H, T] (float64 for float64).

    `cu_seqlens` is an integer tensor [n + 1] on the CPU, H a multiple of K, `sinks` [H].
    """
    scores = Scores(scale, window, softcap)
    accurate = _accurate(query.dtype)
    out, normalisers = _empty_answer(query, value)
    logits = None if sinks is None else sinks.to(accurate)
    for first, end in _conversations(cu_seqlens, query.shape[2]):
        q, k, v = (tensor[:, :, first:end] for tensor in (query, key, value))
        if _is_flash(query, value, end - first, scores):
            part, normaliser = _flash(q, k, v, 0.0, True, scale=scale)
            if logits is not None:  # the kernel knows no sink: its weights are too large by one factor a query
                with_sink = torch.logaddexp(normaliser, logits[:, None])
                part = part * (normaliser - with_sink).exp()[..., None]
                normaliser = with_sink
        else:
            part, normaliser = _written_out(q[0].to(accurate), k[0].to(accurate), v[0].to(accurate), scores, logits)
        out[:, first:end] = part.transpose(-3, -2)
        normalisers[:, :, first:end] = normaliser
    return out, normalisers


@packed_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _empty_answer(query, value)


def _empty_answer(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    _, heads, num_tokens, _ = query.shape
    out = query.new_empty(1, num_tokens, heads, value.shape[-1])
    return out, query.new_empty(1, heads, num_tokens, dtype=_accurate(query.dtype))


@torch.library.custom_op("sft_dist::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    normalisers: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    scores = Scores(scale, window, softcap)
    accurate = _accurate(query.dtype)
    grads = _empty_gradients(query, key, value)
    for first, end in _conversations(cu_seqlens, query.shape[2]):
        rows = (slice(None), slice(None), slice(first, end))
        q, k, v, normaliser = query[rows], key[rows], value[rows], normalisers[rows]
        grad, o = (tensor[:, first:end].transpose(1, 2) for tensor in (grad_out, out))
        if _is_flash(query, value, end - first, scores):
            parts = _flash_backward(grad, q, k, v, o, normaliser, 0.0, True, scale=scale)
        else:
            parts = _written_out_backward(*(x[0].to(accurate) for x in (grad, q, k, v, o, normaliser)), scores=scores)
        for whole, part in zip(grads, parts, strict=True):
            whole[rows] = part
    return grads


@_packed_attention_backward.register_fake
def _(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    out: Tensor,
    normalisers: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(query, key, value)


def _empty_gradients(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens, ctx.scale, ctx.window, ctx.softcap, sinks = inputs
    ctx.save_for_backward(query, key, value, cu_seqlens, sinks, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad_out, _):  # type: ignore[no-untyped-def]
    query, key, value, cu_seqlens, sinks, out, normalisers = ctx.saved_tensors
    grads = _packed_attention_backward(
        grad_out, query, key, value, cu_seqlens, out, normalisers, ctx.scale, ctx.window, ctx.softcap
    )
    grad_sinks = None
    if sinks is not None:
        through_out = (grad_out * out).sum(-1, dtype=normalisers.dtype).mT  # D [1, H, T]
        grad_sinks = -((sinks[:, None] - normalisers).exp() * through_out).sum((0, 2)).to(sinks.dtype)
    return *grads, None, None, None, None, grad_sinks


packed_attention.register_autograd(_backward, setup_context=_keep)
