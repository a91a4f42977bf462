"""What a model costs to train, in floating-point operations, and what a device can do of them in a second.

Formulas over plain numbers; the numbers are read off a model's modules, whose weights may be sharded or on no device.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

# Dense bfloat16 matrix products of the maker's data sheet, FLOP/s; the first name that stands in the device's counts.
_PEAKS = (
    ("GH200", 989e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H800", 989e12),
    ("H20", 148e12),
    ("B300", 2250e12),
    ("B200", 2250e12),
    ("GB200", 2250e12),
    ("A100", 312e12),
    ("A800", 312e12),
    ("A40", 149.7e12),
    ("A10G", 70e12),
    ("A10", 125e12),
    ("L40S", 362e12),
    ("L40", 181e12),
    ("L4", 121e12),
    ("RTX 4090", 165.2e12),
    ("RTX 3090", 71e12),
)
_MEASURE_S = 0.2


@dataclass(frozen=True, slots=True)
class CostModel:
    """The numbers of a decoder that its operations follow from."""

    layer_weights: int  # L P_l: entries of the matrices that a token meets in all layers (of experts, the chosen ones)
    attention_width: int  # L q: heads x head size, summed over layers
    hidden_size: int  # h
    vocab_size: int  # V, rows of the head

    def model_flops(self, num_tokens: int, num_targets: int, lengths: NDArray[np.integer]) -> float:
        """Forward and backward of num_tokens tokens in samples of these lengths, without recomputation.

        6 L P_l T + 6 h V R + 6 L q Σ l (l + 1): two operations per weight and token forward, four backward; the head at
        target positions only; causal attention, half of the square. The weights after Kaplan et al., "Scaling Laws for
        Neural Language Models", 2020, section 2.1; the square after Chowdhery et al. (`palm_flops`), halved.
        """
        pairs = float((lengths.astype(np.float64) * (lengths + 1)).sum())
        return (
            6.0 * self.layer_weights * num_tokens
            + 6.0 * self.hidden_size * self.vocab_size * num_targets
            + 6.0 * self.attention_width * pairs
        )

    def palm_flops(self, num_tokens: int, row_length: int) -> float:
        """6 (L P_l + h V) T + 12 L q S T: the whole square of rows of S tokens, and the head at every position.

        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B.
        """
        weights = self.layer_weights + self.hidden_size * self.vocab_size
        return 6.0 * weights * num_tokens + 12.0 * self.attention_width * row_length * num_tokens

    def hardware_flops(
        self, num_tokens: int, num_targets: int, lengths: NDArray[np.integer], *, recomputes_layers: bool
    ) -> float:
        """What is computed: with the layers' forward once more in the backward pass, and attention's scores anew there.

        8 (6 without recomputation) L P_l T + 6 h V R + 9 (7) L q Σ l (l + 1). Korthikanti et al., "Reducing Activation
        Recomputation in Large Transformer Models", 2022, section 6; that a fused attention's backward takes 5 products
        where its forward takes 2: Dao, "FlashAttention-2", 2023, section 3.1.
        """
        pairs = float((lengths.astype(np.float64) * (lengths + 1)).sum())
        return (
            (8.0 if recomputes_layers else 6.0) * self.layer_weights * num_tokens
            + 6.0 * self.hidden_size * self.vocab_size * num_targets
            + (9.0 if recomputes_layers else 7.0) * self.attention_width * pairs
        )


@dataclass(frozen=True, slots=True)
class Peak:
    """What utilisation is relative to."""

    flops_per_s: float  # of one device
    name: str  # how people are told


def cost_model(causal_lm: Any) -> CostModel | None:
    """The numbers of a model of transformers, wherever its weights are (sharded, or on the meta device).

    None for a model without plain layers and heads.
    """
    config = causal_lm.config.get_text_config()
    layers = layers_of(causal_lm)
    heads = getattr(config, "num_attention_heads", None)
    if not layers or not isinstance(heads, int):
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return CostModel(
        layer_weights=sum(round(weights) for layer in layers for weights in _weights_met(layer, config)),
        attention_width=len(layers) * heads * head_size,
        hidden_size=config.hidden_size,
        vocab_size=shape_of(causal_lm.get_output_embeddings().weight)[0],
    )


def layers_of(causal_lm: Any) -> list[nn.Module]:
    """The decoder layers of a model: its longest list of modules."""
    lists = [module for module in causal_lm.base_model.modules() if isinstance(module, nn.ModuleList)]
    wanted = causal_lm.config.get_text_config().num_hidden_layers
    return next((list(items) for items in lists if len(items) == wanted), [])


def _weights_met(layer: nn.Module, config: Any) -> Iterator[float]:
    """Of every matrix of a layer the entries that one token is multiplied with."""
    num_experts = next(
        (n for key in ("num_local_experts", "num_experts", "n_routed_experts") if (n := getattr(config, key, None))), 1
    )
    share = (getattr(config, "num_experts_per_tok", None) or 1) / num_experts
    for name, parameter in layer.named_parameters():
        shape = shape_of(parameter)
        if len(shape) >= 2:
            numel = float(np.prod(shape, dtype=np.float64))
            yield numel * share if ".experts." in f".{name}." and num_experts > 1 else numel


def shape_of(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter, also where ZeRO-3 shards it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def peak_of_name(device_name: str) -> float | None:
    """Dense bfloat16 FLOP/s of a GPU by its maker's data sheet, None where it is not known."""
    normal = re.sub(r"[-_]", " ", device_name)
    return next((peak for name, peak in _PEAKS if re.search(rf"(?i)\b{name}\b", normal)), None)


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's rate of a known GPU in bfloat16, else the rate of matrix products measured now (under 1 s)."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = peak_of_name(name)
        if known is not None:
            return Peak(known, f"{known / 1e12:,.0f} TFLOP/s ({name}, dense bfloat16)")
    rate = matrix_rate(device, dtype)
    return Peak(rate, f"the measured matrix rate, {_flops(rate)} in {str(dtype).removeprefix('torch.')}")


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products of square matrices, the best of those that fit into a fifth of a second."""
    best, size = 0.0, 4_096 if device.type == "cuda" else 256
    started = time.perf_counter()
    while (now := time.perf_counter()) - started < _MEASURE_S:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(3):  # the first meets cold caches
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            left @ right
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            taken = time.perf_counter() - now
            best = max(best, 2.0 * size**3 / taken)
            if time.perf_counter() - started > _MEASURE_S:
                break
        # Larger matrices come nearer to the limit, as long as one product takes a small part of the time.
        if taken < _MEASURE_S / 40 and size < 8_192:
            size *= 2
    return best


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
