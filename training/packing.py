"""Which samples of an epoch share a sequence: a pure function of lengths, seed and epoch.

Packing follows the InternVL 2.5 report (arXiv 2412.05271, multimodal data packing): select a sample, search an open
pack with room for it, pack it, maintain the list of open packs. The original does that while it trains, per worker;
here the epoch is planned at once, so that it has a length, every sample is seen exactly once whatever the number of
workers, and a run can be resumed anywhere. The algorithm is `best_fit`, padded batches are `batching`. Nothing is cut
or dropped here, no file is read and no tensor made.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..data.lengths import hash_of
from .best_fit import Assignment, best_fit, gather, split_packs
from .plans import EpochPlans, Packs, as_lengths, check_multiple, permutation

# Open packs that a sample may go to. Four times as many fill the packs at most 0.1 % better on the mixtures tried.
WINDOW = 64


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
    order = permutation(len(tokens), seed, epoch)
    assignment = best_fit(tokens, tiles, max_tokens, max_tiles, order, window)
    return gather(assignment, permutation(assignment.count, seed, epoch, of_packs=True))


class EpochPlanner(EpochPlans):
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
        check_multiple(multiple, len(self._tokens))
        self.max_tokens, self.max_tiles, self.seed, self.multiple = max_tokens, max_tiles, seed, multiple
        first = self._best_fit(permutation(self.num_entries, seed, 0))
        self._length = _round_up(first.count, multiple)
        self._first = split_packs(first, self._length)

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
        return gather(self._assignment(epoch), permutation(self._length, self.seed, epoch, of_packs=True))

    def _assignment(self, epoch: int) -> Assignment:
        if epoch == 0:
            return self._first
        drawn = permutation(self.num_entries, self.seed, epoch)
        for order in (drawn, self._largest_first(drawn)):
            assignment = self._best_fit(order)
            if assignment.count <= self._length:
                return split_packs(assignment, self._length)
        return self._first

    def _largest_first(self, order: np.ndarray) -> np.ndarray:
        """`order` sorted in blocks, by the share of the budget that an entry takes more of."""
        shares = np.maximum(self._tokens * self.max_tiles, self._tiles * self.max_tokens)
        return order[np.lexsort((-shares[order], np.arange(len(order)) // WINDOW))]

    def _best_fit(self, order: np.ndarray) -> Assignment:
        return best_fit(self._tokens, self._tiles, self.max_tokens, self.max_tiles, order, WINDOW)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _checked_lengths(
    tokens: np.ndarray, tiles: np.ndarray, max_tokens: int, max_tiles: int
) -> tuple[np.ndarray, np.ndarray]:
    tokens, tiles = as_lengths(tokens, "tokens", 1), as_lengths(tiles, "tiles", 0)
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
