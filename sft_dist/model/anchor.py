"""θ̂ on a rank: its own part of the weights at step 0, the distance to it, and the pull toward it.

θ̂ is what training starts from: the files of model.path, or the checkpoint of model.init_from, with the rows of added
control tokens and of new parameters as they begin. A rank knows θ̂ where it holds θ, element by element of its ZeRO-3
shards, so nothing is ever gathered. Who steps toward θ̂ keeps its part in memory; who only measures reads it again from
the files each time, a chunk after the other, and keeps just what the files do not hold bit for bit under its name.
Nothing here imports DeepSpeed.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sft_dist.config import AnchorConfig
from sft_dist.model.places import Place
from sft_dist.model.stored import StoredTensors

_CHUNK = 2**22  # elements that are compared at a time
_SAMPLE = 2**16  # elements at the beginning, in the middle and at the end of a part, by which files are recognised

Reader = Callable[[Tensor, int], None]  # fills a flat tensor with the elements of a parameter from a number on


@dataclass(frozen=True, slots=True)
class Part:
    """What this rank holds of one parameter: its elements [first, first + numel), flat."""

    name: str
    first: int
    shard: Tensor  # of the weights that compute
    master: Tensor | None  # of the optimizer's own; None where the parameter is frozen

    @property
    def current(self) -> Tensor:
        return self.shard if self.master is None else self.master


def own_parts(engine: Any, *, rank: int, prefix: str) -> list[Part]:
    """This rank's part of every parameter of DeepSpeed's `engine`, without what fills the last ranks' shards up.

    `prefix` is taken off the names.
    """
    masters: dict[str, Tensor] = {}
    optimizer = engine.optimizer
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        sizes = [parameter.partition_numel() for parameter in parameters]
        for parameter, master in zip(parameters, flat.data.split(sizes), strict=True):
            masters[engine.param_names[parameter]] = master
    parts = []
    for name, parameter in engine.module.named_parameters():
        shard = parameter.ds_tensor.data.reshape(-1)
        own = min(max(parameter.ds_numel - rank * shard.numel(), 0), shard.numel())
        master = masters[name][:own] if name in masters else None
        parts.append(Part(name.removeprefix(prefix), rank * shard.numel(), shard[:own], master))
    return parts


class Pretrained:
    """This rank's part of θ̂, by the names of the parameters: kept in memory, or read when asked for."""

    def __init__(self, kept: dict[str, Tensor], read: dict[str, Reader]) -> None:
        self.kept = kept  # flat, own elements
        self._read = read

    @property
    def num_bytes(self) -> int:
        """Of memory, on this rank."""
        return sum(tensor.nbytes for tensor in self.kept.values())

    def chunks(self, part: Part) -> Iterator[tuple[Tensor, Tensor]]:
        """(θ, θ̂) float64 [n] of a part, a chunk at a time, on the device of θ. Raises StorageError."""
        current = part.current
        for begin in range(0, current.numel(), _CHUNK):
            now = current[begin : begin + _CHUNK]
            if part.name in self.kept:
                before = self.kept[part.name][begin : begin + now.numel()]
            else:
                before = torch.empty(now.numel(), dtype=part.shard.dtype)
                self._read[part.name](before, part.first + begin)
            yield now.double(), before.to(now.device).double()


def kept_in_memory(parts: Sequence[Part], config: AnchorConfig) -> Pretrained:
    """θ̂ from weights that have not been trained yet, copied; frozen ones stay what they are."""
    return Pretrained({part.name: _copy(part.shard, config) for part in parts if part.master is not None}, {})


def read_again(parts: Sequence[Part], readers: dict[str, Reader], config: AnchorConfig) -> Pretrained:
    """θ̂ from what was read to begin with; a copy only of what reads otherwise, or is not among the `readers`."""
    trained = [part for part in parts if part.master is not None]
    read = {part.name: readers[part.name] for part in trained if part.name in readers and _same(part, readers)}
    return Pretrained({part.name: _copy(part.shard, config) for part in trained if part.name not in read}, read)


def file_readers(files: StoredTensors, shapes: dict[str, tuple[int, ...]], base_prefix: str) -> dict[str, Reader]:
    """Readers for parameters of these shapes that the files name as the model does, or without its first name."""
    found: dict[str, Reader] = {}
    for name, shape in shapes.items():
        for key in (name, name.removeprefix(f"{base_prefix}."), f"{base_prefix}.{name}"):
            if files.shapes.get(key) == shape:
                found[name] = _reader(files, key)
                break
    return found


def _reader(files: StoredTensors, key: str) -> Reader:
    def read(into: Tensor, start: int) -> None:
        files.read(key, into, start=start)

    return read


def _same(part: Part, readers: dict[str, Reader]) -> bool:
    """Whether a sample of the part reads as it is. Training, and any other layout of the weights, changes all of it."""
    numel = part.shard.numel()
    for begin in {0, max(numel - _SAMPLE, 0) // 2, max(numel - _SAMPLE, 0)}:
        now = part.shard[begin : begin + _SAMPLE].cpu()
        before = torch.empty_like(now)
        readers[part.name](before, part.first + begin)
        if not torch.equal(now, before):
            return False
    return True


def _copy(shard: Tensor, config: AnchorConfig) -> Tensor:
    match config.dtype:
        case "float32":
            dtype = torch.float32
        case "bfloat16":
            dtype = torch.bfloat16
        case "auto":
            is_exact = shard.dtype is not torch.float32 or torch.equal(shard.bfloat16().float(), shard)
            dtype = torch.bfloat16 if is_exact else torch.float32
    copy = torch.empty(
        shard.shape,
        dtype=dtype,
        device="cpu" if config.device == "host" else shard.device,
        pin_memory=config.device == "host" and torch.cuda.is_available(),
    )
    return copy.copy_(shard)


def pull(engine: Any, pretrained: Pretrained, *, decay: float, exempt: Collection[str], prefix: str) -> None:
    """From now on θ ← θ − η·λ·(θ − θ̂) on the master weights, directly before each update of AdamW.

    η: learning rate of the parameter's group; λ: `decay`. With weight decay, AdamW's own θ ← θ − η·w·θ comes next and
    the step along the moments last: the order of Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019,
    algorithm 2, with L2-SP (Li, Grandvalet and Davoine, "Explicit Inductive Bias for Transfer Learning", 2018, eq. 2)
    in the place of the penalty. `exempt`: names of parameters that are left alone. A step that is not taken pulls at
    nothing.
    """
    optimizer = engine.optimizer
    targets: dict[int, list[tuple[int, Tensor]]] = {}  # id of a flat tensor -> (where a part begins, θ̂ of it)
    for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        begin, of_flat = 0, []
        for parameter in parameters:
            name = engine.param_names[parameter].removeprefix(prefix)
            if name not in exempt:
                of_flat.append((begin, pretrained.kept[name]))
            begin += parameter.partition_numel()
        targets[id(flat)] = of_flat

    def before_update(inner: torch.optim.Optimizer, *_: Any) -> None:
        for group in inner.param_groups:
            for flat in group["params"]:
                for begin, before in targets[id(flat)]:
                    master = flat.data[begin : begin + before.numel()]
                    master.lerp_(before.to(master, non_blocking=True), group["lr"] * decay)

    optimizer.optimizer.register_step_pre_hook(before_update)


def squares(
    parts: Sequence[Part], pretrained: Pretrained, places: dict[str, Place]
) -> dict[Place, tuple[float, float]]:
    """Σ (θ − θ̂)² and Σ θ̂² of this rank's elements, in float64, by place. Raises StorageError.

    A frozen parameter is where it was, and is not read.
    """
    sums: dict[Place, Tensor] = {}
    for part in parts:
        zeros = torch.zeros(2, dtype=torch.float64, device=part.current.device)
        total = sums.setdefault(places[part.name], zeros)
        if part.master is None:
            total[1] += sum(chunk.double().square().sum() for chunk in part.shard.split(_CHUNK))
            continue
        for now, before in pretrained.chunks(part):
            total[0] += (now - before).square().sum()
            total[1] += before.square().sum()
    return {place: (float(total[0]), float(total[1])) for place, total in sums.items()}
