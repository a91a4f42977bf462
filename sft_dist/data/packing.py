"""Assign samples to packs of at most `capacity` tokens. Pure: lengths in, indices out."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pack = tuple[int, ...]
Int64 = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackTable:
    """Many packs as two columns, 8 bytes a sample and 8 a pack."""

    members: Int64  # [num_members] sample numbers, pack by pack
    starts: Int64  # [num_packs + 1] pack p is members[starts[p]:starts[p + 1]], never empty

    def __len__(self) -> int:
        return len(self.starts) - 1

    def packs(self, first: int, last: int) -> list[Pack]:
        """Packs [first, last) as tuples."""
        bounds = self.starts[first : last + 1]
        members = self.members[bounds[0] : bounds[-1]].tolist()
        ends = (bounds - bounds[0]).tolist()
        return [tuple(members[begin:end]) for begin, end in itertools.pairwise(ends)]

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """[num_packs] sum over each pack of `values`, [num_samples]."""
        return np.asarray(np.add.reduceat(values[self.members], self.starts[:-1]))

    def ordered(self, order: Int64) -> "PackTable":
        """The same packs in another order, [num_packs]."""
        sizes = np.diff(self.starts)[order]
        starts = np.concatenate([[0], np.cumsum(sizes)])
        within = np.arange(starts[-1]) - np.repeat(starts[:-1], sizes)
        return PackTable(self.members[np.repeat(self.starts[order], sizes) + within], starts)

    def renamed(self, samples: Int64) -> "PackTable":
        """The same packs of the samples with these numbers: what was called i is samples[i]."""
        return PackTable(samples[self.members], self.starts)


def best_fit_decreasing(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[Pack]:
    """Longest first, each sample into the fullest pack it still fits in.

    Equally long samples keep the order of the input; of equally full packs the one that became so last is taken. Every
    index appears in exactly one pack. Raises ValueError for a length that is no positive number up to capacity.
    """
    table = pack_table(lengths, capacity)
    return table.packs(0, len(table))


def pack_table(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> PackTable:
    """`best_fit_decreasing` as a table; packs are numbered as they were begun, members stand as they were added.

    Best-fit decreasing bin packing: Johnson, "Near-optimal bin packing algorithms", 1973. O(n log n): one sort, and for
    each run of equal lengths one step per distinct room it is put into.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(f"lengths must lie in 1..{capacity}, found {sizes.min()}..{sizes.max()}")
    order = np.argsort(-sizes, kind="stable")
    pack_of = np.array(_packs_of_descending(sizes, capacity), np.int64)  # of the samples in this order
    starts = np.concatenate([[0], np.cumsum(np.bincount(pack_of))]).astype(np.int64)
    return PackTable(order[np.argsort(pack_of, kind="stable")], starts)


def _packs_of_descending(sizes: Int64, capacity: int) -> list[int]:
    """Number of the pack of every sample, longest first."""
    distinct, counts = np.unique(sizes, return_counts=True)
    open_packs, num_packs = _OpenPacks(capacity), 0
    pack_of: list[int] = []
    for size, left in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            room = open_packs.smallest_room(size)
            # The pack that takes one of them is the fullest for the next as well, while that fits.
            each = (room or capacity) // size
            wanted = -(-left // each)
            if room:
                chosen = open_packs.take(room, wanted)
            else:
                room, chosen = capacity, list(range(num_packs, num_packs + wanted))
                num_packs += wanted
            placed = min(left, each * len(chosen))
            left -= placed
            pack_of += chosen if each == 1 else [pack for pack in chosen for _ in range(each)][:placed]
            if rest := placed % each:
                open_packs.put(room - rest * size, [chosen.pop()])
            if chosen:
                open_packs.put(room - each * size, chosen)
    return pack_of


class _OpenPacks:
    """Packs by the room that is left in them.

    Which rooms exist is a set of bits in two levels, so the smallest that suffices is found in a few operations.
    """

    def __init__(self, capacity: int) -> None:
        self._packs: dict[int, list[int]] = {}  # room -> packs, in the order in which they came to it
        self._shift = (capacity.bit_length() + 1) // 2
        self._mask = (1 << self._shift) - 1
        self._words = [0] * ((capacity >> self._shift) + 1)  # bit r of word w: there is room (w << shift) + r
        self._used = 0  # bit w: word w is not 0

    def smallest_room(self, size: int) -> int:
        """The smallest room of at least `size`, 0 if there is none."""
        word = size >> self._shift
        if bits := self._words[word] >> (size & self._mask):
            return size + _lowest(bits)
        if above := self._used >> (word + 1):
            word += 1 + _lowest(above)
            return (word << self._shift) + _lowest(self._words[word])
        return 0

    def take(self, room: int, num: int) -> list[int]:
        """Remove and return up to `num` packs with this room, the last that came first."""
        packs = self._packs[room]
        if num < len(packs):
            taken = packs[: -num - 1 : -1]
            del packs[-num:]
            return taken
        del self._packs[room]
        word = room >> self._shift
        self._words[word] ^= 1 << (room & self._mask)
        if not self._words[word]:
            self._used ^= 1 << word
        packs.reverse()
        return packs

    def put(self, room: int, packs: list[int]) -> None:
        """Add packs, which from now on are ours; full ones are forgotten."""
        if room in self._packs:
            self._packs[room] += packs
        elif room:
            self._packs[room] = packs
            word = room >> self._shift
            self._words[word] |= 1 << (room & self._mask)
            self._used |= 1 << word


def _lowest(bits: int) -> int:
    """Place of the lowest bit that is set."""
    return (bits & -bits).bit_length() - 1
