"""Attention that never crosses a sample of a packed row.

`split` runs one causal kernel per sample, so its cost follows the sum of squares of the samples' lengths. It is
registered with transformers' attention interface and receives the samples' lengths through the model's keyword
arguments. Models whose attention needs more than that (windows, softcap, sinks) use transformers' masked kernels,
which isolate samples by the position ids that restart at 0.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft_dist.errors import ConfigError

SPLIT = "sft_dist_split"

# Layer kinds that mix tokens through attention only, so that packed samples can be isolated.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}


def split_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segment_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of the row; returns [1, T, heads, head_dim] and no weights."""
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise ConfigError(f"model.attention: split cannot honour {name}; set model.attention to sdpa or eager")
    lengths = list(segment_lengths) if segment_lengths is not None else [query.shape[2]]
    window = options.get("sliding_window")
    if window is not None and max(lengths) > window:
        raise ConfigError("model.attention: split cannot honour sliding_window; set model.attention to sdpa")
    # split, not slices: the backward of a slice allocates a zero tensor of the whole row for every sample.
    parts = [
        F.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


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
