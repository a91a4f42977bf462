"""Samples to one flat row of tensors, targets shifted once (here and nowhere else).

Position t of the row predicts targets[t]; the last position of a sample predicts nothing, so no target crosses a
sample. There is no padding: `cu_seqlens` and position ids that restart at 0 say where each sample begins.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
    cu_seqlens: Tensor  # int32 [n + 1]
    lengths: tuple[int, ...]  # [n], the same on the host
    turns: tuple[tuple[int, int], ...]  # (number of the example in the batch, message number) of each turn slot

    @property
    def num_targets(self) -> int:
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=True)

        return Batch(
            move(self.input_ids),
            move(self.position_ids),
            move(self.targets),
            move(self.turn_ids),
            move(self.weights),
            move(self.cu_seqlens),
            self.lengths,
            self.turns,
        )


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples end to end. No example at all gives one token without a target: a forward that trains nothing."""
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
    return Batch(
        input_ids=_row(ids),
        position_ids=_row(positions),
        targets=_row(targets),
        turn_ids=_row(turn_ids),
        weights=torch.from_numpy(np.concatenate(weights))[None],
        cu_seqlens=torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
        lengths=lengths,
        turns=tuple(turns),
    )


def _row(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None]


def _empty() -> Batch:
    nothing = torch.zeros(1, 1, dtype=torch.int64)
    return Batch(
        input_ids=nothing,
        position_ids=nothing,
        targets=torch.full((1, 1), IGNORE),
        turn_ids=torch.full((1, 1), -1),
        weights=torch.zeros(1, 1),
        cu_seqlens=torch.tensor([0, 1], dtype=torch.int32),
        lengths=(1,),
        turns=(),
    )
