"""What all plans of an epoch share, packed or padded: lists of entries, random orders, and checks of lengths.

How entries come together is `packing` and `batching`; who walks a plan is `sampling`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


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


class EpochPlans:
    """What planners have in common: entries of known lengths, and as many batches in every epoch."""

    _tokens: np.ndarray
    _length: int

    def __len__(self) -> int:
        return self._length

    @property
    def num_entries(self) -> int:
        """Entries of an epoch."""
        return len(self._tokens)


def permutation(count: int, seed: int, epoch: int, of_packs: bool = False) -> np.ndarray:
    """A random order of `count` numbers, one for entries and one for packs.

    From raw bits, whose values numpy never changes; methods of its `Generator` may differ between versions, and a run
    must find the same plan when it is resumed.

    Raises:
        ValueError: `seed` or `epoch` is negative.
    """
    if seed < 0 or epoch < 0:
        raise ValueError(f"seed and epoch must not be negative, got {seed} and {epoch}")
    # The last word is never 0: numpy seeds [seed, 0, 0] as it does a plain seed, which may have made the data's order.
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, 2 if of_packs else 1]))
    return np.argsort(bits.random_raw(count), kind="stable")


def offsets_of(sizes: np.ndarray) -> np.ndarray:
    """Where lists of these sizes begin and end, as `Packs.offsets`: (packs,) to (packs + 1,) int64."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def as_lengths(lengths: np.ndarray, name: str, lowest: int) -> np.ndarray:
    """Lengths of entries as a vector of int64.

    Raises:
        ValueError: no vector, no integers, or one of them below `lowest`; the message calls them `name`.
    """
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or (lengths.size and not np.issubdtype(lengths.dtype, np.integer)):
        raise ValueError(f"{name} must be a vector of integers, got {lengths.dtype} of shape {lengths.shape}")
    if lengths.size and lengths.min() < lowest:
        raise ValueError(f"{name} of entry {int(lengths.argmin())} is {lengths.min()}, less than {lowest}")
    return lengths.astype(np.int64)


def check_multiple(multiple: int, entries: int) -> None:
    """Checks that an epoch can be planned: at least one batch per optimiser step, and an entry.

    Raises:
        ValueError: it cannot.
    """
    if multiple < 1:
        raise ValueError(f"multiple must be at least 1 (ranks x gradient accumulation steps), got {multiple}")
    if not entries:
        raise ValueError("there is no entry to plan: the data sets are empty, or every row was left out")
