"""Which conversations gave numbers that are not finite: found by computing parts of a step again, all ranks together.

Only in the path of failure. The gradient that a rank holds is a part of the sum over ranks, so it cannot say whose
conversation broke it; a forward and backward in which other conversations are left out can. What is found is written
to RUN_DIR/non_finite/, all of it, and said in one sentence.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from sft_dist.config import RunConfig, SourceConfig
from sft_dist.data import formats
from sft_dist.data.packing import Pack
from sft_dist.data.plan import Plan, distribute
from sft_dist.data.selection import Example, Selection
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.model.batch import collate
from sft_dist.model.engine import Engine
from sft_dist.train import objective
from sft_dist.train.feeding import MicroBatch
from sft_dist.train.files import write_json
from sft_dist.train.gradient import forward
from sft_dist.train.meter import PhaseClock
from sft_dist.train.numbers import narrow

FOLDER = "non_finite"
_MAX_TESTS = 64  # forwards spent on telling conversations apart, beside one for each micro-batch
_NUM_SAID = 3

HeldOut = Literal["heldout", "retention"]  # data that are scored and not trained on, by their key of the run file


@dataclass(frozen=True, slots=True)
class Item:
    """One sample in its place in a step or an evaluation."""

    rank: int
    number: int  # of the micro-batch
    sample: int  # in the selection


@dataclass(frozen=True, slots=True)
class Offender:
    rank: int
    micro_batch: int  # from 1
    id: str
    source: str
    place: str | None  # file:line, where the files still say so
    num_tokens: int
    num_targets: int
    is_alone: bool  # broken by itself; otherwise only together with others that are listed too


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a loss, gradient or NLL that is no finite number."""

    what: str
    broken_weights: tuple[str, ...]  # parameters that were broken before: then no conversation is at fault
    broken_losses: tuple[tuple[int, int], ...]  # (rank, micro-batch from 1) whose loss was not finite at first
    offenders: tuple[Offender, ...]
    file: Path
    problem: str | None = None  # why the file could not be written

    def __str__(self) -> str:
        if self.broken_weights:
            found = f"the weights themselves are not finite any more ({_listed(self.broken_weights)})"
        elif self.offenders:
            places = sorted({(o.rank, o.micro_batch) for o in self.offenders})
            where = _listed([f"rank {rank}, micro-batch {number}" for rank, number in places])
            found = f"{where}: {_listed([_named(offender) for offender in self.offenders])}"
        else:
            broken = [f"rank {rank}, micro-batch {number}" for rank, number in self.broken_losses]
            whose = _listed(broken) if broken else "of a rank that cannot be told any more"
            found = f"{whose}; computed again it is finite, so no conversation is at fault: suspect the hardware"
        written = f"all that is known is in {self.file}" if self.problem is None else self.problem
        return f"{self.what}; {found}; {written}"


@dataclass(frozen=True, slots=True)
class Search:
    """What it takes to compute parts of a step again. Its methods are collectives, and cost many forwards."""

    engine: Engine
    config: RunConfig
    world: World
    clock: PhaseClock

    def step(
        self, what: str, step: int, selection: Selection, plan: Plan, own_losses: Sequence[torch.Tensor]
    ) -> Report:
        """The conversations of step `step` (from 0) by which its loss or its gradient is not finite.

        `own_losses`: of this rank's micro-batches, as they were at first. The gradient is forgotten.
        """
        config, engine, world = self.config, self.engine, self.world
        terms, denominator = objective.loss_terms(config), plan.denominator(step)
        balance = objective.balance_of(config, plan, step)
        own_broken = [number for number, loss in enumerate(own_losses) if not math.isfinite(float(loss))]
        broken = [(rank, n + 1) for rank, numbers in enumerate(collectives.gather(own_broken)) for n in numbers]
        per_forward = config.batch.packs_per_micro_batch
        packs = [
            plan.micro_batches(step, data_rank=rank, data_size=world.size, packs_per_micro_batch=per_forward)
            for rank in range(world.size)
        ]

        def is_bad(items: tuple[Item, ...]) -> bool:
            examples = self._own(items, selection)
            part = MicroBatch(step, items[0].number, True, examples, collate(examples))
            engine.clear_gradients()
            loss, _ = forward(engine, part, terms, config.seed, world.rank, balance=balance)
            engine.backward(loss / denominator, is_last=True)
            return not math.isfinite(float(loss)) or not engine.has_finite_gradient()

        engine.train()
        found, weights = self._find(_groups(packs), is_bad)
        engine.clear_gradients()
        file = Path(config.run_dir) / FOLDER / f"step-{step + 1:08d}.json"
        return self._report(Report(what, weights, tuple(broken), (), file), found, selection, config.data.train)

    def heldout(self, what: str, step: int, selection: Selection, packs: Sequence[Pack], *, name: HeldOut) -> Report:
        """The held-out or retention conversations whose log-probabilities after `step` steps are not finite."""
        config, world = self.config, self.world
        by_rank = [distribute(packs, n, world.size, config.batch.packs_per_micro_batch) for n in range(world.size)]

        def is_bad(items: tuple[Item, ...]) -> bool:
            with torch.no_grad():
                values = self.engine.token_values(collate(self._own(items, selection)))
            known = [values.logprob] if values.logits is None else [values.logprob, values.logits]
            return not all(bool(tensor.isfinite().all()) for tensor in known)

        self.engine.train(False)
        found, weights = self._find(_groups(by_rank), is_bad)
        file = Path(config.run_dir) / FOLDER / f"{name}-{step:08d}.json"
        sources = config.data.heldout if name == "heldout" else config.data.retention
        return self._report(Report(what, weights, (), (), file), found, selection, sources)

    def _own(self, items: Sequence[Item], selection: Selection) -> tuple[Example, ...]:
        return tuple(selection[item.sample] for item in items if item.rank == self.world.rank)

    def _find(
        self, groups: Sequence[tuple[Item, ...]], is_bad_here: Callable[[tuple[Item, ...]], bool]
    ) -> tuple[list[tuple[Item, ...]], tuple[str, ...]]:
        """The smallest sets of items that are bad, and the names of broken weights: with those, everything is."""

        def is_bad(items: tuple[Item, ...]) -> bool:
            self.clock.enter("other")  # whoever watches over the run sees that it gets on
            return collectives.all_max([float(is_bad_here(items))])[0] > 0

        weights = sorted({name for names in collectives.gather(self.engine.broken_weights()) for name in names})
        return [] if weights else narrow(groups, is_bad, max_tests=_MAX_TESTS), tuple(weights)

    def _report(
        self,
        report: Report,
        found: Sequence[tuple[Item, ...]],
        selection: Selection,
        sources: Sequence[SourceConfig],
    ) -> Report:
        """With everything about what was found, and written by rank 0."""
        indices = {int(selection.indices[item.sample]) for items in found for item in items}
        # All ranks wait for what rank 0 does alone: the first that leaves with an error would end it.
        places = collectives.on_main(lambda: formats.places(sources, indices))
        offenders = tuple(_offender(item, selection, places, len(items) == 1) for items in found for item in items)
        report = replace(report, offenders=offenders)
        return replace(report, problem=collectives.on_main(lambda: _write(report)))


def _groups(packs_by_rank: Sequence[Sequence[Pack]]) -> list[tuple[Item, ...]]:
    """For every micro-step the samples of all ranks, rank by rank."""
    return [
        tuple(Item(rank, number, sample) for rank, pack in enumerate(packs) for sample in pack)
        for number, packs in enumerate(zip(*packs_by_rank, strict=True))
    ]


def _write(report: Report) -> str | None:
    """Why the report could not be written, or None."""
    try:
        report.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(report.file, asdict(report) | {"file": report.file.name})
    except OSError as error:
        return f"{report.file} cannot be written: {error.strerror}"
    return None


def _offender(item: Item, selection: Selection, places: dict[int, str], is_alone: bool) -> Offender:
    example = selection[item.sample]
    sample = example.sample
    return Offender(
        rank=item.rank,
        micro_batch=item.number + 1,
        id=sample.conversation_id,
        source=sample.source,
        place=places.get(sample.index),
        num_tokens=len(sample.ids),
        num_targets=int((example.turns >= 0).sum()),
        is_alone=is_alone,
    )


def _named(offender: Offender) -> str:
    place = offender.id if offender.place is None else f"{offender.id} ({offender.place})"
    return f"{place} of {offender.source}" + ("" if offender.is_alone else " (only together with others)")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NUM_SAID])
    return shown if len(names) <= _NUM_SAID else f"{shown} and {len(names) - _NUM_SAID:,} more"
