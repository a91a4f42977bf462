"""Attention in both directions within each sample of a packed row, for encoders.

Samples of one length are one call of torch's kernel, so there is neither padding nor a mask, in any precision and with
torch's own dropout; on a GPU in 16 bits without dropout it is one varlen_attn for the row. Where samples begin comes
through the model's keyword arguments, as in model/attention.py; a row without them is one sample. The order in which
lengths are computed follows from the lengths alone.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from sft_dist.errors import ConfigError
from sft_dist.model import varlen

NAME = "sft_dist_both_ways"  # within transformers; no "flash" in it, which it takes for its own
# What layers may ask for under these names is not computed here.
_UNKNOWN = ("sliding_window", "softcap", "s_aux", "position_bias", "segment_parents")


def attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, T, D]
    key: Tensor,  # [1, H, T, D]
    value: Tensor,  # [1, H, T, D]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    host_cu_seqlens: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, T, H, D], every token attending to all tokens of its own sample; no weights are returned.

    Raises ConfigError for what a layer asks for and this does not compute.
    """
    unmet = [name for name in _UNKNOWN if options.get(name) is not None]
    if attention_mask is not None:
        unmet.append("attention_mask")
    if getattr(module, "is_causal", False) or options.get("is_causal"):
        unmet.append("is_causal=True")
    if unmet:
        raise ConfigError(f"model.path: its layers ask for {unmet[0]}, so samples of a pack could not be told apart")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    is_row = host_cu_seqlens is not None and options.get("cu_seqlens") is not None
    if is_row and not dropout and query.is_cuda and query.dtype in varlen.HALF and query.shape[-1] % 8 == 0:
        return _varlen(query, key, value, options["cu_seqlens"], options["max_seqlen"], scale), None
    lengths = (query.shape[2],) if host_cu_seqlens is None else tuple(host_cu_seqlens.diff().tolist())
    return _by_length(query, key, value, lengths, dropout, scale), None


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (q, k, v))
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, -1))
    result: Tensor = out[None]
    return result


def _by_length(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], dropout: float, scale: float
) -> Tensor:
    if len(set(lengths)) == 1:
        return _alike(query, key, value, lengths[0], dropout, scale)
    order, inverse = _sorted_rows(lengths, query.device)
    q, k, v = (tensor.index_select(2, order) for tensor in (query, key, value))
    parts = [
        _alike(q[:, :, first:end], k[:, :, first:end], v[:, :, first:end], length, dropout, scale)
        for length, first, end in _runs(lengths)
    ]
    return torch.cat(parts, 1).index_select(1, inverse)


def _alike(q: Tensor, k: Tensor, v: Tensor, length: int, dropout: float, scale: float) -> Tensor:
    """[1, H, m·l, D] of m samples of l tokens -> [1, m·l, H, D]."""
    _, heads, num_tokens, width = q.shape
    q, k, v = (x[0].view(heads, -1, length, x.shape[-1]).transpose(0, 1) for x in (q, k, v))  # [m, H, l, D]
    out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return out.transpose(1, 2).reshape(1, num_tokens, heads, width)


def _runs(lengths: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(length, first token, end) of all samples of each length, in the row sorted by length."""
    first = 0
    for length in sorted(set(lengths)):
        end = first + length * lengths.count(length)
        yield length, first, end
        first = end


@lru_cache(maxsize=4)  # every layer of a forward asks for the same
def _sorted_rows(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [T]: the row's tokens with samples sorted by length, and where each token went."""
    sizes = torch.tensor(lengths)
    of_token = sizes.repeat_interleave(sizes)
    order = of_token.argsort(stable=True)
    return order.to(device), order.argsort().to(device)
