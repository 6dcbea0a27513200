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

    Unusable rows are counted per epoch, anew in each, since with several ranks another one may meet a row next time.

    Args:
        entries: Entries of an epoch in each data set: its rows, counted as often as they are repeated.
        max_skip_share: Share of unusable entries of a data set past which the run stops.
        plan: Fingerprint of the plan of the run, kept in its checkpoints; None where nothing is planned.
    """

    def __init__(self, entries: Mapping[str, int], max_skip_share: float = 0.01, plan: str | None = None) -> None:
        self.entries = dict(entries)
        self.plan = plan
        self.max_skip_share = max_skip_share
        self.sources = list(entries)
        self.totals = dict.fromkeys(MEASURES, 0)
        self.left_out = dict.fromkeys(self.sources, 0)
        self.skipped = dict.fromkeys(self.sources, 0)
        self._world_size = 1
        self._logged = dict(self.totals)
        self._clock = time.monotonic()

    # ---------------------------------------------------------------------------------------------------------- counts

    @property
    def width(self) -> int:
        """Numbers in a step's vector."""
        return len(MEASURES) + len(self.sources)

    def unusable(self) -> dict[str, int]:
        """Entries of each data set that are not trained on, in the current epoch: left out, and skipped so far."""
        return {name: self.left_out[name] + self.skipped[name] for name in self.sources}

    def leave_out(self, row: Skipped, copies: int) -> None:
        """Books a row that was found unusable before training, and logs it.

        Raises:
            TooManySkippedError: they are too many of its data set.
        """
        logger.warning("%s: left out %s: %s", row.source, row.where, row.reason)
        self.left_out[self.sources[self._place(row.source)]] += copies
        self._check(f"; one of them is {row.where}: {row.reason}")

    def take(self, batches: Sequence[dict[str, Any]]) -> torch.Tensor:
        """Removes the counts from the micro-batches of a step and logs what was skipped.

        Returns:
            float64 (width,), this rank's.
        """
        vector = torch.zeros(self.width, dtype=torch.float64)
        for batch in batches:
            for place, name in enumerate(MEASURES):
                vector[place] += batch.pop(name, 0)
            for entry in batch.pop("skipped", ()):
                logger.warning("%s: skipped %s: %s", entry.source, entry.where, entry.reason)
                vector[len(MEASURES) + self._place(entry.source)] += 1
        return vector

    def _place(self, source: str) -> int:
        """Where a data set is in `sources`; the first, where something around the data hides which ones there are."""
        return self.sources.index(source) if source in self.sources else 0

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
        self._check("; the log names each")

    def _check(self, example: str) -> None:
        for name, count in self.unusable().items():
            if count > self.max_skip_share * self.entries[name]:
                raise TooManySkippedError(
                    f"{name}: {count} of {self.entries[name]} rows cannot be used, more than "
                    f"max_skip_share={self.max_skip_share}{example}. Mend them (`internvl validate` lists all), or "
                    "raise data.max_skip_share"
                )

    # ------------------------------------------------------------------------------------------------------- reporting

    def rates(self) -> dict[str, float]:
        """Tokens a second and packing efficiency since the last call, and unusable rows of this epoch so far."""
        now = time.monotonic()
        part = {name: self.totals[name] - self._logged[name] for name in MEASURES}
        seconds, self._clock, self._logged = now - self._clock, now, dict(self.totals)
        if not part["num_tokens"]:
            return {}
        return {
            "tokens_per_second": round(part["num_tokens"] / max(seconds, 1e-9), 1),
            "efficiency": round(part["num_tokens"] / part["num_slots"], 4),
            "skipped": sum(self.unusable().values()),
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the counts of an interrupted run.

        Raises:
            ValueError: that run went by another plan.
        """
        saved = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and saved:
            if saved["attributes"].get("plan") != self.plan:
                raise ValueError(
                    "the checkpoint is of a run with other data, limits, batch sizes, number of processes x "
                    "accumulation steps, or seed: rows would be missed or repeated. Resume with the settings of that "
                    "run, or start a new one from its weights (model.model_name_or_path=CHECKPOINT)"
                )
            self.totals |= saved["attributes"]["totals"]
            self.skipped |= {k: v for k, v in saved["attributes"]["skipped"].items() if k in self.skipped}
        self._world_size = args.world_size
        state.stateful_callbacks.setdefault(type(self).__name__, {})  # of a checkpoint from another trainer
        self._clock, self._logged = time.monotonic(), dict(self.totals)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Counts unusable rows anew, unless an interrupted epoch goes on."""
        if float(state.epoch or 0).is_integer():
            self.skipped = dict.fromkeys(self.sources, 0)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the number of ranks tells whose files belong to it."""
        kept: dict[str, Any] = {"totals": dict(self.totals), "skipped": dict(self.skipped), "plan": self.plan}
        kept["world_size"] = self._world_size
        return {"args": {}, "attributes": kept}
