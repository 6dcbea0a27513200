"""Calibration data for `compression`: rows of a training file as the decoder reads them, visual tokens included.

Rows take the way of training (`data`, `training.collation`): the same template, tiles and tokens. Vision encoder and
projector stay as they are, so what they make of an image does not change while the decoder is compressed; it is
computed once per row and handed over as embeddings. Nothing is cut: rows beyond the limit are left out and counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ...configuration_internvl_chat import InternVLChatConfig
from ...data.dataset import ConversationDataset, SequenceTooLongError
from ...data.records import RecordFile
from ...modeling_internvl_chat import InternVLChatModel
from ...processing_internvl import InternVLProcessor
from ...training.collation import InternVLCollator


@dataclass(frozen=True)
class CalibrationRows:
    """Which rows of a file calibrate.

    Attributes:
        dataset: Their features.
        rows: Indices into it, in the order in which they are used.
        tokens: Of all of them, visual ones included.
        tiles: Of all of them.
        with_images: Rows that have any.
        too_long: Rows that were drawn and left out, being longer than the limit.
    """

    dataset: ConversationDataset
    rows: tuple[int, ...]
    tokens: int
    tiles: int
    with_images: int
    too_long: int

    def __str__(self) -> str:
        text = (
            f"{len(self.rows):,} rows, {self.with_images:,} with images: {self.tokens:,} tokens, {self.tiles:,} tiles"
        )
        text += f"; {self.too_long:,} longer rows left out" if self.too_long else ""
        return text if self.tiles else f"{text}; without images the decoder never saw visual tokens"


def choose_rows(
    path: str | Path,
    images: str | Path | None,
    processor: InternVLProcessor,
    config: InternVLChatConfig,
    *,
    samples: int,
    max_length: int,
    seed: int = 0,
) -> CalibrationRows:
    """Draws rows of a training file; media are measured here and decoded later.

    Args:
        path: `.jsonl` or `.json`, in any format that training takes.
        images: Folder that paths in the rows are relative to; None for the current one.
        processor: Of the checkpoint.
        config: Of the checkpoint.
        samples: How many; all that fit, if the file has fewer.
        max_length: Most tokens of a row, visual ones included.
        seed: Of the draw.

    Raises:
        FileNotFoundError: there is no such file.
        RecordError: a drawn row cannot be used.
        ValueError: no row fits.
    """
    records = RecordFile(path, images or "")
    dataset = ConversationDataset(records, processor.tokenizer, processor.image_processor, config, max_length)
    rows: list[int] = []
    lengths, too_long = [], 0
    for row in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        if len(rows) == samples:
            break
        try:
            lengths.append(dataset.measure(row))
            rows.append(row)
        except SequenceTooLongError:
            too_long += 1
    if not rows:
        raise ValueError(
            f"rows: none of the {len(dataset)} rows of {path} has at most {max_length} tokens; raise max_length"
            if len(dataset)
            else f"rows: {path} has no rows"
        )
    tiles = [length.tiles for length in lengths]
    tokens = sum(length.tokens for length in lengths)
    return CalibrationRows(dataset, tuple(rows), tokens, sum(tiles), sum(map(bool, tiles)), too_long)


class EmbeddedRows(Dataset):
    """What the language model reads of each row, one at a time and so without padding.

    Args:
        model: Encodes the images, on the device that its vision encoder is on; embeddings are where its table is.
        chosen: The rows.
    """

    def __init__(self, model: InternVLChatModel, chosen: CalibrationRows) -> None:
        self.model = model
        self.chosen = chosen
        self.collate = InternVLCollator(0, model.config.image_size)

    def __len__(self) -> int:
        return len(self.chosen.rows)

    @torch.no_grad()
    def __getitem__(self, index: int) -> dict[str, Any]:
        """`inputs_embeds` (1, L, D) with visual tokens in their places."""
        row = self.chosen.dataset[self.chosen.rows[index]]  # by the index: iteration ends by its IndexError
        batch = self.collate([row])
        vision = self.model.vision_model
        pixels = batch["pixel_values"].to(vision.device, vision.dtype)
        flags = batch["image_flags"].to(vision.device)
        return {"inputs_embeds": self.model.embed_prompt(batch["input_ids"], pixels, image_flags=flags)}
