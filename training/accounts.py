"""What a run counts: samples, tokens, packed capacity, skipped rows; over all ranks, kept through a resume.

The counts of a step travel in one small vector, so that every rank knows them, and stops with the others where too
many rows of a data set cannot be used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..data.skipped import Skipped

logger = logging.getLogger(__name__)

# What a collator reports of a batch, see `collation`.
MEASURES = ("num_samples", "num_tokens", "num_slots", "num_tiles")


class TooManySkippedError(RuntimeError):
    """More rows of a data set cannot be used than the settings allow."""


class RunAccounts(TrainerCallback, ExportableState):
    """Counts of a run.

    Args:
        source_sizes: Rows of each data set.
        max_skip_share: Share of unusable rows of a data set past which the run stops.
    """

    def __init__(self, source_sizes: Mapping[str, int], max_skip_share: float = 0.01) -> None:
        self.source_sizes = dict(source_sizes)
        self.max_skip_share = max_skip_share
        self.sources = list(source_sizes)
        self.totals = dict.fromkeys(MEASURES, 0)
        self.skipped = dict.fromkeys(self.sources, 0)
        self._known: set[str] = set()
        self._logged = dict(self.totals)
        self._clock = time.monotonic()

    # ---------------------------------------------------------------------------------------------------------- counts

    @property
    def width(self) -> int:
        """Numbers in a step's vector."""
        return len(MEASURES) + len(self.sources)

    def take(self, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Removes the counts from the micro-batches of a step, logs what was skipped, once a row.

        Returns:
            float64 (width,), this rank's.
        """
        vector = torch.zeros(self.width, dtype=torch.float64)
        for batch in batches:
            for place, name in enumerate(MEASURES):
                vector[place] += batch.pop(name, 0)
            for entry in batch.pop("skipped", ()):
                if entry.where in self._known:  # the next epoch meets it again
                    continue
                self._known.add(entry.where)
                logger.warning("%s: skipped %s: %s", entry.source, entry.where, entry.reason)
                vector[len(MEASURES) + self.sources.index(entry.source)] += 1
        return vector

    def add(self, vector: torch.Tensor) -> None:
        """Books the counts of a step, summed over ranks.

        Raises:
            TooManySkippedError: on every rank alike.
        """
        numbers = [round(number) for number in vector.tolist()]
        for name, number in zip(MEASURES, numbers, strict=False):
            self.totals[name] += number
        for name, number in zip(self.sources, numbers[len(MEASURES) :], strict=True):
            self.skipped[name] += number
        self._check()

    def add_unusable(self, unusable: Sequence[Skipped]) -> None:
        """Books rows that were found unusable before training; each is logged.

        Raises:
            TooManySkippedError: they are too many of a data set.
        """
        for entry in unusable:
            logger.warning("%s: left out %s: %s", entry.source, entry.where, entry.reason)
            self.skipped[entry.source] += 1
        self._check(unusable[-1] if unusable else None)

    def _check(self, last: Skipped | None = None) -> None:
        for name, count in self.skipped.items():
            rows = self.source_sizes[name]
            if count > self.max_skip_share * rows:
                example = f"; one of them is {last.where}: {last.reason}" if last else "; the log names each"
                raise TooManySkippedError(
                    f"{name}: {count} of {rows} rows cannot be used, more than max_skip_share={self.max_skip_share}"
                    f"{example}. Mend the rows (`internvl validate` lists them), or raise data.max_skip_share"
                )

    # ------------------------------------------------------------------------------------------------------- reporting

    def rates(self) -> dict[str, float]:
        """Tokens a second and packing efficiency since the last call, and rows skipped so far."""
        now = time.monotonic()
        part = {name: self.totals[name] - self._logged[name] for name in MEASURES}
        seconds, self._clock, self._logged = now - self._clock, now, dict(self.totals)
        if not part["num_tokens"]:
            return {}
        return {
            "tokens_per_second": round(part["num_tokens"] / max(seconds, 1e-9), 1),
            "efficiency": round(part["num_tokens"] / part["num_slots"], 4),
            "skipped": sum(self.skipped.values()),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the counts of an interrupted run."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and isinstance(saved, dict):
            self.totals |= saved["attributes"]["totals"]
            self.skipped |= {k: v for k, v in saved["attributes"]["skipped"].items() if k in self.skipped}
        self._clock, self._logged = time.monotonic(), dict(self.totals)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"totals": dict(self.totals), "skipped": dict(self.skipped)}}
