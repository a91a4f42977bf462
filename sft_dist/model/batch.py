"""Samples to one flat row of tensors, targets shifted once (here and nowhere else).

Position t of the row predicts targets[t]; the last position of a sample predicts nothing, so no target crosses a
sample. There is no padding: `cu_seqlens` and position ids that restart at 0 say where each sample begins.
`collate_trees` lays out prompts with several answers each, so that a prompt is computed once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sft_dist.data.sample import Int32
from sft_dist.data.selection import Example

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of n samples in one row."""

    input_ids: Tensor  # int64 [1, T]
    position_ids: Tensor  # int64 [1, T], restarts at 0 in every sample
    targets: Tensor  # int64 [1, T], the token after each position, or IGNORE
    turn_ids: Tensor  # int64 [1, T], slot of the predicted token in `turns`, or -1
    weights: Tensor  # float32 [1, T], weight of the predicted token, 0 where there is no target
    target_rows: Tensor  # int64 [num_targets], the positions that have a target, in order
    cu_seqlens: Tensor  # int32 [n + 1]
    host_cu_seqlens: Tensor  # the same, and never moved: kernels on the host read it without waiting for the device
    lengths: tuple[int, ...]  # [n], the same on the host
    turns: tuple[tuple[int, int], ...]  # (number of the example in the batch, message number) of each turn slot
    largest_id: int  # of input_ids and targets, known to the host
    parents: tuple[int, ...] | None = None  # [n] the sample that each continues, or -1; None: none continues another
    labels: Tensor | None = None  # float64 [m, width], what a head is to say of samples (data/labels.py); None: m is 0
    label_weights: Tensor | None = None  # float32 [m]
    label_rows: Tensor | None = None  # int64 [m], the samples that have a label, in order
    token_types: Tensor | None = None  # int64 [1, T], 1 in the second text of a pair
    top_ids: Tensor | None = None  # int32 [num_targets, k], what θ̂ found likeliest (data/top_logprobs.py)
    top_logprobs: Tensor | None = None  # float32 [num_targets, k + 1]

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    @property
    def num_targets(self) -> int:
        return len(self.target_rows)

    def to(self, device: torch.device) -> "Batch":
        """On another device; from pinned memory the host does not wait for the copies."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """In page-locked memory of the host, from which a GPU reads by itself."""
        return self._map(Tensor.pin_memory)

    def tensors(self) -> dict[str, Tensor]:
        """All that move: what is named host_… stays on the host."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if not field.name.startswith("host_")}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        moved: dict[str, Any] = {name: move(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class Tree:
    """A prompt and outputs that each follow it; neither is empty."""

    prompt: Int32  # [P]
    outputs: tuple[Int32, ...]  # [n] each

    @property
    def num_tokens(self) -> int:
        """Tokens of its row. Several outputs each repeat the last token of the prompt: its logits predict them."""
        return len(self.prompt) - 1 + sum(map(len, self.outputs))


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end. No example at all gives two tokens without a target: a forward that trains nothing."""
    if not examples:
        return _empty()
    ids, targets, turn_ids, positions, weights = [], [], [], [], []
    turns: list[tuple[int, int]] = []
    for number, example in enumerate(examples):
        sample = example.sample
        predicted = np.append(example.turns[1:], -1)
        following = np.append(sample.ids[1:], 0)
        owned = [int(message) for message in np.unique(predicted[predicted >= 0])]
        slot_of = {message: len(turns) + slot for slot, message in enumerate(owned)}
        turns += [(number, message) for message in owned]
        ids.append(sample.ids)
        targets.append(np.where(predicted >= 0, following, IGNORE))
        turn_ids.append(np.array([slot_of.get(int(message), -1) for message in predicted]))
        positions.append(np.arange(len(sample.ids)))
        weights.append(np.append(example.weights[1:], np.float32(0)))
    lengths = tuple(len(example.sample.ids) for example in examples)
    cu_seqlens = _cu_seqlens(lengths)
    row = _row(targets)
    labelled = [number for number, example in enumerate(examples) if example.target is not None]
    is_in_place = bool(labelled) and examples[labelled[0]].label_weight is None
    return Batch(
        input_ids=_row(ids),
        position_ids=_row(positions),
        targets=row,
        turn_ids=_row(turn_ids),
        weights=torch.from_numpy(np.concatenate(weights))[None],
        target_rows=_target_rows(row),
        cu_seqlens=cu_seqlens,
        host_cu_seqlens=cu_seqlens,
        lengths=lengths,
        turns=tuple(turns),
        largest_id=max(int(part.max()) for part in ids),
        labels=_labels(examples),
        label_weights=torch.tensor([_label_weight(examples[n]) for n in labelled]) if labelled else None,
        label_rows=torch.tensor(labelled) if labelled else None,
        token_types=_row([_token_types(e) for e in examples]) if is_in_place else None,
        top_ids=_joined([e.top.ids for e in examples if e.top is not None]),
        top_logprobs=_joined([e.top.logprobs for e in examples if e.top is not None]),
    )


def collate_trees(trees: Sequence[Tree]) -> Batch:
    """Lay trees end to end: the prompt without its last token, then for each output that token and the output.

    Every output is a turn slot (number of the tree, number of the output). A tree with one output is one plain sample.
    """
    if not trees:
        return _empty()
    ids, targets, turn_ids, positions = [], [], [], []
    lengths: list[int] = []
    parents: list[int] = []
    turns: list[tuple[int, int]] = []

    def add(segment: Int32, first_position: int, parent: int) -> None:
        ids.append(segment)
        positions.append(np.arange(first_position, first_position + len(segment)))
        targets.append(np.full(len(segment), IGNORE))
        turn_ids.append(np.full(len(segment), -1))
        lengths.append(len(segment))
        parents.append(parent)

    for number, tree in enumerate(trees):
        trunk, last = tree.prompt[:-1], tree.prompt[-1:]
        is_shared = len(tree.outputs) > 1 and len(trunk) > 0
        root = len(lengths) if is_shared else -1
        if is_shared:
            add(trunk, 0, -1)
        for branch, output in enumerate(tree.outputs):
            before = last if is_shared else tree.prompt
            # The last token of an output predicts nothing.
            add(np.concatenate([before, output[:-1]]), len(tree.prompt) - len(before), root)
            targets[-1][len(before) - 1 :] = output
            turn_ids[-1][len(before) - 1 :] = len(turns)
            turns.append((number, branch))
    row = _row(targets)
    cu_seqlens = _cu_seqlens(lengths)
    return Batch(
        input_ids=_row(ids),
        position_ids=_row(positions),
        targets=row,
        turn_ids=_row(turn_ids),
        weights=(row != IGNORE).float(),
        target_rows=_target_rows(row),
        cu_seqlens=cu_seqlens,
        host_cu_seqlens=cu_seqlens,
        lengths=tuple(lengths),
        turns=tuple(turns),
        largest_id=max(int(row.max()), *(int(part.max()) for part in ids)),
        parents=tuple(parents) if max(parents) >= 0 else None,
    )


def _labels(examples: Sequence[Example]) -> Tensor | None:
    targets = [example.target for example in examples if example.target is not None]
    return torch.from_numpy(np.stack(targets)) if targets else None


def _label_weight(example: Example) -> float:
    return float(example.weights[0]) if example.label_weight is None else example.label_weight


def _joined(parts: Sequence[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.concatenate(parts)) if parts else None


def _token_types(example: Example) -> Int32:
    types = np.zeros(len(example.sample.ids), np.int32)
    for span in example.sample.spans:
        types[span.start : span.end] = span.message
    return types


def _row(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def _cu_seqlens(lengths: Sequence[int]) -> Tensor:
    """Where each sample begins, and the end of the row: int32 [n + 1]."""
    return torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)


def _target_rows(targets: Tensor) -> Tensor:
    """Found here, on the host: on a GPU the host would wait for their number."""
    return (targets[0] != IGNORE).nonzero()[:, 0]


def _empty() -> Batch:
    # Two tokens, not one: torch.compile makes a graph of its own for what has size 1.
    cu_seqlens = _cu_seqlens([2])
    return Batch(
        input_ids=torch.zeros(1, 2, dtype=torch.int64),
        position_ids=torch.arange(2)[None],
        targets=torch.full((1, 2), IGNORE),
        turn_ids=torch.full((1, 2), -1),
        weights=torch.zeros(1, 2),
        target_rows=torch.zeros(0, dtype=torch.int64),
        cu_seqlens=cu_seqlens,
        host_cu_seqlens=cu_seqlens,
        lengths=(2,),
        turns=(),
        largest_id=0,
    )
