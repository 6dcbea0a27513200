"""A batch of pairs taken apart: what the model reads, and what the loss needs beside it.

`preference_collation` makes the batches; the sums over their answers are `preference_losses`'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..losses_internvl import shift_targets
from .preference_collation import EXTRAS
from .preference_losses import sequence_sums


class Scores(NamedTuple):
    """What a model says of a batch: `labels` (M,), the log-probability of each label; `answers` (2P,), their sums;
    `router_loss`, of a mixture of experts, or None."""

    labels: torch.Tensor
    answers: torch.Tensor
    router_loss: torch.Tensor | None


def count_pairs(batch: dict[str, Any]) -> int:
    """Pairs in what `PreferenceCollator` made.

    Raises:
        ValueError: something else made it.
    """
    if "label_counts" not in batch:
        raise ValueError(
            f"a batch has no label_counts but {sorted(batch)}: MPOTrainer needs batches of PreferenceCollator"
        )
    return len(batch["label_counts"]) // 2


@dataclass(frozen=True)
class PairBatch:
    """P pairs.

    Attributes:
        inputs: Of the model, `labels` among them.
        counts: (2P,) int64, labels of each sequence: chosen, rejected, chosen, ...
        weights: (M,) float32, weight of each label in the generation term; 0 on rejected answers.
        reference: (2P,) log-probabilities of the answers under the reference, where the rows carry them, else None.
        rows: Number of each pair in its data set; None where the data set has none.
        places: Place of each pair among the rows of the batch, those that cannot be used counted in.
    """

    inputs: dict[str, Any]
    counts: torch.Tensor
    weights: torch.Tensor
    reference: torch.Tensor | None
    rows: Sequence[int] | None
    places: Sequence[int]

    @classmethod
    def of(cls, batch: dict[str, Any]) -> PairBatch:
        """Takes apart what `PreferenceCollator` made, on whatever device it is; `batch` itself is left as it is.

        Raises:
            ValueError: something else made it.
        """
        pairs = count_pairs(batch)
        inputs = {key: value for key, value in batch.items() if key not in EXTRAS}
        values = batch.get("reference_log_probs")
        if values is not None:
            values = torch.as_tensor(values, dtype=torch.float32, device=inputs["labels"].device).reshape(-1)
        return cls(
            inputs,
            batch["label_counts"],
            shift_targets(batch["labels"], batch["loss_weight"]).weights,
            values,
            batch.get("rows"),
            batch.get("places", range(pairs)),
        )

    @property
    def pairs(self) -> int:
        """P."""
        return len(self.counts) // 2

    def with_features(self, model: nn.Module) -> PairBatch:
        """The batch with visual features, without gradient, in place of its tiles.

        Args:
            model: The chat model itself, whose vision encoder and projector are not trained.
        """
        with torch.no_grad():
            features = model.extract_feature(self.inputs["pixel_values"])  # type: ignore[operator]
        rest = {key: value for key, value in self.inputs.items() if key != "pixel_values"}
        return replace(self, inputs={**rest, "visual_features": features})

    def score(self, model: nn.Module) -> Scores:
        """One forward pass of `model`, in its mode and with its gradient."""
        outputs = model(**{**self.inputs, "use_cache": False}, output_log_probs=True)
        return Scores(outputs.log_probs, sequence_sums(outputs.log_probs, self.counts), outputs.aux_loss)
