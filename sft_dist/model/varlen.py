"""CUDA kernels for packed rows: torch's own varlen_attn, and the FlashAttention packages where they are installed.

Packages and versions name their arguments differently, so what a kernel is called with follows from the names that it
takes, by pure functions. Lengths are never read back from the device.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

_VARLEN_TAKES = frozenset(inspect.signature(varlen_attn).parameters)

# Newest first: (version, module that holds flash_attn_varlen_func).
_FLASH_MODULES = ((4, "flash_attn.cute"), (3, "flash_attn_interface"), (2, "flash_attn"))

# What these kernels compute in.
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Call:
    """Keyword arguments of a kernel, and whether keys and values must first be repeated for each query head."""

    keywords: dict[str, Any]
    repeat_heads: bool


@dataclass(frozen=True, slots=True)
class FlashAttention:
    """An installed FlashAttention package."""

    version: int
    function: Callable[..., Any]
    takes: frozenset[str]


def varlen_call(takes: frozenset[str], *, scale: float, window: int | None, is_grouped: bool) -> Call:
    """Arguments of torch's varlen_attn beside tensors and lengths, for the names that it takes.

    A window counts the keys that a query sees, itself included; the kernel counts those on its left. Up to 2.11 torch
    takes as many heads of keys as of queries, later with `enable_gqa` fewer.
    """
    keywords: dict[str, Any] = {"scale": scale, "window_size": (-1 if window is None else window - 1, 0)}
    if is_grouped and "enable_gqa" in takes:
        keywords["enable_gqa"] = True
    return Call(keywords, repeat_heads=is_grouped and "enable_gqa" not in takes)


def flash_keywords(
    takes: frozenset[str],
    *,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    """Arguments of a flash_attn_varlen_func beside the tensors. Without a window its own default stays."""
    keywords: dict[str, Any] = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "softmax_scale": scale,
        "causal": True,
    }
    if "max_seqlen_q" in takes:
        keywords |= {"max_seqlen_q": max_seqlen, "max_seqlen_k": max_seqlen}
    if window is not None:
        keywords["window_size"] = (window - 1, 0)
    if softcap is not None:
        keywords["softcap"] = softcap
    return keywords


@cache
def newest_flash() -> FlashAttention | None:
    """The newest FlashAttention that can be imported here."""
    for version, name in _FLASH_MODULES:
        try:
            function = importlib.import_module(name).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        return FlashAttention(version, function, frozenset(inspect.signature(function).parameters))
    return None


def varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, window: int | None
) -> Tensor:
    """[1, H, T, D], [1, K, T, D] in 16 bits, cu_seqlens int32 [n + 1] on the device -> [1, T, H, D]."""
    call = varlen_call(_VARLEN_TAKES, scale=scale, window=window, is_grouped=query.shape[1] != key.shape[1])
    if call.repeat_heads:
        sharing = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(sharing, 1), value.repeat_interleave(sharing, 1)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    # cu_seqlens twice is one and the same object: cuDNN is taken for it only then.
    out: Any = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **call.keywords)
    result: Tensor = out[None]
    return result


def flash(
    package: FlashAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """As `varlen`, by a FlashAttention package, which takes fewer heads of keys and softcaps as they are."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    answer = package.function(
        q,
        k,
        v,
        **flash_keywords(
            package.takes, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, scale=scale, window=window, softcap=softcap
        ),
    )
    out: Tensor = answer[0] if isinstance(answer, tuple) else answer  # versions 3 and 4 add the log normalisers
    return out[None]


def unsupported_head(kernel: str, flash_version: int | None, head_dims: frozenset[int]) -> str | None:
    """What of the head sizes (of queries, keys and values) a kernel cannot do, in words; None: nothing."""
    largest = 128 if kernel == "flash" and flash_version == 4 else 256
    if len(head_dims) > 1:
        return f"heads of several sizes ({', '.join(map(str, sorted(head_dims)))})"
    (size,) = head_dims
    if size % 8 or size > largest:
        return f"head_dim {size} (multiples of 8 up to {largest})"
    return None
