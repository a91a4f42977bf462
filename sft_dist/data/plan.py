"""Which samples are in which step, on which rank. Stateless and pure: integers in, integers out.

A step is a function of (data, seed, config) and of nothing about ranks: `packs(step)` never sees them, and
`distribute` only deals the packs of one step out. A rank count that does not divide is filled with empty packs,
so that every rank runs the same number of forwards (under ZeRO-3 each one is a collective).
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.packing import Pack, best_fit_decreasing


class Plan:
    """The steps of a run over samples with given lengths, target counts and weights.

    Samples without a target take no part. A sample with repeat 2.5 is twice in every epoch, and in a random half of
    the epochs a third time; samples of one conversation go together. Raises ValueError when no sample is left.
    """

    def __init__(
        self,
        lengths: NDArray[np.integer],  # [num_samples] tokens
        num_targets: NDArray[np.integer],  # [num_samples]
        *,
        mass: NDArray[np.float64] | None = None,  # [num_samples] share of the denominator; default: num_targets
        repeats: NDArray[np.float64] | None = None,  # [num_samples] copies in an epoch; default: 1
        conversations: NDArray[np.integer] | None = None,  # [num_samples] which conversation; default: one each
        max_length: int,
        global_packs: int,
        seed: int,
        epochs: int,
        max_steps: int | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths)
        self._num_targets = np.asarray(num_targets)
        self._mass = self._num_targets.astype(np.float64) if mass is None else mass
        num = len(self._lengths)
        repeats = np.ones(num) if repeats is None else repeats
        self._conversations = np.arange(num) if conversations is None else conversations
        is_member = (self._num_targets > 0) & (self._mass > 0) & (self._lengths <= max_length)
        self._repeats = np.where(is_member, repeats, 0.0)
        if not self._repeats.any():
            raise ValueError("no sample has a target token and fits")
        self._max_length = max_length
        self._seed = seed
        self.global_packs = global_packs
        drawn = self._drawn(0)
        self.num_samples = len(drawn)
        self.num_tokens = int(self._lengths[drawn].sum())
        self.num_target_tokens = int(self._num_targets[drawn].sum())
        self.num_packs = len(self._epoch(0))
        # Whole repeats give the same number of packs in every epoch.
        is_same = bool((self._repeats == np.floor(self._repeats)).all())
        packs_of = [self.num_packs if is_same or epoch == 0 else len(self._epoch(epoch)) for epoch in range(epochs)]
        self._first_steps = np.cumsum([0, *(-(-packs // global_packs) for packs in packs_of)])
        self.steps_per_epoch = int(self._first_steps[1])
        planned = int(self._first_steps[-1])
        self.num_steps = planned if max_steps is None else min(planned, max_steps)

    @property
    def fill(self) -> float:
        """Share of the packs' room that holds tokens."""
        return self.num_tokens / (self.num_packs * self._max_length)

    def packs(self, step: int) -> tuple[Pack, ...]:
        """The packs of one step, largest first; the last step of an epoch may have fewer than global_packs."""
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        within = step - int(self._first_steps[epoch])
        chosen = self._epoch(epoch)[within * self.global_packs : (within + 1) * self.global_packs]
        return tuple(sorted(chosen, key=lambda pack: (-self._tokens(pack), pack)))

    def denominator(self, step: int) -> float:
        """What the summed loss of the whole step, over all ranks, is divided by (docs/objective.md, section 5)."""
        return float(sum(self._mass[list(pack)].sum() for pack in self.packs(step)))

    def num_step_targets(self, step: int) -> int:
        return sum(int(self._num_targets[list(pack)].sum()) for pack in self.packs(step))

    def num_step_tokens(self, step: int) -> int:
        return sum(self._tokens(pack) for pack in self.packs(step))

    def micro_batches(self, step: int, *, data_rank: int, data_size: int, packs_per_micro_batch: int) -> list[Pack]:
        """The forwards of one rank in one step, each a flat tuple of sample indices; () is an empty forward."""
        return distribute(self.packs(step), data_rank, data_size, packs_per_micro_batch)

    def _tokens(self, pack: Pack) -> int:
        return int(self._lengths[list(pack)].sum())

    @lru_cache(maxsize=2)  # noqa: B019 - one plan lives as long as its run
    def _epoch(self, epoch: int) -> list[Pack]:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        shuffled = rng.permutation(self._drawn(epoch))
        packs = best_fit_decreasing(self._lengths[shuffled], self._max_length)
        order = rng.permutation(len(packs)).tolist()
        return [tuple(int(shuffled[i]) for i in packs[p]) for p in order]

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
    """Deal packs to ranks: neighbours in `packs` (of near-equal size) form one micro-step over all ranks."""
    per_micro_step = data_size * packs_per_micro_batch
    micro_batches = []
    for first in range(0, len(packs), per_micro_step):
        mine = packs[first : first + per_micro_step][data_rank::data_size]
        micro_batches.append(tuple(index for pack in mine for index in pack))
    return micro_batches
