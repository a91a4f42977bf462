"""What a model costs to train, in floating-point operations, and what a device can do of them in a second.

Formulas over plain numbers; the numbers are read off a model's modules, whose weights may be sharded or on no device.
"""

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


@dataclass(frozen=True, slots=True)
class Gpu:
    """Facts of a data sheet: of the fast, directly linked variant where a name has several."""

    name: str
    flops_per_s: float  # dense bfloat16 matrix products
    memory_gib: float  # as the driver reports it
    link_bytes_per_s: float  # to the other GPUs of a node, one direction, about what collectives reach of it


# The first whose name stands in the device's counts.
GPUS = (
    Gpu("GH200", 989e12, 95, 350e9),
    Gpu("H200", 989e12, 140, 350e9),
    Gpu("H100 PCIe", 756e12, 79, 25e9),
    Gpu("H100 NVL", 835e12, 93, 25e9),
    Gpu("H100", 989e12, 79, 350e9),
    Gpu("H800", 989e12, 79, 160e9),
    Gpu("H20", 148e12, 95, 350e9),
    Gpu("B300", 2250e12, 268, 700e9),
    Gpu("GB200", 2250e12, 184, 700e9),
    Gpu("B200", 2250e12, 178, 700e9),
    Gpu("A100", 312e12, 79, 230e9),
    Gpu("A800", 312e12, 79, 160e9),
    Gpu("A40", 149.7e12, 44, 20e9),
    Gpu("A10G", 70e12, 22, 20e9),
    Gpu("A10", 125e12, 22, 20e9),
    Gpu("L40S", 362e12, 44, 20e9),
    Gpu("L40", 181e12, 44, 20e9),
    Gpu("L4", 121e12, 22, 20e9),
    Gpu("RTX 4090", 165.2e12, 23, 20e9),
    Gpu("RTX 3090", 71e12, 23, 20e9),
)
_MEASURE_S = 0.2

Recomputation = Literal["none", "full"]


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of forward and backward by what they are proportional to."""

    linear_per_token: float  # 6 L P_l: two per weight forward, four backward; of experts, the chosen ones
    attention_per_pair: float  # 12 L q: per pair of a token and one that it attends to, q = heads x head size
    head_per_target: float  # 6 h V

    def flops(self, lengths: NDArray[np.integer], num_targets: int) -> float:
        """Model FLOPs of samples together: 6 L P_l T + 6 L q Σ l (l + 1) + 6 h V R, for R targets.

        The weights after Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1; attention as
        Chowdhery et al. (`palm_flops`), but over the causal half of each sample's square.
        """
        sizes = np.asarray(lengths, np.float64)
        pairs = float((sizes * (sizes + 1)).sum() / 2)
        return (
            self.linear_per_token * float(sizes.sum())
            + self.attention_per_pair * pairs
            + self.head_per_target * num_targets
        )

    def palm_flops(self, num_tokens: int, sequence_length: int) -> float:
        """(6 (L P_l + h V) + 12 L q S) T: the whole square of rows of S tokens, and the head at every position.

        Chowdhery et al., "PaLM: Scaling Language Modeling with Pathways", 2022, appendix B.
        """
        return (self.linear_per_token + self.head_per_target + self.attention_per_pair * sequence_length) * num_tokens

    def with_recomputation(self, recomputation: Recomputation) -> "CostModel":
        """FLOPs that the hardware runs with a fused attention kernel, which computes its scores anew in the backward.

        7 for 6 of attention; with every layer's forward run again 9 for 6, and 8 for 6 of the weights. Korthikanti et
        al., "Reducing Activation Recomputation in Large Transformer Models", 2022, section 6; Dao, "FlashAttention-2",
        2023, section 3.1.
        """
        linear, attention = {"none": (6, 7), "full": (8, 9)}[recomputation]
        return replace(
            self,
            linear_per_token=self.linear_per_token * linear / 6,
            attention_per_pair=self.attention_per_pair * attention / 6,
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
    num_rows, width = shape_of(causal_lm.get_output_embeddings().weight)
    return CostModel(
        linear_per_token=6.0 * sum(weights for layer in layers for weights in _weights_met(layer, config)),
        attention_per_pair=12.0 * len(layers) * heads * head_size,
        head_per_target=6.0 * num_rows * width,
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


def gpu_of_name(device_name: str) -> Gpu | None:
    """What its maker says of a GPU; None where it is not known here."""
    words = re.sub(r"[-_]", " ", device_name)
    return next((gpu for gpu in GPUS if re.search(rf"(?i)\b{gpu.name}\b", words)), None)


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The data sheet's rate of a known GPU in bfloat16, else the rate of matrix products measured now (under 1 s)."""
    if device.type == "cuda" and dtype is torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        known = gpu_of_name(name)
        if known is not None:
            return Peak(known.flops_per_s, f"{rate_name(known.flops_per_s)} ({name}, dense bfloat16)")
    rate = matrix_rate(device, dtype)
    return Peak(rate, f"the measured matrix rate, {rate_name(rate)} in {str(dtype).removeprefix('torch.')}")


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


def rate_name(rate: float) -> str:
    """`989 TFLOP/s`, `61 GFLOP/s`"""
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
