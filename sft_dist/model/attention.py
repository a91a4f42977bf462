"""Attention that never crosses a sample of a packed row.

`split` runs one causal kernel per sample, so its cost follows the sum of squares of the samples' lengths. It is
registered with transformers' attention interface and receives the samples' lengths through the model's keyword
arguments. Models whose attention needs more than that (windows, softcap, sinks) use transformers' masked kernels,
which isolate samples by the position ids that restart at 0.

Segments of a row may also form trees: a segment with a parent continues it, so a prompt that several answers share is
computed once. It attends to all of its ancestors and, causally, to itself: what it would see in a row of its own.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_dist.errors import ConfigError

SPLIT = "sft_dist_split"

# Layer kinds that mix tokens through attention only, so that packed samples can be isolated.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

# Short siblings share one masked kernel; beyond this many tokens the mask would cost more than another kernel.
_SIBLING_TOKENS = 256


def split_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    segment_parents: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of the row; returns [1, T, heads, head_dim] and no weights.

    `segment_parents` names for each segment the earlier one that it continues, or -1.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigError(f"model.attention: split cannot honour {name}; set model.attention to sdpa or eager")
    lengths = segment_lengths if segment_lengths is not None else (query.shape[2],)
    parents = segment_parents if segment_parents is not None else (-1,) * len(lengths)
    window = options.get("sliding_window")
    if window is not None and max(_context_lengths(lengths, parents)) > window:
        raise ConfigError("model.attention: split cannot honour sliding_window; set model.attention to sdpa")
    # split, not slices: the backward of a slice allocates a zero tensor of the whole row for every sample.
    keys, values = key.split(lengths, 2), value.split(lengths, 2)
    groups = list(_sibling_groups(lengths, parents))
    queries = query.split([sum(lengths[first:end]) for first, end in groups], 2)
    parts = []
    for (first, end), q in zip(groups, queries, strict=True):
        seen = [*_ancestors(first, parents), *range(first, end)]
        mask = _tree_mask(lengths[first:end], sum(lengths[i] for i in seen), query.device) if len(seen) > 1 else None
        parts.append(
            F.scaled_dot_product_attention(
                q,
                keys[first] if mask is None else torch.cat([keys[i] for i in seen], 2),
                values[first] if mask is None else torch.cat([values[i] for i in seen], 2),
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _ancestors(segment: int, parents: Sequence[int]) -> list[int]:
    """The segments that a segment continues, from the root on."""
    chain: list[int] = []
    while (segment := parents[segment]) >= 0:
        chain.insert(0, segment)
    return chain


def _context_lengths(lengths: Sequence[int], parents: Sequence[int]) -> list[int]:
    """Tokens of each segment and of all that it continues."""
    return [length + sum(lengths[i] for i in _ancestors(n, parents)) for n, length in enumerate(lengths)]


def _sibling_groups(lengths: Sequence[int], parents: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges of segments that one kernel computes: short neighbours with the same parent, else each on its own."""
    first, num_tokens = 0, lengths[0]
    for segment in range(1, len(lengths)):
        is_sibling = parents[segment] >= 0 and parents[segment] == parents[first]
        if is_sibling and num_tokens + lengths[segment] <= _SIBLING_TOKENS:
            num_tokens += lengths[segment]
            continue
        yield first, segment
        first, num_tokens = segment, lengths[segment]
    yield first, len(lengths)


def _tree_mask(lengths: Sequence[int], num_keys: int, device: torch.device) -> Tensor:
    """bool [L, num_keys] for siblings of these lengths: all of the ancestors' keys, then causal within each sibling."""
    sibling = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(device)  # [L]
    own = (sibling[:, None] == sibling[None, :]).tril()
    return torch.cat([own.new_ones(len(sibling), num_keys - len(sibling)), own], 1)


def choose_attention(model_config: Any, wanted: str, max_length: int) -> str:
    """Name of the attention implementation for a model. Raises ConfigError for models that cannot be packed."""
    text_config = model_config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds or getattr(text_config, "is_encoder_decoder", False):
        what = ", ".join(sorted(kinds)) or "an encoder"
        raise ConfigError(
            f"model.path: {text_config.model_type} mixes tokens through {what}, which packed conversations "
            "would leak through; this model cannot be trained packed"
        )
    if wanted != "auto":
        return SPLIT if wanted == "split" else wanted
    window = getattr(text_config, "sliding_window", None) if getattr(text_config, "use_sliding_window", True) else None
    needs_mask = (
        (window is not None and window < max_length)
        or getattr(text_config, "attn_logit_softcapping", None) is not None
        or getattr(text_config, "attention_chunk_size", None) is not None
        or text_config.model_type == "gpt_oss"
    )
    if not needs_mask:
        return SPLIT
    return "eager" if getattr(text_config, "attn_logit_softcapping", None) is not None else "sdpa"


def register() -> None:
    """Make `split` known to transformers. Without a mask entry of that name no dense mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(SPLIT, split_attention)
