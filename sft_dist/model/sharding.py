"""ZeRO-3 settings that follow from the model's shapes, the ranks and the memory at hand. Pure: numbers in, numbers out.

Sizes are in elements, as DeepSpeed counts them. What a DeepSpeed file says itself is never overridden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sft_dist.model import zero

# Gradients travel in pieces of at least this many elements: smaller ones cost latency rather than bandwidth.
_MIN_REDUCED = 2**24
# The optimizer works in tiles of about this many elements of a rank: each needs a gradient of 4 bytes an element.
_OPTIMIZER_TILE = 10**8
_FP32_BYTES = 4
_OPTIMIZER_BYTES = 12  # AdamW: master weight, first and second moment, all float32


@dataclass(frozen=True, slots=True)
class Shapes:
    """Elements of a model's parameters, in the parts that ZeRO-3 handles as one."""

    layers: tuple[int, ...]  # of each decoder layer
    total: int
    largest: int  # of the largest parameter
    largest_vector: int  # of the largest norm or bias, 0 where there is none


@dataclass(frozen=True, slots=True)
class Settings:
    """Values for zero_optimization, each with its reason."""

    values: dict[str, int]
    reasons: dict[str, str]
    kept: float  # share of the weights that stays gathered from forward to backward
    kept_bytes: int


def filled(tree: dict[str, Any], values: dict[str, int]) -> dict[str, Any]:
    """A DeepSpeed configuration with the values that it does not decide itself."""
    return tree | {"zero_optimization": values | tree["zero_optimization"]}


def shapes_of(causal_lm: nn.Module, layers: Sequence[nn.Module]) -> Shapes:
    """The shapes of a model, sharded or not, with these decoder layers."""
    parameters = list(causal_lm.parameters())
    return Shapes(
        tuple(sum(map(zero.numel, layer.parameters())) for layer in layers),
        total=sum(map(zero.numel, parameters)),
        largest=max(map(zero.numel, parameters)),
        largest_vector=max((zero.numel(p) for p in parameters if zero.is_vector(p)), default=0),
    )


def state_bytes(total: int, *, world_size: int, element_bytes: int) -> int:
    """Bytes of a rank's shards in training: weights, gradients accumulated in float32, AdamW in float32.

    Rajbhandari et al., "ZeRO", 2020, sections 3.1 and 5.3, with float32 gradients.
    """
    return -(-total * (element_bytes + _FP32_BYTES + _OPTIMIZER_BYTES) // world_size)


def memory_budget(device_bytes: int, shard_bytes: int) -> int:
    """Bytes that may go into speed: half of what the shards leave; the other half is for activations."""
    return max(device_bytes - shard_bytes, 0) // 2


def training_settings(
    shapes: Shapes, *, world_size: int, element_bytes: int, memory_budget_bytes: int | None
) -> Settings:
    """What DeepSpeed's constants should be for this model; without a budget (None) nothing stays gathered."""
    layer = max(shapes.layers, default=shapes.largest)
    outside = shapes.total - sum(shapes.layers)
    # At work at once: a layer, the next one on its way, one just used, and at the ends embeddings and head.
    working = min(outside + 3 * layer, shapes.total) if shapes.layers else shapes.total
    affordable = (memory_budget_bytes or 0) // element_bytes
    kept = shapes.total if affordable >= shapes.total else max(affordable - working, 0)
    share = kept / shapes.total
    if shapes.layers:
        persistence, why_persistence = 0, "a norm travels with its layer; a persistent one is gathered on its own"
    else:
        persistence, why_persistence = shapes.largest_vector, "norms and biases stay whole, matrices do not"
    held = f"{share:.0%} of the weights stay gathered from forward to backward"
    derived: list[tuple[str, int, str]] = [
        ("stage3_prefetch_bucket_size", layer, "one decoder layer ahead"),
        ("stage3_param_persistence_threshold", persistence, why_persistence),
        ("stage3_max_live_parameters", min(working + kept, shapes.total), held),
        ("stage3_max_reuse_distance", kept, held),
        (
            "reduce_bucket_size",
            min(max(layer, _MIN_REDUCED), shapes.total),
            "the gradient of one decoder layer, or of several small ones",
        ),
        (
            "sub_group_size",
            max(-(-shapes.largest // world_size), _OPTIMIZER_TILE),
            "the optimizer's float32 gradient exists for one tile at a time",
        ),
    ]
    return Settings(
        {name: value for name, value, _ in derived},
        {name: reason for name, _, reason in derived},
        share,
        kept * element_bytes,
    )


def decide(
    shapes: Shapes,
    *,
    world_size: int,
    element_bytes: int,
    device_bytes: int,
    num_micro_batches: int,
    reduce_once: bool | Literal["auto"],
) -> tuple[Settings, bool]:
    """Settings of a training run, and whether the gradient of its steps is reduced once.

    `device_bytes`: memory of one rank's device; `num_micro_batches`: of one rank in one step.
    """
    shards = state_bytes(shapes.total, world_size=world_size, element_bytes=element_bytes)
    budget = memory_budget(device_bytes, shards)
    settings = training_settings(shapes, world_size=world_size, element_bytes=element_bytes, memory_budget_bytes=budget)
    once = reduces_once(
        reduce_once,
        shapes,
        settings,
        num_micro_batches=num_micro_batches if world_size > 1 else 1,
        memory_budget_bytes=budget,
    )
    return settings, once


def inference_settings(shapes: Shapes, *, element_bytes: int, memory_budget_bytes: int | None) -> dict[str, int]:
    """For forwards alone: where memory allows, every weight is gathered once and stays."""
    layer = max(shapes.layers, default=shapes.largest)
    if shapes.total * element_bytes <= (memory_budget_bytes or 0):
        return {"stage3_param_persistence_threshold": shapes.largest, "stage3_prefetch_bucket_size": layer}
    return {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": layer}


def reduces_once(
    wanted: bool | Literal["auto"],
    shapes: Shapes,
    settings: Settings,
    *,
    num_micro_batches: int,
    memory_budget_bytes: int,
) -> bool:
    """Whether the gradient of a step is reduced once: where there is more than one, and it fits if asked to look."""
    if num_micro_batches < 2 or wanted != "auto":
        return num_micro_batches > 1 and wanted is True
    return settings.kept_bytes + _FP32_BYTES * shapes.total <= memory_budget_bytes


def in_short(layers: Sequence[nn.Module], used: dict[str, int], settings: Settings, reduce_once: bool) -> str:
    """One line for people; sizes in millions of elements."""
    sizes = ", ".join(f"{name.removeprefix('stage3_')} {value / 1e6:,.4g}M" for name, value in used.items())
    how_often = "once a step" if reduce_once else "with every micro-batch"
    return (
        f"{len(layers)} decoder layers gathered whole, {settings.kept:.0%} of the weights kept from forward to "
        f"backward, gradients reduced {how_often} ({sizes})"
    )
