"""Rows to a batch: right padding, labels, loss weights, tiles of all rows in one tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..losses_internvl import IGNORE_INDEX, LOSS_REDUCTIONS, length_to_weight


@dataclass(frozen=True)
class InternVLCollator:
    """Collates what `data.dataset.make_features` returns.

    Padding follows the lengths of the rows, never the value of an id: the pad id may be an ordinary token (the
    original collator masks every real token 0, `!` in Qwen's vocabulary).

    Args:
        pad_token_id: Fills `input_ids`; any valid id will do.
        image_size: Tile side in pixels.
        loss_reduction: `"token"`, `"sample"` or `"square"`, see `length_to_weight`.
    """

    pad_token_id: int
    image_size: int
    loss_reduction: str = "square"

    def __post_init__(self) -> None:
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {self.loss_reduction!r}")

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """One batch.

        Returns:
            `input_ids`, `labels` and `attention_mask` (B, L), int64; `loss_weight` (B, L) float32, the weight of each
            label, 0 elsewhere; `pixel_values` (tiles, 3, S, S); `image_flags` (tiles,), int64. A batch without any
            image gets one black tile with flag 0: it is encoded but not used, so that every rank runs the same modules
            and their gradients are zero instead of missing.
        """
        weights = [self._weights(row["labels"]) for row in rows]
        tiles = [row["pixel_values"] for row in rows if row["pixel_values"] is not None]
        flag = 1 if tiles else 0
        pixels = torch.cat(tiles) if tiles else torch.zeros(1, 3, self.image_size, self.image_size)
        return {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": _pad([row["labels"] for row in rows], IGNORE_INDEX),
            "attention_mask": _pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "loss_weight": _pad(weights, 0.0),
            "pixel_values": pixels,
            "image_flags": torch.full((len(pixels),), flag),
        }

    def _weights(self, labels: torch.Tensor) -> torch.Tensor:
        supervised = labels != IGNORE_INDEX
        return supervised.float() * length_to_weight(int(supervised.sum()), self.loss_reduction)


def _pad(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)
