"""Held-out log-probabilities: the same packs and numbers whatever the number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sft_dist.data.packing import Pack, best_fit_decreasing
from sft_dist.data.plan import distribute
from sft_dist.data.sample import Sample, TrainOn
from sft_dist.data.store import PreparedDataset
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.model.batch import IGNORE, collate
from sft_dist.model.engine import Engine


@dataclass(frozen=True, slots=True)
class TurnScore:
    """log Pr(output of this turn | all before it in its sample), in nats, summed over its tokens."""

    sample: int  # number in the data set
    message: int
    num_tokens: int
    logprob: float


def scoring_packs(lengths: NDArray[np.int64], max_length: int) -> list[Pack]:
    """All samples that fit, packed once, largest pack first."""
    members = np.flatnonzero(lengths <= max_length)
    packs = [tuple(int(members[i]) for i in pack) for pack in best_fit_decreasing(lengths[members], max_length)]
    return sorted(packs, key=lambda pack: (-int(lengths[list(pack)].sum()), pack))


def score_samples(engine: Engine, samples: Sequence[Sample], train_on: TrainOn) -> list[tuple[int, int, int, float]]:
    """One forward over samples laid end to end; (sample, message, tokens, logprob) of each turn. A collective."""
    batch = collate(samples, train_on)
    with torch.no_grad():
        logprobs = engine.logprobs(batch).double().cpu()
    slots = batch.turn_ids[0][batch.targets[0] != IGNORE]  # int64 [num_targets]
    sums = torch.zeros(len(batch.turns), dtype=torch.float64).index_add_(0, slots, logprobs)
    counts = torch.bincount(slots, minlength=len(batch.turns)).tolist()
    return [
        (sample, message, count, float(value))
        for (sample, message), count, value in zip(batch.turns, counts, sums, strict=True)
    ]


def score_pack(engine: Engine, dataset: PreparedDataset, pack: Pack, train_on: TrainOn) -> list[TurnScore]:
    scores = score_samples(engine, [dataset[number] for number in pack], train_on)
    return [TurnScore(pack[sample], message, count, logprob) for sample, message, count, logprob in scores]


def heldout_nll(
    engine: Engine, dataset: PreparedDataset, packs: Sequence[Pack], train_on: TrainOn, world: World, per_forward: int
) -> float:
    """Mean negative log-probability per target token, over all ranks. A collective."""
    engine.train(False)
    total = count = 0.0
    for pack in distribute(packs, world.rank, world.size, per_forward):
        for score in score_pack(engine, dataset, pack, train_on):
            total -= score.logprob
            count += score.num_tokens
    total, count = collectives.all_sum([total, count])
    return total / count
