"""One block of the input order, packed and dealt to all ranks. The packs do not depend on the number of ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sft_dist.data.packing import Pack, best_fit_decreasing
from sft_dist.data.plan import distribute
from sft_dist.distributed import collectives
from sft_dist.distributed.world import World
from sft_dist.model.batch import Batch
from sft_dist.model.engine import Engine
from sft_dist.train.evaluate import turn_logprobs

# (number of the item, turn of the item) -> float32 [tokens], log Pr of each of its targets
Logprobs = dict[tuple[int, int], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Layout:
    """How items become forwards, and who runs them."""

    world: World
    max_length: int
    packs_per_forward: int


def logprobs(
    engine: Engine,
    layout: Layout,
    lengths: Sequence[int] | NDArray[np.integer],
    batch_of: Callable[[Pack], Batch],
    advance: Callable[[float], None],
) -> Logprobs:
    """The log-probs of all targets of all items, on every rank. A collective.

    `advance` is told the share of this rank's forwards that is done.
    """
    forwards = _forwards(lengths, layout)
    mine = []
    dealt = distribute(forwards, layout.world.rank, layout.world.size, 1)
    for number, forward in enumerate(dealt, start=1):
        answers = turn_logprobs(engine, batch_of(forward))
        mine += [((forward[item], turn), values) for item, turn, values in answers]
        advance(number / len(dealt))
    return {key: values for part in collectives.gather(mine) for key, values in part}


def _forwards(lengths: Sequence[int] | NDArray[np.integer], layout: Layout) -> list[Pack]:
    """Packs of near-equal size are neighbours, so that ranks have about as much to do at a time."""
    sizes = np.asarray(lengths, np.int64)
    packs = best_fit_decreasing(sizes, layout.max_length)
    packs.sort(key=lambda pack: (-int(sizes[list(pack)].sum()), pack))
    step = layout.packs_per_forward
    return [tuple(item for pack in packs[i : i + step] for item in pack) for i in range(0, len(packs), step)]
