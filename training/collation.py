"""Rows to a batch, padded or packed: labels, loss weights, tiles of all rows in one tensor.

Which rows make a batch is `packing`'s business. Nothing is cut here; rows that a data set left out are dropped and
handed on, never replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.skipped import Skipped
from ..losses_internvl import IGNORE_INDEX, LOSS_REDUCTIONS, length_to_weight

Row = dict[str, Any]
Batch = dict[str, Any]
FILLER_TOKENS = 2  # the shortest row in which one position has a next one


@dataclass(frozen=True)
class InternVLCollator:
    """Collates what `data.dataset.make_features` returns.

    Padding follows the lengths of the rows, never the value of an id: the pad id may be an ordinary token (the
    original collator masks every real token 0, `!` in Qwen's vocabulary).

    With `packing` the rows follow one another in a single sequence and do not see each other: `position_ids` restart
    at 0, there is no mask, and there must be no cache, from which transformers makes out the rows on every attention
    backend. The lengths for flash attention are given too, which it would otherwise read back from the device in every
    layer; other backends ignore them. One thing is shared: rotary embeddings that depend on the length (Phi-3's
    longrope, dynamic scaling) go by the longest row of a pack, as they do by that of a padded batch.

    Args:
        pad_token_id: Fills `input_ids`; any valid id will do.
        image_size: Tile side in pixels.
        loss_reduction: `"token"`, `"sample"` or `"square"`, see `length_to_weight`.
        packing: One sequence of all rows instead of one row each.
        max_packed_tokens: Tokens that a pack was planned to hold at most, for `num_slots`; None for those it has.

    Raises:
        ValueError: unknown reduction.
    """

    pad_token_id: int
    image_size: int
    loss_reduction: str = "square"
    packing: bool = False
    max_packed_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {self.loss_reduction!r}")

    def __call__(self, rows: Sequence[Row | Skipped]) -> Batch:
        """One batch.

        Args:
            rows: Rows with `input_ids`, `labels` (both (L,), int64) and `pixel_values` ((tiles, 3, S, S) or None), and
                markers of rows that were left out. Without any row the batch is a filler: two pad tokens, no label.

        Returns:
            Inputs of the model. Of B padded rows: `input_ids`, `labels` and `attention_mask` (B, L), int64. Of a pack:
            `input_ids`, `labels` and `position_ids` (1, L), int64; `cu_seq_lens_q` and `cu_seq_lens_k` (rows + 1,),
            int32, with `max_length_q` and `max_length_k`, ints; `use_cache`, False.

            Of both: `loss_weight` (B, L) float32, the weight of each label, 0 elsewhere; `pixel_values`
            (tiles, 3, S, S); `image_flags` (tiles,), int64. A batch without any image gets one black tile with flag 0:
            it is encoded but not used, so that every rank runs the same modules and their gradients are zero instead
            of missing.

            For whoever counts, who takes them out before the model is called (`accounts.RunAccounts.take`): the ints
            `num_samples`; `num_tokens`, neither padding nor filler; `num_slots`, tokens there is room for;
            `num_tiles`, without the black one; and `skipped`, the list of markers, absent without any.
        """
        kept = [row for row in rows if not isinstance(row, Skipped)]
        sequences = self._sequences(kept) or [self._filler()]
        batch = self._packed(sequences) if self.packing else self._padded(sequences)
        batch.update(self._tiles(kept))
        batch.update(self._counts(kept, batch))
        skipped = [row for row in rows if isinstance(row, Skipped)]
        return {**batch, "skipped": skipped} if skipped else batch

    def _sequences(self, rows: list[Row]) -> list[Row]:
        """What the model reads: here each row, in another collator several sequences a row."""
        if any("chosen_input_ids" in row for row in rows):
            raise ValueError("a row is a pair of answers (chosen_input_ids): train on pairs with MPOTrainer")
        return rows

    def _padded(self, rows: list[Row]) -> Batch:
        return {
            "input_ids": _pad([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": _pad([row["labels"] for row in rows], IGNORE_INDEX),
            "attention_mask": _pad([torch.ones_like(row["input_ids"]) for row in rows], 0),
            "loss_weight": _pad([self._weights(row) for row in rows], 0.0),
        }

    def _packed(self, rows: list[Row]) -> Batch:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        ends = torch.cumsum(lengths, 0)
        starts = ends - lengths
        labels, weights = _join([row["labels"] for row in rows]), _join([self._weights(row) for row in rows])
        # A first token has nothing before it to predict it from; here the row before would have to. In a padded batch
        # the shift drops it, so it counts for the weight of its row in both.
        labels[:, starts], weights[:, starts] = IGNORE_INDEX, 0.0
        boundaries = torch.cat([starts, ends[-1:]]).to(torch.int32)
        longest = int(lengths.max())
        return {
            "input_ids": _join([row["input_ids"] for row in rows]),
            "labels": labels,
            "position_ids": _join([torch.arange(length) for length in lengths.tolist()]),
            "loss_weight": weights,
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "use_cache": False,
        }

    def _weights(self, row: Row) -> torch.Tensor:
        supervised = row["labels"] != IGNORE_INDEX
        return supervised.float() * length_to_weight(int(supervised.sum()), self.loss_reduction)

    def _filler(self) -> Row:
        ids = torch.full((FILLER_TOKENS,), self.pad_token_id)
        return {"input_ids": ids, "labels": torch.full_like(ids, IGNORE_INDEX)}

    def _tiles(self, rows: list[Row]) -> Batch:
        pixels, count = self._pixels(rows)
        return {"pixel_values": pixels, "image_flags": torch.full((len(pixels),), 1 if count else 0)}

    def _pixels(self, rows: list[Row]) -> tuple[torch.Tensor, int]:
        """Tiles of all rows, or a black one, and how many are theirs."""
        tiles = [row["pixel_values"] for row in rows if row["pixel_values"] is not None]
        if not tiles:
            return torch.zeros(1, 3, self.image_size, self.image_size), 0
        return torch.cat(tiles), sum(map(len, tiles))

    def _counts(self, rows: list[Row], batch: Batch) -> dict[str, int]:
        slots = self.max_packed_tokens if self.packing and self.max_packed_tokens else batch["input_ids"].numel()
        tokens = sum(len(sequence["input_ids"]) for sequence in self._sequences(rows))
        tiles = sum(len(row["pixel_values"]) for row in rows if row["pixel_values"] is not None)
        return {"num_samples": len(rows), "num_tokens": tokens, "num_slots": slots, "num_tiles": tiles}


def _pad(rows: list[torch.Tensor], value: float) -> torch.Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=value)


def _join(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(rows).unsqueeze(0)
