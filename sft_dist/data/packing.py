"""Assign samples to packs of at most `capacity` tokens. Pure: lengths in, indices out."""

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Pack = tuple[int, ...]


def best_fit_decreasing(lengths: Sequence[int] | NDArray[np.integer], capacity: int) -> list[Pack]:
    """Longest first, each sample into the fullest pack it still fits in; ties keep the order of the input.

    Best-fit decreasing bin packing: Johnson, "Near-optimal bin packing algorithms", 1973; O(n log n).
    Every index appears in exactly one pack. Raises ValueError for a length that is no positive number up to capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(f"lengths must lie in 1..{capacity}, found {sizes.min()}..{sizes.max()}")
    order = np.argsort(-sizes, kind="stable")
    packs: list[list[int]] = []
    rooms: list[int] = []  # distinct free rooms, ascending
    packs_with_room: dict[int, list[int]] = {}
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            pack, room = len(packs), capacity
            packs.append([])
        else:
            room = rooms[at]
            pack = packs_with_room[room].pop()
            if not packs_with_room[room]:
                del packs_with_room[room], rooms[at]
        packs[pack].append(index)
        left = room - size
        if left in packs_with_room:
            packs_with_room[left].append(pack)
        elif left > 0:
            insort(rooms, left)
            packs_with_room[left] = [pack]
    return [tuple(pack) for pack in packs]
