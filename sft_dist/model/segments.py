"""Attention over segments of a row that may continue each other, written with differentiable operations.

A segment with a parent continues it, so a prompt that several answers share is computed once: it attends to all of its
ancestors and, causally, to itself, as it would in a row of its own. Attention dropout takes this way too, which torch's
operations draw; plain packed rows without dropout go through model/kernels.py.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Short siblings share one masked kernel; beyond this many tokens the mask would cost more than another kernel.
SIBLING_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Options:
    """What a layer asks of attention beside causality."""

    scale: float
    dropout: float = 0.0
    window: int | None = None  # keys that a query sees, itself included
    softcap: float | None = None
    sinks: Tensor | None = None  # [heads]


def attend(
    query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[int], parents: Sequence[int], options: Options
) -> Tensor:
    """[B, heads, T, D] and [B, kv_heads, T, D] -> [B, T, heads, D]; `parents`: the earlier segment continued, or -1."""
    # split, not slices: the backward of a slice allocates a zero tensor of the whole row for every segment.
    lengths = list(lengths)
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    groups = list(_sibling_groups(lengths, parents))
    queries = query.split([sum(lengths[first:end]) for first, end in groups], 2)
    parts = []
    for (first, end), q in zip(groups, queries, strict=True):
        ancestors = _ancestors(first, parents)
        seen = [*ancestors, *range(first, end)]
        k = keys[first] if len(seen) == 1 else torch.cat([keys[i] for i in seen], 2)
        v = values[first] if len(seen) == 1 else torch.cat([values[i] for i in seen], 2)
        num_before = sum(lengths[i] for i in ancestors)
        longest = num_before + max(lengths[first:end])
        is_masked = len(seen) > 1 or (options.window is not None and longest > options.window)
        mask = _mask(lengths[first:end], num_before, options.window, query.device) if is_masked else None
        parts.append(_kernel(q, k, v, mask, options))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """[B, heads, L, D]; without a mask plainly causal."""
    if options.softcap is None and options.sinks is None:
        return F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=options.dropout,
            is_causal=mask is None,
            scale=options.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    sharing = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(sharing, 1), v.repeat_interleave(sharing, 1)
    scores = (q @ k.mT).float() if q.dtype is not torch.float64 else q @ k.mT
    scores = scores * options.scale
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    allowed = mask if mask is not None else scores.new_ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = scores.masked_fill(~allowed, -math.inf)
    if options.sinks is not None:
        sinks = options.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    weights = F.dropout(scores.softmax(-1), options.dropout)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v


def _ancestors(segment: int, parents: Sequence[int]) -> list[int]:
    """The segments that a segment continues, from the root on."""
    chain: list[int] = []
    while (segment := parents[segment]) >= 0:
        chain.insert(0, segment)
    return chain


def _sibling_groups(lengths: Sequence[int], parents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of segments that one kernel computes: short neighbours with the same parent, else each on its own."""
    first, num_tokens = 0, lengths[0]
    for segment in range(1, len(lengths)):
        is_sibling = parents[segment] >= 0 and parents[segment] == parents[first]
        if is_sibling and num_tokens + lengths[segment] <= SIBLING_TOKENS:
            num_tokens += lengths[segment]
            continue
        yield first, segment
        first, num_tokens = segment, lengths[segment]
    yield first, len(lengths)


def _mask(lengths: Sequence[int], num_before: int, window: int | None, device: torch.device) -> Tensor:
    """bool [L, num_before + L] for siblings of these lengths: the ancestors' keys, then causal within each sibling."""
    sibling = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))  # [L]
    own = (sibling[:, None] == sibling[None, :]).tril()
    allowed = torch.cat([own.new_ones(len(sibling), num_before), own], 1)
    if window is not None:
        positions = torch.cat([torch.arange(length) for length in lengths]) + num_before  # of the queries
        of_keys = torch.cat([torch.arange(num_before), positions])
        allowed &= of_keys[None, :] > positions[:, None] - window
    return allowed.to(device)
