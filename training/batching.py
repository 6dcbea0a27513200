"""Which samples of an epoch share a padded batch: a pure function of lengths, seed and epoch.

Sequences of several samples are `packing`. Nothing is cut or dropped here, no file is read and no tensor made.
"""

from __future__ import annotations

import numpy as np

from ..data.lengths import hash_of
from .plans import EpochPlans, Packs, as_lengths, check_multiple, offsets_of, permutation


def plan_batches(
    tokens: np.ndarray, batch_size: int, seed: int, epoch: int, group: bool = False, multiple: int = 1
) -> Packs:
    """Padded batches of one epoch.

    All have `batch_size` entries but those of the last step, which share what is left evenly instead of repeating
    entries; some of them may be empty, never all.

    Args:
        tokens: (E,) tokens of every entry.
        batch_size: Entries of a batch.
        seed, epoch: As in `packing.plan_packs`.
        group: Sort the entries of each step, longest first, so that batches hold entries of like length (the
            original's `group_by_length`). The longest of all opens the epoch: what does not fit in memory fails at
            once.
        multiple: Batches of one optimiser step: ranks x gradient accumulation steps.

    Returns:
        Batches that hold each entry exactly once, `multiple` per step; their number is that of any epoch.

    Raises:
        ValueError: there is no entry, or an argument is out of its range.
    """
    tokens = as_lengths(tokens, "tokens", 1)
    check_multiple(multiple, len(tokens))
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    order, step = permutation(len(tokens), seed, epoch), batch_size * multiple
    if group:
        longest = int(np.argmax(tokens[order]))
        order[[0, longest]] = order[[longest, 0]]
        order = order[np.lexsort((-tokens[order], np.arange(len(order)) // step))]
    steps, rest = divmod(len(tokens), step)
    sizes = np.full(steps * multiple, batch_size)
    if rest:
        sizes = np.append(sizes, rest // multiple + (np.arange(multiple) < rest % multiple))
    return Packs(order, offsets_of(sizes))


class BatchPlanner(EpochPlans):
    """`plan_batches` with the interface of `packing.EpochPlanner`; arguments and errors as there."""

    def __init__(self, tokens: np.ndarray, batch_size: int, seed: int, group: bool = False, multiple: int = 1) -> None:
        self._tokens = as_lengths(tokens, "tokens", 1)
        self.batch_size, self.seed, self.group, self.multiple = batch_size, seed, group, multiple
        self._length = len(self.packs(0))

    def fingerprint(self) -> str:
        """As of `packing.EpochPlanner`."""
        settings = self.batch_size, self.seed, self.group, self.multiple
        return hash_of("batches", self._tokens.tobytes(), settings)

    def packs(self, epoch: int) -> Packs:
        """The batches of an epoch: `len(self)`, each entry in exactly one."""
        return plan_batches(self._tokens, self.batch_size, self.seed, epoch, self.group, self.multiple)
