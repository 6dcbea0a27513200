"""Batches of sample keys for a `DataLoader`, from the plan of an epoch.

Every rank walks the same plan; accelerate gives rank r of R the batches r, r + R, ... and skips batches on resuming.
Both need only what is here: an iteration that is a function of the epoch, and a length that no epoch changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
from torch.utils.data import Sampler

from .plans import Packs


class SampleKey(NamedTuple):
    """What a data set is asked for; enough to seed augmentation, whichever worker serves it.

    Attributes:
        row: Index of the row.
        copy: Its how many-th occurrence in the epoch, from 0.
        epoch: The epoch.
    """

    row: int
    copy: int
    epoch: int


class Planner(Protocol):
    """Plans epochs of one length: `EpochPlanner`, `BatchPlanner`."""

    num_entries: int

    def __len__(self) -> int: ...

    def packs(self, epoch: int) -> Packs: ...

    def fingerprint(self) -> str: ...


class PlanBatchSampler(Sampler[list[SampleKey]]):
    """The batch sampler of a plan; pass it as `DataLoader(..., batch_sampler=...)`.

    It has no `batch_size`, because batches differ in size: accelerate then hands out whole batches. Call `set_epoch`
    on this very object at the start of every epoch: accelerate's wrappers hold it, but do not always forward the call.

    Args:
        planner: The plan.
        rows: (entries,) row of each entry of the plan; None where entries are rows.

    Raises:
        ValueError: `rows` does not fit the plan.
    """

    def __init__(self, planner: Planner, rows: np.ndarray | None = None) -> None:
        rows = np.arange(planner.num_entries) if rows is None else np.asarray(rows)
        if rows.shape != (planner.num_entries,):
            raise ValueError(f"rows has shape {rows.shape}, but the plan has {planner.num_entries} entries")
        self.planner = planner
        self.epoch = 0
        self._rows, self._copies = rows, _occurrences(rows)

    def set_epoch(self, epoch: int) -> None:
        """Makes the next iteration that of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.planner)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        """Batches of keys; an empty one keeps a rank in step with the others and is the collator's to fill."""
        epoch = self.epoch
        for pack in self.planner.packs(epoch):
            rows, copies = self._rows[pack].tolist(), self._copies[pack].tolist()
            yield [SampleKey(row, copy, epoch) for row, copy in zip(rows, copies, strict=True)]


def _occurrences(rows: np.ndarray) -> np.ndarray:
    """How often each value came before: `[7, 5, 7, 7]` gives `[0, 0, 1, 2]`."""
    order = np.argsort(rows, kind="stable")
    ordered, places = rows[order], np.arange(len(rows))
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(rows)]
    occurrences = np.empty(len(rows), dtype=np.int64)
    occurrences[order] = places - np.maximum.accumulate(np.where(first, places, 0))
    return occurrences
