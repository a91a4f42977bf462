"""The few collectives of a run, on CPU tensors and small objects. Every rank calls each one at the same line."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sft_dist.errors import ClusterError, UserError

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


def on_main(action: Callable[[], T]) -> T:
    """What rank 0 finds out by `action`, or the error for people that it meets, on every rank."""
    answer: tuple[T | None, UserError | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            answer = (action(), None)
        except UserError as error:
            answer = (None, error)
    value, problem = from_main(answer)
    if problem is not None:
        raise problem
    return value  # type: ignore[return-value]


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise ClusterError, on every rank, where ranks have different values under some key; it is named."""
    every = gather(dict(facts))
    for rank, theirs in enumerate(every):
        keys = sorted(key for key in every[0].keys() | theirs.keys() if every[0].get(key) != theirs.get(key))
        if keys:
            seen = "\n".join(f"  {key}: {every[0].get(key)!r} there, {theirs.get(key)!r} here" for key in keys)
            raise ClusterError(
                f"rank {rank} is about to do something else than rank 0:\n{seen}\n"
                "  give all ranks the same command, run file and files, and change none of them meanwhile"
            )


def barrier() -> None:
    all_sum([0.0])
