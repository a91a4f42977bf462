"""Attention that never crosses a conversation of a packed row: which kernel a model gets, and the way to it.

The kernels are registered with transformers' attention interface, without a mask of that name, so that no dense mask
is built. Where conversations begin comes through the model's keyword arguments, computed once by the collator:

    cu_seqlens          int32 [n + 1] on the device of the row
    host_cu_seqlens     the same on the CPU
    max_seqlen          tokens of the longest conversation
    segment_parents     for trees: the earlier segment that each continues, or -1 (see model/segments.py)

A row without them is one conversation. What a layer asks for and a kernel cannot do is an error that names it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sft_dist.errors import ConfigError
from sft_dist.model import segments, varlen
from sft_dist.model.kernels import packed_attention

# Names within transformers. None may contain "flash": transformers takes such names for its own.
SPLIT = "sft_dist_split"
VARLEN = "sft_dist_varlen"
FLASH = "sft_dist_fa"
_REGISTERED = {"split": SPLIT, "varlen": VARLEN, "flash": FLASH}
_PACKED = tuple(_REGISTERED)

# Layer kinds that mix tokens through attention only, so that packed conversations can be isolated.
_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}

# Models whose layers hand their window to the attention function (others put it into the mask alone).
_HANDS_OVER_WINDOW = {
    "afmoe", "cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "ministral", "mistral", "mixtral", "olmo3",
    "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "starcoder2",
}  # fmt: skip
_HANDS_OVER_SOFTCAP = {"gemma2"}
# Models that make their mask without positions, by which transformers tells the conversations of a row apart.
_MASKS_THE_ROW = {"afmoe", "biogpt", "bloom", "falcon", "gpt_oss", "mpt", "opt", "xglm"}
# Models that call what is registered, though their layers do not hand down what a row is made of.
_DROPS_BOUNDS = {"nemotron", "stablelm"}


class Choice(NamedTuple):
    """An attention implementation as transformers knows it, and why it is not the fastest, if it is not."""

    name: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Demands:
    """What a model asks of attention, for conversations of at most some length. Options are named as in its config."""

    masked_only: str | None  # an option that reaches the mask alone, so that only masked kernels honour it
    has_window: bool
    softcap: str | None
    sinks: str | None
    head_dims: frozenset[int]  # of queries and keys, and of values
    own_code: frozenset[str] = frozenset()  # kernels that the classes of transformers for this model do not call
    masks_the_row: str | None = None  # why a mask would not keep the conversations of a row apart

    @classmethod
    def of(cls, model_config: Any, max_length: int) -> "Demands":
        text = model_config.get_text_config()
        window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
        has_window = window is not None and 0 < window < max_length
        chunk = getattr(text, "attention_chunk_size", None)
        softcap = "attn_logit_softcapping" if getattr(text, "attn_logit_softcapping", None) is not None else None
        masked_only = None
        if has_window and text.model_type not in _HANDS_OVER_WINDOW:
            masked_only = "sliding_window"
        elif chunk is not None and chunk < max_length:
            masked_only = "attention_chunk_size"
        elif softcap and text.model_type not in _HANDS_OVER_SOFTCAP:
            masked_only = softcap
        sinks = "sinks" if text.model_type == "gpt_oss" else None
        masks_the_row = None
        if text.model_type in _MASKS_THE_ROW:
            masks_the_row = f"packed rows ({text.model_type} makes its mask without their positions)"
        own_code = _not_called(model_config) | (set(_PACKED) if text.model_type in _DROPS_BOUNDS else set())
        return cls(masked_only, has_window, softcap, sinks, _head_dims(text), own_code, masks_the_row)

    def unmet_by(self, kernel: str, device_type: str, dtype: torch.dtype, flash_version: int | None) -> str | None:
        """What keeps a kernel from this model, in words; None: nothing."""
        own_code = (
            "the model's class, which does not call such a kernel as it must" if kernel in self.own_code else None
        )
        if kernel in _PACKED and (self.masked_only or own_code):
            return self.masked_only or own_code
        match kernel:
            case "varlen" | "flash":
                if device_type != "cuda":
                    return "a device other than a GPU"
                if kernel == "flash" and flash_version is None:
                    return "this environment: no flash-attn package can be imported"
                if dtype not in varlen.HALF:
                    return str(dtype).removeprefix("torch.")
                softcap = self.softcap if kernel == "varlen" else None
                return self.sinks or softcap or varlen.unsupported_head(kernel, flash_version, self.head_dims)
            case "sdpa":
                return self.sinks or self.softcap or self.masks_the_row or own_code
            case "eager":
                return self.masks_the_row
            case _:
                return None


def _not_called(model_config: Any) -> frozenset[str]:
    """By the flags of the class; of one that transformers does not know, nothing."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    kind = type(model_config)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None) or MODEL_MAPPING.get(kind, None)
    if not isinstance(model, type):
        return frozenset()
    sdpa = () if getattr(model, "_supports_sdpa", True) else ("sdpa",)
    return frozenset([*sdpa, *(() if getattr(model, "_supports_attention_backend", True) else _PACKED)])


def _head_dims(text_config: Any) -> frozenset[int]:
    if getattr(text_config, "is_heterogeneous", False):  # every layer has a configuration of its own (Gemma 4)
        return frozenset().union(*(_head_dims(layer) for layer in text_config.per_layer_config))
    heads = getattr(text_config, "num_attention_heads", None)
    size = getattr(text_config, "head_dim", None) or (text_config.hidden_size // heads if heads else 0)
    if getattr(text_config, "kv_lora_rank", None):  # multi-head latent attention
        size = text_config.qk_nope_head_dim + text_config.qk_rope_head_dim
    others = {getattr(text_config, name, None) for name in ("v_head_dim", "global_head_dim")}
    return frozenset({size, *(other for other in others if other)})


def choose_attention(
    model_config: Any,
    wanted: str,
    max_length: int,
    *,
    device_type: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Choice:
    """The attention of a model for `model.attention` = `wanted` and conversations of at most `max_length` tokens.

    Raises ConfigError for models that cannot be packed, and for a kernel that cannot honour what the model asks for.
    """
    text_config = model_config.get_text_config()
    kinds = set(getattr(text_config, "layer_types", None) or ()) - _ATTENTION_LAYERS
    if kinds or getattr(text_config, "is_encoder_decoder", False):
        what = ", ".join(sorted(kinds)) or "an encoder"
        raise ConfigError(
            f"model.path: {text_config.model_type} mixes tokens through {what}, which packed conversations "
            "would leak through; this model cannot be trained packed"
        )
    if getattr(text_config, "use_bidirectional_attention", False):
        raise ConfigError(
            f"model.path: {text_config.model_type} has use_bidirectional_attention: its tokens see what comes after "
            "them, so they cannot be trained to predict it"
        )
    package = varlen.newest_flash() if device_type == "cuda" or wanted == "flash" else None
    return decide(
        Demands.of(model_config, max_length), wanted, device_type, dtype, None if package is None else package.version
    )


def for_generation(model_config: Any) -> str:
    """One of transformers' own kernels, which know the cache of keys and values."""
    unmet = Demands.of(model_config, max_length=1).unmet_by("sdpa", "cpu", torch.float32, None)
    return "sdpa" if unmet is None else "eager"


def decide(demands: Demands, wanted: str, device_type: str, dtype: torch.dtype, flash_version: int | None) -> Choice:
    """The part of `choose_attention` that depends on nothing but its arguments."""
    if wanted != "auto":
        unmet = demands.unmet_by(wanted, device_type, dtype, flash_version)
        if unmet is not None:
            raise ConfigError(f"model.attention: {wanted} cannot honour {unmet}; set model.attention: auto")
        return Choice(_REGISTERED.get(wanted, wanted))
    # Torch's own kernel on a GPU is FlashAttention 2; only newer packages are faster, and only packages know softcaps.
    on_gpu = ["flash", "varlen"] if (flash_version or 0) > 2 else ["varlen", "flash"]
    order = [*(on_gpu if device_type == "cuda" else ()), "split", "sdpa", "eager"]
    unmet_first: str | None = None
    for kernel in order:
        unmet = demands.unmet_by(kernel, device_type, dtype, flash_version)
        if unmet is None:
            missed = (kernel not in on_gpu and device_type == "cuda") or kernel in ("sdpa", "eager")
            reason = f"attention: {kernel}, because {order[0]} cannot honour {unmet_first}" if missed else None
            return Choice(_REGISTERED.get(kernel, kernel), reason)
        unmet_first = unmet_first or unmet
    raise ConfigError(f"model.path: no kernel can honour {unmet_first}, so this model cannot be trained packed")


def can_share_prompts(implementation: str) -> bool:
    """Whether an attention implementation, as transformers names it, computes trees."""
    return implementation in _REGISTERED.values()


def split_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, kv_heads, T, head_dim]
    value: Tensor,  # [1, kv_heads, T, head_dim]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    host_cu_seqlens: Tensor | None = None,
    segment_parents: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each conversation of the row; returns [1, T, heads, head_dim] and no weights.

    `segment_parents` names for each segment the earlier one that it continues, or -1. Dropout is drawn by torch.
    """
    _refuse("split", module, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if host_cu_seqlens is not None and segment_parents is None and not dropout:
        out, _ = packed_attention(query, key, value, host_cu_seqlens, scale, sliding_window, softcap, s_aux)
        return out, None
    asked = segments.Options(scale, dropout, sliding_window, softcap, s_aux)
    return _by_segments(query, key, value, host_cu_seqlens, segment_parents, asked), None


@torch.compiler.disable  # it reads lengths on the host: in a graph they would make another one of every row
def _by_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    host_cu_seqlens: Tensor | None,
    parents: tuple[int, ...] | None,
    asked: segments.Options,
) -> Tensor:
    lengths = [query.shape[2]] if host_cu_seqlens is None else host_cu_seqlens.diff().tolist()
    return segments.attend(query, key, value, lengths, parents or (-1,) * len(lengths), asked)


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """`split_attention` by torch's varlen_attn on CUDA. Trees, dropout and rows without cu_seqlens go through split."""
    if _only_split(dropout, options):
        return split_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
    _refuse("varlen", module, options, "softcap", "s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    row = (options["cu_seqlens"], options["max_seqlen"])
    return varlen.varlen(query, key, value, *row, scale, options.get("sliding_window")), None


def flash_attention(package: varlen.FlashAttention) -> Callable[..., tuple[Tensor, None]]:
    """`varlen_attention` by a FlashAttention package, softcap included."""

    def attend(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        if _only_split(dropout, options):
            return split_attention(module, query, key, value, attention_mask, dropout, scaling, **options)
        _refuse("flash", module, options, "s_aux")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        row = (options["cu_seqlens"], options["max_seqlen"])
        asked = (options.get("sliding_window"), options.get("softcap"))
        return varlen.flash(package, query, key, value, *row, scale, *asked), None

    return attend


def _only_split(dropout: float, options: dict[str, Any]) -> bool:
    return bool(dropout) or options.get("cu_seqlens") is None or options.get("segment_parents") is not None


def _refuse(kernel: str, module: torch.nn.Module, options: dict[str, Any], *names: str) -> None:
    """Raise ConfigError for what a layer asks for under one of these names, and for all that no kernel here knows."""
    unmet = [name for name in (*names, "position_bias") if options.get(name) is not None]
    if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        unmet.append("is_causal=False")
    if unmet:
        raise ConfigError(f"model.attention: {kernel} cannot honour {unmet[0]}; set model.attention: eager")


def register() -> None:
    """Make the kernels known to transformers. Without mask entries of their names no dense mask is built."""
    from transformers import AttentionInterface

    AttentionInterface.register(SPLIT, split_attention)
    AttentionInterface.register(VARLEN, varlen_attention)
    package = varlen.newest_flash()
    if package is not None:
        AttentionInterface.register(FLASH, flash_attention(package))
