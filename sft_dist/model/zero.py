"""ZeRO-3 parameters as plain facts: whole values into shards and out of them, and shard files without pickle rights.

With model/engine.py the only module that imports DeepSpeed; what lies in shard files is model/resharding.py's.
"""

import math
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sft_dist.errors import StorageError

_ROWS_AT_ONCE = 4_096


def safe_load(path: str | Path) -> dict[str, Any]:
    """torch.load that constructs tensors and the three harmless classes DeepSpeed stores, and nothing else."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    try:
        with torch.serialization.safe_globals([ZeroStageEnum, LossScaler, DynamicLossScaler]):
            content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise StorageError(f"{path}: not a readable checkpoint shard: {first_line}") from error
    return content


def assign(
    model: nn.Module,
    values: Iterator[tuple[str, Tensor]],
    combine: Callable[[Tensor, Tensor], Tensor] | None = None,
    *,
    but: Set[str] = frozenset(),
) -> None:
    """Write whole values into a model's parameters, sharded or not; every rank copies only its own part.

    With `combine`, what is written is that of the part as it is and the part of the value, both flat. Raises
    StorageError unless names and shapes are exactly those of the model; the names `but` may have no value, and keep
    theirs.
    """
    parameters = dict(model.named_parameters())
    seen = set()
    for name, value in values:
        if name not in parameters:
            raise StorageError(f"the checkpoint has a parameter {name} that the model has not")
        parameter = parameters[name]
        if tuple(value.shape) != _whole_shape(parameter):
            raise StorageError(
                f"{name}: the checkpoint has shape {tuple(value.shape)}, the model {_whole_shape(parameter)}; "
                "model.path and model.control_tokens must be those of the run that wrote it"
            )
        with torch.no_grad():
            write(parameter, value, combine or (lambda old, new: new))
        seen.add(name)
    if missing := sorted(set(parameters) - seen - but):
        raise StorageError(f"the checkpoint lacks {len(missing)} parameter(s), first {missing[0]}")


def clear_padding(model: nn.Module) -> None:
    """Zero what fills the last ranks' shards up to the size of the others, which DeepSpeed leaves as memory has it.

    Zeros stay zeros in every step, so that equal states are equal byte for byte.
    """
    import torch.distributed as dist

    for parameter in model.parameters():
        if hasattr(parameter, "ds_tensor"):
            shard = parameter.ds_tensor
            shard.view(-1)[max(numel(parameter) - dist.get_rank() * shard.numel(), 0) :].zero_()


def release(model: nn.Module) -> None:
    """Let go of all weights of a model that is no longer used: DeepSpeed keeps references to its parameters."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


def extend_rows(
    model: nn.Module, parameter: nn.Parameter, num_rows: int, *, new: Sequence[int], mean_of: Sequence[int]
) -> None:
    """Put a parameter of num_rows rows in the place of `parameter` [V, ...], wherever the model uses it.

    Old rows keep their bits, others are those of `with_rows`. The new parameter is sharded if the old one was. A
    collective under ZeRO-3.
    """
    with gathered(parameter):
        value = with_rows(parameter.detach(), num_rows, new=new, mean_of=mean_of)
    extended = nn.Parameter(value, requires_grad=parameter.requires_grad)
    if hasattr(parameter, "convert_to_zero_parameters"):
        parameter.convert_to_zero_parameters([extended])  # as DeepSpeed itself does with parameters that come late
    for module in model.modules():
        for name, own in module.named_parameters(recurse=False, remove_duplicate=False):
            if own is parameter:
                module.register_parameter(name, extended)


def with_rows(old: Tensor, num_rows: int, *, new: Sequence[int], mean_of: Sequence[int]) -> Tensor:
    """`old` [V, ...] with num_rows rows; those of `new`, and all from V on, are the mean of the rows `mean_of`."""
    chosen = torch.tensor([row for row in mean_of if row < len(old)], device=old.device)
    # Summed in float64, a few rows at a time: the mean is rounded once and costs no copy of the whole.
    total = torch.stack([old[rows].double().sum(0) for rows in chosen.split(_ROWS_AT_ONCE)]).sum(0)
    value = old.new_empty(num_rows, *old.shape[1:])
    value[: len(old)] = old
    value[[*new, *range(len(old), num_rows)]] = (total / len(chosen)).to(value)
    return value


def shard_new(model: nn.Module) -> None:
    """Shard the parameters that came to a sharded model after it was loaded. A collective under ZeRO-3."""
    parameters = list(model.parameters())
    sharded: Any = next((parameter for parameter in parameters if hasattr(parameter, "ds_tensor")), None)
    if sharded is not None:
        new = [parameter for parameter in parameters if not hasattr(parameter, "ds_tensor")]
        sharded.convert_to_zero_parameters(new)  # as DeepSpeed itself does with parameters that come late


def gathered(parameter: nn.Parameter) -> AbstractContextManager[None]:
    """The whole parameter, for reading, on every rank. A collective under ZeRO-3."""
    if not hasattr(parameter, "ds_tensor"):
        return nullcontext()
    import deepspeed

    context: AbstractContextManager[None] = deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)
    return context


def numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter, sharded or not."""
    return math.prod(_whole_shape(parameter))


def is_vector(parameter: nn.Parameter) -> bool:
    """Norm weights and biases: what weight decay leaves alone."""
    return len(_whole_shape(parameter)) < 2


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def write(
    parameter: nn.Parameter, value: Tensor, combine: Callable[[Tensor, Tensor], Tensor] = lambda _, new: new
) -> None:
    """Put a whole value into a parameter, sharded or not; every rank copies only its own part.

    With `combine`, what is written is that of the part as it is and the part of the value, both flat.
    """
    flat = value.reshape(-1)
    if not hasattr(parameter, "ds_tensor"):
        parameter.copy_(combine(parameter.reshape(-1), flat.to(parameter.device)).view(parameter.shape))
        return
    import torch.distributed as dist

    shard = parameter.ds_tensor.view(-1)
    first = dist.get_rank() * shard.numel()
    mine = flat[first : first + shard.numel()].to(shard.device)
    shard[: mine.numel()].copy_(combine(shard[: mine.numel()], mine))
    shard[mine.numel() :].zero_()
