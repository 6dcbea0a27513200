"""The reward shift of the quality term: the running mean of all rewards, over batches and ranks, kept by checkpoints.

A sum and a count, nothing else: how the rewards of a step are found, and when, is `mpo`'s business.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState


class RewardShift(TrainerCallback, ExportableState):
    """Mean of the rewards of chosen and rejected answers since the start of a run (delta of BCO, arXiv 2404.04656).

    The current batch is included before the shift is used, so that the first shift is the mean of the first batch. Sum
    and count are Python floats (float64), which JSON keeps to the last bit.

    Attributes:
        total: Sum of all rewards so far.
        count: Their number, two a pair.
    """

    def __init__(self) -> None:
        self.total = 0.0
        self.count = 0.0

    @property
    def value(self) -> float:
        """The mean; 0 before any reward."""
        return self.total / self.count if self.count else 0.0

    def update(self, total: float, count: float) -> float:
        """Adds rewards, summed over all ranks.

        Args:
            total: Their sum.
            count: Their number.

        Returns:
            The new mean.
        """
        self.total += total
        self.count += count
        return self.value

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes up the mean of an interrupted run; a new run starts without any."""
        name = type(self).__name__
        saved = (state.stateful_callbacks.get(name) or {}).get("attributes", {}) if state.global_step else {}
        self.total, self.count = saved.get("total", 0.0), saved.get("count", 0.0)
        state.stateful_callbacks.setdefault(name, {})  # of a checkpoint from another trainer

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": self.total, "count": self.count}}
