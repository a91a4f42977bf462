"""The shards of a ZeRO-3 checkpoint, of any number of ranks: whole parameters, and the state of any other world.

Each of W ranks holds ceil(numel / W) elements of every parameter (Rajbhandari et al., "ZeRO", 2020, section 5.3), one
after the other in the order of `param_shapes`, in one flat tensor for each of the optimizer's sub-groups: master
weights, and beside them AdamW's moments in the same order. So what a rank of another world needs of a parameter is one
range of elements of a few files: it is copied from them where it lies, memory-mapped, without a conversion on disk and
without a whole parameter in memory. Frozen parameters lie in the model files, cut the same way.
"""

import math
from collections.abc import Iterator, Sequence, Set
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sft_dist.errors import ConfigError, StorageError
from sft_dist.model import zero

Kind = Literal["weight", "exp_avg", "exp_avg_sq"]
_MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")
_NAMED = 5


class Shards:
    """Every value of a checkpoint by the name of its parameter. Raises StorageError for files that do not fit together.

    Files are opened when something in them is asked for; those of rank 0 always, for names and shapes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model_files = _by_rank(folder, "zero_pp_rank_*_mp_rank_00_model_states.pt")
        self._optim_files = _by_rank(folder, "*zero_pp_rank_*_mp_rank_00_optim_states.pt")
        if not self._model_files or len(self._model_files) != len(self._optim_files):
            raise StorageError(
                f"{folder}: {len(self._model_files)} model shards and {len(self._optim_files)} optimizer shards"
            )
        self._model_state, self._optim_state = cache(self._read_model_state), cache(self._read_optim_state)
        head = self._model_state(0)
        self._sub_groups: list[dict[str, int]] = []  # of each: parameter -> where it begins in the flat tensor
        self.shapes: dict[str, tuple[int, ...]] = {}  # of trained parameters
        self._sub_group_of: dict[str, int] = {}
        self._flat_numel: list[int] = []
        for number, shapes in enumerate(head["param_shapes"]):
            begins, begin = {}, 0
            for name, shape in shapes.items():
                begins[name], begin = begin, begin + self._per_rank(math.prod(shape))
                self.shapes[name], self._sub_group_of[name] = tuple(shape), number
            self._sub_groups.append(begins)
            self._flat_numel.append(begin)
        self.frozen_shapes = {name: tuple(s) for name, s in (head.get("frozen_param_shapes") or {}).items()}
        self.buffers: dict[str, Tensor] = {name: head["module"][name] for name in head["buffer_names"]}
        self.counters = {name: int(head[name]) for name in ("global_steps", "global_samples", "skipped_steps")}

    @property
    def world_size(self) -> int:
        """How many ranks wrote the checkpoint."""
        return len(self._optim_files)

    @property
    def all_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of trained and frozen parameters."""
        return self.shapes | self.frozen_shapes

    def whole(self, name: str) -> Tensor:
        """A parameter in one piece, in the precision of its master weights; of a frozen one in that of the model."""
        shape = self.all_shapes[name]
        value = torch.empty(math.prod(shape), dtype=self._flat(0, name, "weight").dtype)
        self.copy(name, "weight", value, start=0)
        return value.view(shape)

    def copy(self, name: str, kind: Kind, into: Tensor, *, start: int) -> None:
        """Fill the flat tensor `into` with the elements of a parameter from `start` on, and with 0 beyond its end."""
        numel = math.prod(self.all_shapes[name])
        per_rank = self._per_rank(numel)
        end = min(start + into.numel(), numel)
        at = start
        while at < end:
            rank, offset = divmod(at, per_rank)
            piece = self._flat(rank, name, kind)[offset : offset + end - at]
            into[at - start : at - start + piece.numel()].copy_(piece)
            at += piece.numel()
        into[at - start :].zero_()

    @property
    def adam_step(self) -> float | None:
        """How many steps AdamW has taken; None before the first one."""
        return self._step_of(self._optim_state(0))

    def groups(self) -> list[frozenset[str]]:
        """The names of each of the optimizer's parameter groups."""
        of_group = (group["params"] for group in self._optim_state(0)["param_groups"])
        return [frozenset(name for i in members for name in self._sub_groups[i]) for members in of_group]

    def _per_rank(self, numel: int) -> int:
        return -(-numel // self.world_size)

    def _flat(self, rank: int, name: str, kind: Kind) -> Tensor:
        """What a rank holds of a parameter, flat."""
        per_rank = self._per_rank(math.prod(self.all_shapes[name]))
        if name in self.frozen_shapes:
            fragment: Tensor = self._model_state(rank)["frozen_param_fragments"][name]
            return fragment.reshape(-1)[:per_rank]
        number = self._sub_group_of[name]
        state = self._optim_state(rank)
        flat: Tensor = (
            state["fp32_flat_groups"][number] if kind == "weight" else state["optimizer_state_dict"][number][kind]
        )
        begin = self._sub_groups[number][name]
        return flat[begin : begin + per_rank]

    def _read_model_state(self, rank: int) -> dict[str, Any]:
        state = zero.safe_load(self._model_files[rank])
        self._expect(state, self._model_files[rank], "param_shapes", "module", "buffer_names", "global_steps")
        return state

    def _read_optim_state(self, rank: int) -> dict[str, Any]:
        """A rank's master weights, the states of AdamW by sub-group, and its parameter groups."""
        path = self._optim_files[rank]
        outer = zero.safe_load(path)
        self._expect(outer, path, "optimizer_state_dict")
        state = outer["optimizer_state_dict"]
        self._expect(state, path, "fp32_flat_groups", "optimizer_state_dict", "partition_count")
        inner = state["optimizer_state_dict"]
        self._expect(inner, path, "state", "param_groups")
        if state["partition_count"] != self.world_size:
            raise StorageError(
                f"{path}: a shard of {state['partition_count']} ranks, in a folder with those of {self.world_size}"
            )
        sizes = [flat.numel() for flat in state["fp32_flat_groups"]]
        moments = [[s[kind].numel() for kind in _MOMENTS] for _, s in sorted(inner["state"].items())]
        if sizes != self._flat_numel or (moments and moments != [[size, size] for size in sizes]):
            raise StorageError(f"{path}: its sizes are not those that {self._model_files[0].name} tells")
        found = {
            "fp32_flat_groups": state["fp32_flat_groups"],
            "optimizer_state_dict": inner["state"],
            "param_groups": inner["param_groups"],
        }
        if rank and self._step_of(found) != self.adam_step:
            raise StorageError(f"{path}: of step {self._step_of(found)}, beside shards of step {self.adam_step}")
        return found

    def _step_of(self, optim_state: dict[str, Any]) -> float | None:
        steps = {float(state["step"]) for state in optim_state["optimizer_state_dict"].values()}
        if len(steps) > 1:
            raise StorageError(f"{self.folder}: AdamW's steps differ within a shard: {sorted(steps)}")
        return steps.pop() if steps else None

    @staticmethod
    def _expect(state: dict[str, Any], path: Path, *keys: str) -> None:
        if missing := [key for key in keys if key not in state]:
            raise ConfigError(
                f"{path}: has no {missing[0]}: a layout that is not known here (DeepSpeed {state.get('ds_version')})"
            )


def whole_parameters(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every parameter of a checkpoint, one at a time: the trained ones, then the frozen ones."""
    shards = Shards(folder)
    for name in shards.all_shapes:
        yield name, shards.whole(name)


def stored_numel(folder: Path) -> dict[str, int]:
    """Elements of every parameter of a checkpoint, by name, without reading any."""
    return {name: math.prod(shape) for name, shape in Shards(folder).all_shapes.items()}


def load(engine: Any, folder: Path, *, rank: int, but: Set[str] = frozenset()) -> None:
    """Give DeepSpeed's `engine` the state in `folder`: weights, moments, steps, buffers, counters.

    It may have trained; gradients it has not stepped with are to be cleared before. Hyper-parameters of the groups stay
    those of the run file; frozen parameters of the names `but` keep their values where the checkpoint has none. Raises
    ConfigError where the model or its parameter groups are others, StorageError where the files do not fit together. A
    collective where parameters are persistent.
    """
    shards = Shards(folder)
    optimizer = engine.optimizer
    _check_names(shards, engine, but)
    step = shards.adam_step
    optimizer.checkpoint_event_prologue()  # no parameter is gathered while its shard changes
    states = {}
    with torch.no_grad():
        for number, (parameters, master) in enumerate(
            zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
        ):
            names = [engine.param_names[parameter] for parameter in parameters]
            sizes = [parameter.partition_numel() for parameter in parameters]
            _fill(master, shards, "weight", names, sizes, rank)
            if step is not None:
                states[number] = {"step": torch.tensor(step)}
                for kind in _MOMENTS:
                    states[number][kind] = torch.empty_like(master, requires_grad=False)
                    _fill(states[number][kind], shards, kind, names, sizes, rank)
            optimizer._reassign_or_swap_out_partitioned_parameters(number)  # master weights -> weights
        for name, parameter in engine.module.named_parameters():
            if name in shards.frozen_shapes:
                fragment = parameter.ds_tensor.view(-1)
                shards.copy(name, "weight", fragment, start=rank * fragment.numel())
        for name, buffer in engine.module.named_buffers():
            if name in shards.buffers:
                buffer.copy_(shards.buffers[name])
    _load_states(optimizer, states)
    for name, count in shards.counters.items():
        setattr(engine, name, count)
    optimizer.checkpoint_event_epilogue()


def _fill(flat: Tensor, shards: Shards, kind: Kind, names: Sequence[str], sizes: Sequence[int], rank: int) -> None:
    """This rank's part of every parameter of a sub-group, one after the other."""
    for name, part in zip(names, flat.split(list(sizes)), strict=True):
        shards.copy(name, kind, part, start=rank * part.numel())


def _load_states(optimizer: Any, states: dict[int, dict[str, Tensor]]) -> None:
    """Through torch, which puts the steps where the optimizer's kind wants them; one tensor for each sub-group."""
    inner = optimizer.optimizer
    optimizer._set_fp32_optimizer_param_groups()
    inner.load_state_dict({"state": states, "param_groups": inner.state_dict()["param_groups"]})
    optimizer._clear_fp32_optimizer_param_groups()


def _check_names(shards: Shards, engine: Any, but: Set[str]) -> None:
    own = {name: tuple(p.ds_shape) for name, p in engine.module.named_parameters()}
    trained = {engine.param_names[p] for group in engine.optimizer.fp16_groups for p in group}
    stored = shards.all_shapes
    faults = [f"{name}: in the checkpoint, not in the model" for name in stored.keys() - own.keys()]
    faults += [f"{name}: in the model, not in the checkpoint" for name in own.keys() - stored.keys() - but]
    for name in own.keys() & stored.keys():
        if own[name] != stored[name]:
            faults.append(f"{name}: shape {stored[name]} in the checkpoint, {own[name]} in the model")
        elif (name in shards.shapes) != (name in trained):
            before, now = ("trained", "frozen") if name in shards.shapes else ("frozen", "trained")
            faults.append(f"{name}: {before} in the checkpoint, {now} now")
    if not faults:
        faults = _group_faults(shards.groups(), engine)
    if faults:
        more = f"\n  and {len(faults) - _NAMED:,} more" if len(faults) > _NAMED else ""
        lines = "".join(f"\n  {fault}" for fault in sorted(faults)[:_NAMED])
        raise ConfigError(f"{shards.folder}: holds other parameters than this run:{lines}{more}")


def _group_faults(before: Sequence[frozenset[str]], engine: Any) -> list[str]:
    """Parameters that share hyper-parameters with others than they did."""
    names: dict[int, set[str]] = {}
    for number, parameters in enumerate(engine.optimizer.fp16_groups):
        group = engine.optimizer.sub_group_to_group_id[number]
        names.setdefault(group, set()).update(engine.param_names[parameter] for parameter in parameters)
    faults = []
    for group, members in names.items():
        # The one most of them come from is theirs; the others have moved.
        old = max(range(len(before)), key=lambda number: len(before[number] & members))
        now = engine.optimizer.optimizer.param_groups[group]["name"]
        for name in members - before[old]:
            faults.append(f"{name}: in another parameter group than before, now that of {now}")
    return faults


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """Files in the order of their ranks, which are 0, 1, 2, ..."""
    found = {int(path.name.split("zero_pp_rank_")[1].split("_")[0]): path for path in folder.glob(pattern)}
    if sorted(found) != list(range(len(found))):
        raise StorageError(f"{folder}: has shards of the ranks {sorted(found)}")
    return [found[rank] for rank in range(len(found))]
