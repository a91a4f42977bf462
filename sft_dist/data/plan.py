"""Which samples are in which step, on which rank. Stateless and pure: integers in, integers out.

A step is a function of (data, seed, config, cost model) and of nothing about ranks: `packs(step)` never sees them, and
`distribute` only deals the packs of one step out. A rank count that does not divide is filled with empty packs,
so that every rank runs the same number of forwards (under ZeRO-3 each one is a collective).

How random the order is: every epoch shuffles the samples, packs them, and shuffles the packs; steps take them as they
come. Best fit puts long samples together with what fills their packs, so the company within a pack follows from lengths
(and among equal ones from the shuffle). The packs of a step are a draw of all packs without replacement, and nothing
about their lengths follows from the number of the step. Within a step cost decides on the order of forwards alone. With
balance_steps = w > 1 the packs of w consecutive steps are sorted by cost and cut into w steps, which are shuffled:
steps differ more in the lengths they hold, but still not by their number, and w steps together are what they would be
in random order. The last step of an epoch, where it is not full, holds the last packs of the shuffle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.cost import BY_TOKENS, CostModel
from sft_dist.data.packing import Int64, Pack, PackTable, pack_table

Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The packs of an epoch in the order of its steps: `global_packs` in each but the last, costliest first."""

    table: PackTable
    costs: Float64  # [num_packs]


class Plan:
    """The steps of a run over samples with given lengths, target counts and weights.

    Samples without a target or label take no part. A sample with repeat 2.5 is twice in every epoch, and in a random
    half of the epochs a third time; samples of one conversation go together. Raises ValueError when no sample is left.

    An epoch is packed when its first step is asked for and then kept, with the one before: 8 bytes a sample and 16 a
    pack; packing takes up to about 150 bytes a sample for a moment.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],  # [num_samples] tokens
        num_targets: NDArray[np.integer],  # [num_samples]
        *,
        mass: NDArray[np.float64] | None = None,  # [num_samples] share of the denominator; default: num_targets
        label_mass: NDArray[np.float64] | None = None,  # [num_samples] the same of labels beside tokens; default: 0
        repeats: NDArray[np.float64] | None = None,  # [num_samples] copies in an epoch; default: 1
        conversations: NDArray[np.integer] | None = None,  # [num_samples] which conversation; default: one each
        cost_model: CostModel = BY_TOKENS,
        max_length: int,
        global_packs: int,
        balance_steps: int = 1,
        seed: int,
        epochs: int,
        max_steps: int | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._num_targets = np.asarray(num_targets)
        self._mass = self._num_targets.astype(np.float64) if mass is None else mass
        self._label_mass = np.zeros(len(self._lengths)) if label_mass is None else label_mass
        self._costs = cost_model.of_samples(self._lengths, self._num_targets)  # [num_samples]
        num = len(self._lengths)
        repeats = np.ones(num) if repeats is None else repeats
        self._conversations = np.arange(num) if conversations is None else conversations
        has_target = (self._num_targets > 0) & (self._mass > 0)
        is_member = (has_target | (self._label_mass > 0)) & (self._lengths <= max_length)
        self._repeats = np.where(is_member, repeats, 0.0)
        if not self._repeats.any():
            raise ValueError("no sample has a target token and fits")
        self._max_length = max_length
        self._seed = seed
        self.global_packs = global_packs
        self.balance_steps = balance_steps
        self.cost_model = cost_model
        drawn = self._drawn(0)
        self.num_samples = len(drawn)
        self.num_tokens = int(self._lengths[drawn].sum())
        self.num_target_tokens = int(self._num_targets[drawn].sum())
        self.num_packs = len(self._epoch(0).costs)
        # Whole repeats give the same number of packs in every epoch.
        is_same = bool((self._repeats == np.floor(self._repeats)).all())
        packs_of = [
            self.num_packs if is_same or epoch == 0 else len(pack_table(self._lengths[self._drawn(epoch)], max_length))
            for epoch in range(epochs)
        ]
        self._first_steps = np.cumsum([0, *(-(-packs // global_packs) for packs in packs_of)])
        self.steps_per_epoch = int(self._first_steps[1])
        planned = int(self._first_steps[-1])
        self.num_steps = planned if max_steps is None else min(planned, max_steps)

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens."""
        return self.num_tokens / (self.num_packs * self._max_length)

    def packs(self, step: int) -> tuple[Pack, ...]:
        """The packs of one step, costliest first; the last step of an epoch may have fewer than global_packs."""
        epoch, first, last = self._place(step)
        return tuple(self._epoch(epoch).table.packs(first, last))

    def denominator(self, step: int) -> float:
        """What the summed loss of the whole step, over all ranks, is divided by (docs/objective.md, section 5).

        1 where no token is a target, only labels are.
        """
        return float(self._mass[self._members(step)].sum()) or 1.0

    def label_denominator(self, step: int) -> float:
        """The same of the labels that stand beside tokens; 0: there are none in this step."""
        return float(self._label_mass[self._members(step)].sum())

    def num_step_targets(self, step: int) -> int:
        return int(self._num_targets[self._members(step)].sum())

    def num_step_tokens(self, step: int) -> int:
        return int(self._lengths[self._members(step)].sum())

    def micro_batches(self, step: int, *, data_rank: int, data_size: int, packs_per_micro_batch: int) -> list[Pack]:
        """The forwards of one rank in one step, each a flat tuple of sample indices; () is an empty forward."""
        return distribute(self.packs(step), data_rank, data_size, packs_per_micro_batch)

    def balance(self, data_size: int, packs_per_micro_batch: int) -> float:
        """Predicted share of the ranks' time that is not spent waiting for the costliest rank, in the first epoch.

        Under ZeRO-3 ranks wait for each other layer by layer, so each micro-step lasts as long as its maximum:
        Σ over micro-steps of the mean cost over ranks / Σ of the maximum.
        """
        costs = self._epoch(0).costs
        total = longest = 0.0
        for first in range(0, min(self.num_steps, self.steps_per_epoch) * self.global_packs, self.global_packs):
            loads = _loads(costs[first : first + self.global_packs], data_size, packs_per_micro_batch)
            total += float(loads.mean(axis=1).sum())
            longest += float(loads.max(axis=1).sum())
        return total / longest

    def _place(self, step: int) -> tuple[int, int, int]:
        """(epoch, first, last) of the packs [first, last) of a step."""
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        first = (step - int(self._first_steps[epoch])) * self.global_packs
        return epoch, first, min(first + self.global_packs, len(self._epoch(epoch).costs))

    def _members(self, step: int) -> Int64:
        """The samples of a step, [num_members]."""
        epoch, first, last = self._place(step)
        table = self._epoch(epoch).table
        return table.members[table.starts[first] : table.starts[last]]

    @lru_cache(maxsize=2)  # noqa: B019 - one plan lives as long as its run
    def _epoch(self, epoch: int) -> _Epoch:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        shuffled = rng.permutation(self._drawn(epoch))
        table = pack_table(self._lengths[shuffled], self._max_length).renamed(shuffled)
        costs = table.sums(self._costs)
        order = rng.permutation(len(table))
        order = _dealt_by_cost(order, costs, self.global_packs, self.balance_steps, rng)
        return _Epoch(table.ordered(order), costs[order])

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        """Numbers of the samples of an epoch, each as often as it is repeated."""
        whole = np.floor(self._repeats)
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch, 1])))
        chance = rng.random(int(self._conversations.max()) + 1)[self._conversations]
        copies = (whole + (chance < self._repeats - whole)).astype(np.int64)
        if not copies.any():
            copies = (self._repeats > 0).astype(np.int64)  # of a tiny data set chance took nothing
        return np.repeat(np.arange(len(copies)), copies)


def distribute(packs: Sequence[Pack], data_rank: int, data_size: int, packs_per_micro_batch: int) -> list[Pack]:
    """Deal packs to ranks: neighbours in `packs` (of near-equal cost) form one micro-step over all ranks.

    Of several packs in a forward, the ranks get the first in their order and the next in the opposite one, and so on.
    """
    per_micro_step = data_size * packs_per_micro_batch
    micro_batches = []
    for first in range(0, len(packs), per_micro_step):
        places = [
            start + (data_size - 1 - data_rank if turn % 2 else data_rank)
            for turn, start in enumerate(range(first, first + per_micro_step, data_size))
        ]
        micro_batches.append(tuple(index for place in places if place < len(packs) for index in packs[place]))
    return micro_batches


def _loads(costs: Float64, data_size: int, packs_per_micro_batch: int) -> Float64:
    """[num_micro_steps, data_size] cost of each forward that `distribute` makes of packs with these costs."""
    num_micro_steps = -(-len(costs) // (data_size * packs_per_micro_batch))
    room = np.zeros((num_micro_steps, packs_per_micro_batch, data_size))
    room.reshape(-1)[: len(costs)] = costs
    room[:, 1::2] = room[:, 1::2, ::-1].copy()
    return np.asarray(room.sum(axis=1))


def _dealt_by_cost(
    order: Int64, costs: Float64, global_packs: int, balance_steps: int, rng: np.random.Generator
) -> Int64:
    """[num_packs] a random order of packs, dealt to steps by cost within each window of steps, costliest first.

    A last step that is not full gets what the random order ends with: if it got what costs least, every epoch would
    end oddly.
    """
    num_steps = len(order) // global_packs
    whole, rest = order[: num_steps * global_packs], order[num_steps * global_packs :]
    window_of_step = np.arange(num_steps) // balance_steps
    window_of_pack = np.repeat(window_of_step, global_packs)
    steps = whole[np.lexsort((-costs[whole], window_of_pack))].reshape(num_steps, global_packs)
    shuffled = np.lexsort((rng.random(num_steps), window_of_step))
    rest = rest[np.argsort(-costs[rest], kind="stable")]
    return np.concatenate([steps[shuffled].reshape(-1), rest])
