"""Which samples of an epoch share a sequence or a padded batch: a pure function of lengths, seed and epoch.

Packing follows the InternVL 2.5 report (arXiv 2412.05271, multimodal data packing): select a sample, search an open
pack with room for it, pack it, maintain the list of open packs. The original does that while it trains, per worker;
here the epoch is planned at once, so that it has a length, every sample is seen exactly once whatever the number of
workers, and a run can be resumed anywhere. Nothing is cut or dropped here, no file is read and no tensor made.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..data.lengths import hash_of

# Open packs that a sample may go to. Four times as many fill the packs at most 0.1 % better on the mixtures tried.
WINDOW = 64


@dataclass(frozen=True, eq=False)
class Packs(Sequence[np.ndarray]):
    """Lists of entries, some of them possibly empty.

    Attributes:
        entries: (E,) int64, the entries of all packs one after the other.
        offsets: (packs + 1,) int64; pack i holds `entries[offsets[i]:offsets[i + 1]]`.
    """

    entries: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        return self.entries[self.offsets[index] : self.offsets[index + 1]]


class Fill(NamedTuple):
    """How full the packs of an epoch are, as shares of what they could hold.

    Attributes:
        tokens: Tokens / (packs x max_tokens).
        tiles: Tiles / (packs x max_tiles).
        efficiency: The fewest packs that both budgets allow / packs; 1 cannot be beaten, whichever budget is tighter.
    """

    tokens: float
    tiles: float
    efficiency: float


class _Assignment(NamedTuple):
    """Entries in the order of their selection, the pack of each, and the number of packs."""

    order: np.ndarray
    pack_of: np.ndarray
    count: int


def plan_packs(
    tokens: np.ndarray,
    tiles: np.ndarray,
    max_tokens: int,
    max_tiles: int,
    seed: int,
    epoch: int,
    window: int = WINDOW,
) -> Packs:
    """Packs of one epoch, in random order.

    Entries come in random order, and each goes to the open pack that it fills best: the one with the least room left
    in the tighter budget, among those with room in both. Where none has room a new pack is opened, and the fullest
    closed if there are `window` already. So which entries meet is random, and the cost is near-linear.

    A pack without any tile gets one dummy tile when it is collated; it fits, since a budget is at least one tile.

    Args:
        tokens: (E,) tokens of every entry, visual ones included. An entry is a row, repeated rows are several entries.
        tiles: (E,) tiles of every entry, 0 for text.
        max_tokens: Most tokens of a pack.
        max_tiles: Most tiles of a pack.
        seed: Of the run, not negative.
        epoch: Not negative.
        window: Most open packs.

    Returns:
        Packs that hold each entry exactly once; none is empty.

    Raises:
        ValueError: an entry exceeds a budget (leave such entries out before), or an argument is out of its range.
    """
    tokens, tiles = _checked_lengths(tokens, tiles, max_tokens, max_tiles)
    order = _permutation(len(tokens), seed, epoch)
    assignment = _best_fit(tokens, tiles, max_tokens, max_tiles, order, window)
    return _gather(assignment, _permutation(assignment.count, seed, epoch, of_packs=True))


class EpochPlanner:
    """Plans of all epochs of a run, all of the same length.

    `Trainer` makes its schedule from one length, and accelerate repeats batches where ranks do not come out even; so
    the number of packs N is that of epoch 0, rounded up to a multiple of `multiple`, for every epoch:

    - an epoch with fewer packs halves those with most entries until there are N;
    - an epoch with more is planned again with the largest entries first in every `WINDOW` of them, which fills packs
      better, and takes the packs of epoch 0, in an order of its own, if that is not enough. So there is no need for a
      reserve, which would cost steps in every epoch;
    - data with fewer entries than N gets empty packs. There are fewer than `multiple` of them, so that no step is
      made of them alone.

    Args:
        tokens, tiles, max_tokens, max_tiles, seed: As in `plan_packs`.
        multiple: Packs of one optimiser step: ranks x gradient accumulation steps.

    Raises:
        ValueError: as `plan_packs`; there is no entry; or `multiple` is below 1.
    """

    def __init__(
        self, tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, seed: int, multiple: int = 1
    ) -> None:
        self._tokens, self._tiles = _checked_lengths(tokens, tiles, max_tokens, max_tiles)
        _check_multiple(multiple, len(self._tokens))
        self.max_tokens, self.max_tiles, self.seed, self.multiple = max_tokens, max_tiles, seed, multiple
        first = self._best_fit(_permutation(self.num_entries, seed, 0))
        self._length = _round_up(first.count, multiple)
        self._first = _split(first, self._length)

    def __len__(self) -> int:
        return self._length

    @property
    def num_entries(self) -> int:
        """Entries of an epoch."""
        return len(self._tokens)

    def fingerprint(self) -> str:
        """Hash of all arguments: equal ones give equal plans."""
        settings = self.max_tokens, self.max_tiles, self.seed, self.multiple
        return hash_of("packs", self._tokens.tobytes(), self._tiles.tobytes(), settings)

    @property
    def fill(self) -> Fill:
        """How full the packs are, dummy tiles not counted."""
        tokens, tiles = int(self._tokens.sum()), int(self._tiles.sum())
        fewest = max(-(-tokens // self.max_tokens), -(-tiles // self.max_tiles))
        room = self.max_tokens * self._length, self.max_tiles * self._length
        return Fill(tokens / room[0], tiles / room[1], fewest / self._length)

    def packs(self, epoch: int) -> Packs:
        """The packs of an epoch: `len(self)`, each entry in exactly one."""
        return _gather(self._assignment(epoch), _permutation(self._length, self.seed, epoch, of_packs=True))

    def _assignment(self, epoch: int) -> _Assignment:
        if epoch == 0:
            return self._first
        drawn = _permutation(self.num_entries, self.seed, epoch)
        for order in (drawn, self._largest_first(drawn)):
            assignment = self._best_fit(order)
            if assignment.count <= self._length:
                return _split(assignment, self._length)
        return self._first

    def _largest_first(self, order: np.ndarray) -> np.ndarray:
        """`order` sorted in blocks, by the share of the budget that an entry takes more of."""
        shares = np.maximum(self._tokens * self.max_tiles, self._tiles * self.max_tokens)
        return order[np.lexsort((-shares[order], np.arange(len(order)) // WINDOW))]

    def _best_fit(self, order: np.ndarray) -> _Assignment:
        return _best_fit(self._tokens, self._tiles, self.max_tokens, self.max_tiles, order, WINDOW)


def plan_batches(
    tokens: np.ndarray, batch_size: int, seed: int, epoch: int, group: bool = False, multiple: int = 1
) -> Packs:
    """Padded batches of one epoch.

    All have `batch_size` entries but those of the last step, which share what is left evenly instead of repeating
    entries; some of them may be empty, never all.

    Args:
        tokens: (E,) tokens of every entry.
        batch_size: Entries of a batch.
        seed, epoch: As in `plan_packs`.
        group: Sort the entries of each step, longest first, so that batches hold entries of like length (the
            original's `group_by_length`). The longest of all opens the epoch: what does not fit in memory fails at
            once.
        multiple: Batches of one optimiser step: ranks x gradient accumulation steps.

    Returns:
        Batches that hold each entry exactly once, `multiple` per step; their number is that of any epoch.

    Raises:
        ValueError: there is no entry, or an argument is out of its range.
    """
    tokens = _checked(tokens, "tokens", 1)
    _check_multiple(multiple, len(tokens))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order, step = _permutation(len(tokens), seed, epoch), batch_size * multiple
    if group:
        longest = int(np.argmax(tokens[order]))
        order[[0, longest]] = order[[longest, 0]]
        order = order[np.lexsort((-tokens[order], np.arange(len(order)) // step))]
    steps, rest = divmod(len(tokens), step)
    sizes = np.full(steps * multiple, batch_size)
    if rest:
        sizes = np.append(sizes, rest // multiple + (np.arange(multiple) < rest % multiple))
    return Packs(order, _offsets(sizes))


class BatchPlanner:
    """`plan_batches` with the interface of `EpochPlanner`; arguments and errors as there."""

    def __init__(self, tokens: np.ndarray, batch_size: int, seed: int, group: bool = False, multiple: int = 1) -> None:
        self._tokens = _checked(tokens, "tokens", 1)
        self.batch_size, self.seed, self.group, self.multiple = batch_size, seed, group, multiple
        self._length = len(self.packs(0))

    def __len__(self) -> int:
        return self._length

    @property
    def num_entries(self) -> int:
        """Entries of an epoch."""
        return len(self._tokens)

    def fingerprint(self) -> str:
        """As of `EpochPlanner`."""
        settings = self.batch_size, self.seed, self.group, self.multiple
        return hash_of("batches", self._tokens.tobytes(), settings)

    def packs(self, epoch: int) -> Packs:
        """The batches of an epoch: `len(self)`, each entry in exactly one."""
        return plan_batches(self._tokens, self.batch_size, self.seed, epoch, self.group, self.multiple)


# ---------------------------------------------------------------------------------------------------- best-fit packing


def _best_fit(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int, order: np.ndarray, window: int
) -> _Assignment:
    """Assigns entries in the given order.

    Open packs are kept sorted by the room left in the tighter budget (that which the data as a whole fills more), then
    by that in the other one, so a search starts where the tighter budget suffices and mostly ends there.
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
    return _Assignment(order, np.array(pack_of, dtype=np.int64), count)


def _search(room: list[tuple[int, int]], need: tuple[int, int]) -> int:
    """Place of the first pack with enough room of both kinds, `len(room)` if there is none."""
    place = bisect_left(room, need)
    while place < len(room) and room[place][1] < need[1]:
        place += 1
    return place


def _split(assignment: _Assignment, target: int) -> _Assignment:
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
    return _Assignment(order, pack_of, len(members))


def _gather(assignment: _Assignment, sequence: np.ndarray) -> Packs:
    """The packs in the order of `sequence`, a permutation of their numbers; numbers of no pack give empty ones."""
    place = np.empty_like(sequence)
    place[sequence] = np.arange(len(sequence))
    pack_of = place[assignment.pack_of]
    entries = assignment.order[np.argsort(pack_of, kind="stable")]
    return Packs(entries, _offsets(np.bincount(pack_of, minlength=len(sequence))))


# ------------------------------------------------------------------------------------------------------------- helpers


def _permutation(count: int, seed: int, epoch: int, of_packs: bool = False) -> np.ndarray:
    """A random order, one for entries and one for packs.

    From raw bits, whose values numpy never changes; methods of its `Generator` may differ between versions, and a run
    must find the same plan when it is resumed.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got {seed} and {epoch}")
    # The last word is never 0: numpy seeds [seed, 0, 0] as it does a plain seed, which may have made the data's order.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, 2 if of_packs else 1]))
    return np.argsort(bits.random_raw(count), kind="stable")


def _offsets(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _check_multiple(multiple: int, entries: int) -> None:
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1 (ranks x gradient accumulation steps), got {multiple}")
    if not entries:
        raise ValueError("there is no entry to plan: the data sets are empty, or every row was left out")


def _checked(lengths: np.ndarray, name: str, lowest: int) -> np.ndarray:
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and not np.issubdtype(lengths.dtype, np.integer)):
        raise ValueError(f"{name} must be a vector of integers, got {lengths.dtype} of shape {lengths.shape}")
    if lengths.size and lengths.min() < lowest:
        raise ValueError(f"{name} of entry {int(lengths.argmin())} is {lengths.min()}, less than {lowest}")
    return lengths.astype(np.int64)


def _checked_lengths(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens, tiles = _checked(tokens, "tokens", 1), _checked(tiles, "tiles", 0)
    if len(tokens) != len(tiles):
        raise ValueError(f"tokens has {len(tokens)} entries, tiles has {len(tiles)}; they must be as many")
    for name, lengths, limit in (("max_tokens", tokens, max_tokens), ("max_tiles", tiles, max_tiles)):
        if limit < 1:
            raise ValueError(f"{name} must be at least 1, got {limit}")
        if lengths.size and lengths.max() > limit:
            entry = int(np.argmax(lengths > limit))
            raise ValueError(
                f"entry {entry} has {lengths[entry]} {name.removeprefix('max_')}, more than {name}={limit}; leave it "
                "out of the plan or raise the limit"
            )
    return tokens, tiles
