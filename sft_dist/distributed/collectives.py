"""The few collectives of a run, on CPU tensors and small objects. Every rank calls each one at the same line."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def all_sum(values: Sequence[float]) -> list[float]:
    """Sum over ranks, in float64."""
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(value) for value in total]


def all_max(values: Sequence[float]) -> list[float]:
    """Maximum over ranks, in float64: for decisions that one rank may ask for and all must follow."""
    highest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return [float(value) for value in highest]


def gather(value: T) -> list[T]:
    """The value of every rank, in rank order, on every rank. Values are pickled between our own processes only."""
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def from_main(value: T) -> T:
    """What rank 0 says, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def barrier() -> None:
    all_sum([0.0])
