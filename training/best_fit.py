"""Best-fit packing within two budgets, of tokens and of tiles: which entry goes to which pack.

Orders of entries, checks of lengths and equal numbers of packs in every epoch are `packing`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from typing import NamedTuple

import numpy as np

from .plans import Packs, offsets_of


class Assignment(NamedTuple):
    """Entries in the order of their selection, the pack of each, and the number of packs."""

    order: np.ndarray
    pack_of: np.ndarray
    count: int


def best_fit(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, order: np.ndarray, window: int
) -> Assignment:
    """Assigns entries in the given order, each to the open pack that it fills best.

    Open packs are kept sorted by the room left in the tighter budget (that which the data as a whole fills more), then
    by that in the other one, so a search starts where the tighter budget suffices and mostly ends there.

    Args:
        tokens, tiles: (E,) int64 of every entry, none above its budget.
        max_tokens, max_tiles: The budgets of a pack.
        order: (E,) int64, a permutation of the entries.
        window: Most open packs.
    """
    tight, loose, limits = tokens, tiles, (max_tokens, max_tiles)
    if int(tiles.sum()) * max_tokens > int(tokens.sum()) * max_tiles:
        tight, loose, limits = tiles, tokens, (max_tiles, max_tokens)
    smallest = (int(tight.min(initial=limits[0])), int(loose.min(initial=limits[1])))
    room: list[tuple[int, int]] = []  # sorted room of the open packs
    packs: list[int] = []  # and their numbers
    pack_of, count = [], 0
    for need in zip(tight[order].tolist(), loose[order].tolist(), strict=True):
        place = _search(room, need)
        if place < len(room):
            left, pack = room.pop(place), packs.pop(place)
        else:
            left, pack, count = limits, count, count + 1
            if len(room) == window:
                del room[0], packs[0]
        pack_of.append(pack)
        left = (left[0] - need[0], left[1] - need[1])
        if left[0] >= smallest[0] and left[1] >= smallest[1]:
            place = bisect_left(room, left)
            room.insert(place, left)
            packs.insert(place, pack)
    return Assignment(order, np.array(pack_of, dtype=np.int64), count)


def _search(room: list[tuple[int, int]], need: tuple[int, int]) -> int:
    """Place of the first pack with enough room of both kinds, `len(room)` if there is none."""
    place = bisect_left(room, need)
    while place < len(room) and room[place][1] < need[1]:
        place += 1
    return place


def split_packs(assignment: Assignment, target: int) -> Assignment:
    """Halves the packs with most entries until there are `target` packs, or only packs of one entry."""
    order, pack_of, count = assignment
    if count >= target:
        return assignment
    by_pack = np.argsort(pack_of, kind="stable")
    members = np.split(by_pack, np.cumsum(np.bincount(pack_of, minlength=count))[:-1])
    heap = [(-len(places), pack) for pack, places in enumerate(members)]
    heapq.heapify(heap)
    pack_of = pack_of.copy()
    while len(members) < target and heap[0][0] < -1:
        pack = heap[0][1]
        kept, moved = np.array_split(members[pack], 2)
        pack_of[moved] = len(members)
        members[pack] = kept
        heapq.heapreplace(heap, (-len(kept), pack))
        heapq.heappush(heap, (-len(moved), len(members)))
        members.append(moved)
    return Assignment(order, pack_of, len(members))


def gather(assignment: Assignment, sequence: np.ndarray) -> Packs:
    """The packs in the order of `sequence`, a permutation of their numbers; numbers of no pack give empty ones."""
    place = np.empty_like(sequence)
    place[sequence] = np.arange(len(sequence))
    pack_of = place[assignment.pack_of]
    entries = assignment.order[np.argsort(pack_of, kind="stable")]
    return Packs(entries, offsets_of(np.bincount(pack_of, minlength=len(sequence))))
