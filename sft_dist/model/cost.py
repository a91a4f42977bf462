"""What a device can compute in a second: by its maker's data sheet, or measured. What a model costs is data/cost.py."""

import re
import time
from dataclasses import dataclass

import torch


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
_MEASURE_S = 0.5
_LEAST_ROUNDS = 4  # of three products each


@dataclass(frozen=True, slots=True)
class Peak:
    """What utilisation is relative to."""

    flops_per_s: float  # of one device
    name: str  # how people are told


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
    """FLOP/s of products of square matrices, the best of a dozen or more of them in half a second or more."""
    best, size, rounds = 0.0, 4_096 if device.type == "cuda" else 256, 0
    started = time.perf_counter()
    # On a busy machine the first products say nothing: threads start, and others hold the cores.
    while rounds < _LEAST_ROUNDS or time.perf_counter() - started < _MEASURE_S:
        rounds += 1
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
        # Larger matrices come nearer to the limit, as long as one product takes a small part of the time.
        if taken < _MEASURE_S / 40 and size < 8_192:
            size *= 2
    return best


def rate_name(rate: float) -> str:
    """`989 TFLOP/s`, `61 GFLOP/s`"""
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate >= 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
