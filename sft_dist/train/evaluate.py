"""Held-out log-probabilities: the same packs and numbers whatever the number of ranks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sft_dist.config import HeadConfig
from sft_dist.data.packing import Pack, best_fit_decreasing
from sft_dist.data.plan import distribute
from sft_dist.data.selection import Example, Selection
from sft_dist.distributed.world import World
from sft_dist.model.batch import IGNORE, Batch, collate
from sft_dist.model.engine import Engine
from sft_dist.train.classification import Answers, mean_loss
from sft_dist.train.details import Details


@dataclass(frozen=True, slots=True)
class TurnScore:
    """log Pr(output of this turn | all before it in its sample), in nats, summed over its tokens."""

    example: int  # number in the selection
    message: int
    num_tokens: int
    logprob: float


def scoring_packs(selection: Selection) -> list[Pack]:
    """All examples, packed once, largest pack first."""
    lengths = selection.lengths
    packs = best_fit_decreasing(lengths, selection.policy.max_length)
    return sorted(packs, key=lambda pack: (-int(lengths[list(pack)].sum()), pack))


def score_examples(engine: Engine, examples: Sequence[Example]) -> list[tuple[int, int, int, float]]:
    """One forward over examples laid end to end; (example, message, tokens, logprob) of each turn. A collective."""
    batch = collate(examples)
    with torch.no_grad():
        logprobs = engine.logprobs(batch).double().cpu()
    slots = batch.turn_ids[0][batch.targets[0] != IGNORE]  # int64 [num_targets]
    sums = torch.zeros(len(batch.turns), dtype=torch.float64).index_add_(0, slots, logprobs)
    counts = torch.bincount(slots, minlength=len(batch.turns)).tolist()
    return [
        (example, message, count, float(value))
        for (example, message), count, value in zip(batch.turns, counts, sums, strict=True)
    ]


def turn_logprobs(engine: Engine, batch: Batch) -> list[tuple[int, int, NDArray[np.float32]]]:
    """(example, message, float32 [tokens]) of each turn slot: log Pr of every target. One forward, a collective."""
    with torch.no_grad():
        logprobs = engine.logprobs(batch).float().cpu().numpy()  # float32 [num_targets]
    slots = batch.turn_ids[0][batch.targets[0] != IGNORE].numpy()  # int64 [num_targets]
    order = np.argsort(slots, kind="stable")
    ends = np.cumsum(np.bincount(slots, minlength=len(batch.turns)))
    parts = np.split(logprobs[order], ends)[: len(batch.turns)]
    return [(example, message, part) for (example, message), part in zip(batch.turns, parts, strict=True)]


def score_pack(engine: Engine, selection: Selection, pack: Pack) -> list[TurnScore]:
    scores = score_examples(engine, [selection[number] for number in pack])
    return [TurnScore(pack[example], message, count, logprob) for example, message, count, logprob in scores]


def heldout_details(
    engine: Engine,
    selection: Selection,
    packs: Sequence[Pack],
    world: World,
    per_forward: int,
    answers: Answers | None = None,
) -> Details:
    """NLL and accuracy of every target, each counted once whatever its weight, over all ranks; fills in `answers`.

    A collective.
    """
    engine.train(False)
    details = Details(selection.source_names)
    for pack in distribute(packs, world.rank, world.size, per_forward):
        examples = [selection[number] for number in pack]
        batch = collate(examples)
        with torch.no_grad():
            values = engine.token_values(batch, with_details=True)
        details.add(examples, values)
        if answers is not None and values.logits is not None and batch.label_rows is not None:
            numbers = [pack[row] for row in batch.label_rows.tolist()]
            answers.add(numbers, values.logits[batch.label_rows.to(values.logits.device)])
    details.reduce()
    if answers is not None:
        answers.reduce()
    return details


@dataclass(frozen=True, slots=True)
class HeldoutLoss:
    """Of held-out data: `judged` is what checkpoints are compared by."""

    judged: float
    labels: float | None  # mean over labels; None without any


def heldout_loss(head: HeadConfig, selection: Selection, details: Details, answers: Answers | None) -> HeldoutLoss:
    """NLL per token, of a head in its place the loss per label, of both the sum with the weights of training.

    What is not there, tokens or labels, adds nothing.
    """
    nll = details.all.nll
    if head.is_in_place:
        return HeldoutLoss(nll, nll)
    if not head.is_beside:
        return HeldoutLoss(nll, None)
    assert answers is not None and selection.policy.labels is not None
    judged = head.language_model_weight * nll if details.all.count else 0.0
    if not len(selection.labelled):
        return HeldoutLoss(judged, None)
    of_labels = mean_loss(selection.policy.labels, answers.logits, selection.label_targets)
    return HeldoutLoss(judged + head.weight * of_labels, of_labels)
