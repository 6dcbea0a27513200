"""Pairs of answers to a batch: chosen and rejected as two sequences about one set of tiles, padded or packed.

Padding and packing are `collation.InternVLCollator`'s; what a pair is comes from `data.preference_dataset`. Which
pairs make a batch is `packing`'s and `batching`'s business, as for rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..data.skipped import Skipped
from ..losses_internvl import IGNORE_INDEX
from .collation import Batch, InternVLCollator, Row

ANSWERS = ("chosen", "rejected")
# What a batch holds beside the inputs of the model.
EXTRAS = ("label_counts", "loss_weight", "reference_log_probs", "rows", "places")


@dataclass(frozen=True)
class PreferenceCollator(InternVLCollator):
    """Collates pairs, `data.features.FeatureMaker.pair_features`; arguments and errors as of the parent.

    Sequences stand in the order chosen, rejected, chosen, rejected, ... Both of a pair read the same tiles, which are
    in the batch once: `tile_index` says which tile stands at which place.
    """

    def __call__(self, rows: Sequence[Row | Skipped]) -> Batch:
        """One batch.

        Args:
            rows: Pairs with `chosen_input_ids`, `chosen_labels`, `rejected_input_ids`, `rejected_labels`, (L,) int64,
                `pixel_values`, (tiles, 3, S, S) or None, and optionally `row`, the pair's number in its data set, and
                `reference_log_probs`, two numbers: those of both answers under the reference. Markers of pairs that
                were left out are handed on; without any pair the batch is a filler of no label.

        Returns:
            Of P pairs, as of the parent with 2P rows, but for `image_flags`: `tile_index` (places,), int64, takes its
            place. A batch without any image has one black tile that stands nowhere. Further:

            `label_counts` (2P,) int64, labels of each sequence that the shifted loss uses; `loss_weight`, of the
            chosen answers' labels, 0 on rejected ones; `places`, a list of where each pair was among `rows`;
            `reference_log_probs` (P, 2) float64 and `rows`, a list, where all pairs have them.

            The counts are of pairs (`num_samples`), of tokens of both sequences, and of tiles once.

        Raises:
            ValueError: a row is no pair.
        """
        batch = super().__call__(rows)
        kept = [row for row in rows if not isinstance(row, Skipped)]
        batch["label_counts"] = torch.tensor([_shifted_labels(s) for s in self._sequences(kept)], dtype=torch.long)
        batch["places"] = [place for place, row in enumerate(rows) if not isinstance(row, Skipped)]
        if all("row" in row for row in kept):
            batch["rows"] = [int(row["row"]) for row in kept]
        if kept and all("reference_log_probs" in row for row in kept):
            values = [torch.as_tensor(row["reference_log_probs"], dtype=torch.float64) for row in kept]
            batch["reference_log_probs"] = torch.stack(values)
        return batch

    def _sequences(self, rows: list[Row]) -> list[Row]:
        for row in rows:
            if "chosen_input_ids" not in row:
                raise ValueError(
                    f"a row has no chosen_input_ids but {sorted(row)}: MPOTrainer needs pairs of answers (a "
                    "PreferenceDataset); train on conversations with InternVLTrainer"
                )
        return [_sequence(row, answer) for row in rows for answer in ANSWERS]

    def _weights(self, row: Row) -> torch.Tensor:
        weights = super()._weights(row)
        return weights if row.get("learned") else torch.zeros_like(weights)

    def _tiles(self, rows: list[Row]) -> Batch:
        places, first = [torch.zeros(0, dtype=torch.long)], 0
        for row in rows:
            tiles = torch.arange(0 if row["pixel_values"] is None else len(row["pixel_values"])) + first
            places += [tiles] * len(ANSWERS)
            first += len(tiles)
        return {"pixel_values": self._pixels(rows)[0], "tile_index": torch.cat(places)}


def _sequence(row: Row, answer: str) -> Row:
    ids, labels = row[f"{answer}_input_ids"], row[f"{answer}_labels"]
    return {"input_ids": ids, "labels": labels, "learned": answer == ANSWERS[0]}


def _shifted_labels(sequence: Row) -> int:
    """Labels that a loss takes; the first token has nothing before it to be predicted from."""
    return int((sequence["labels"][1:] != IGNORE_INDEX).sum())
