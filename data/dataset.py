"""Records to model inputs: template, tiles, ids, labels.

The ids of a row are those of the inference prompt plus its answers (`prompting_internvl.py`), its tiles those of the
image processor. Nothing is cut: a row that is too long is an error, because a cut row has lost images or answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.utils.data import Dataset, get_worker_info

from ..conversation import Conversation, get_template
from ..prompting_internvl import prompt_encoder
from ..tiling_internvl import ImageLoadError
from .records import Record, RecordError

logger = logging.getLogger(__name__)

Features = dict[str, Any]
OnError = Literal["raise", "skip"]


class SequenceTooLongError(RecordError):
    """A row with more tokens than the limit."""


class TooManySkippedError(RuntimeError):
    """More rows of a dataset cannot be used than the caller allows."""


def to_conversation(record: Record, config: Any) -> Conversation:
    """The record on the template of `config`; a system turn of the record replaces the default system text."""
    template = get_template(config.template)
    system = template.system_message if config.system_message is None else config.system_message
    conversation = Conversation(template, system)
    for message in record.messages:
        if message.speaker == "system":
            conversation.set_system_message(message.text)
        else:
            role = template.roles[0] if message.speaker == "human" else template.roles[1]
            conversation.append_message(role, message.text)
    return conversation


def make_features(
    record: Record, tokenizer: Any, image_processor: Any, config: Any, max_seq_length: int | None = None
) -> Features:
    """Model inputs of one record, a pure function of its arguments.

    Several images share the tile budget: `max(1, max_dynamic_patch // images)` tiles each, as in the original
    (`train/dataset.py`).

    Args:
        record: The conversation.
        tokenizer: The checkpoint's tokenizer.
        image_processor: The checkpoint's `InternVLImageProcessor`.
        config: The `InternVLChatConfig`; gives the template and the visual tokens of a tile.
        max_seq_length: Most tokens, visual ones included; None for no limit.

    Returns:
        `input_ids` (L,) and `labels` (L,), int64, -100 where nothing is learned; `pixel_values` (tiles, 3, S, S)
        float32 or None; `num_patches`, the tiles of each image, a list.

    Raises:
        RecordError: an image cannot be read, or the row cannot be encoded. SequenceTooLongError: the row is too long.
    """
    pixel_values, num_patches = _tiles(record, image_processor)
    lengths = [sum(config.tokens_per_tile(count)) for count in num_patches]
    encoded = prompt_encoder(tokenizer).encode_supervised(to_conversation(record, config).segments(), lengths)
    if max_seq_length is not None and len(encoded.input_ids) > max_seq_length:
        raise SequenceTooLongError(
            record.where,
            f"{len(encoded.input_ids)} tokens ({sum(lengths)} of them visual) exceed max_seq_length={max_seq_length}; "
            "raise the limit, lower max_dynamic_patch, or skip such rows with on_error='skip'",
        )
    return {
        "input_ids": torch.tensor(encoded.input_ids),
        "labels": torch.tensor(encoded.labels),
        "pixel_values": pixel_values,
        "num_patches": num_patches,
    }


def _tiles(record: Record, image_processor: Any) -> tuple[torch.Tensor | None, list[int]]:
    if not record.images:
        return None, []
    try:
        tiles = image_processor(list(record.images), divide_patches_by_images=True)
    except ImageLoadError as error:
        raise RecordError(record.where, str(error)) from error
    return tiles["pixel_values"], tiles["num_patches"].tolist()


@dataclass
class ConversationDataset(Dataset):
    """Map-style dataset of `make_features`.

    Args:
        records: Any sequence of records: a `RecordFile`, a list, or one that makes them up.
        tokenizer, image_processor, config, max_seq_length: As in `make_features`.
        on_error: `"raise"`, or `"skip"`: the next good row stands in for a bad one, which is logged once and kept in
            `skipped` (per DataLoader worker).
        max_skip_share: With `"skip"`, the largest share of bad rows before the run is stopped.
        name: Name of the dataset in logs.

    Raises:
        RecordError: from indexing, with `on_error="raise"`. TooManySkippedError: from indexing, with `"skip"`.
    """

    records: Sequence[Record]
    tokenizer: Any
    image_processor: Any
    config: Any
    max_seq_length: int | None = None
    on_error: OnError = "raise"
    max_skip_share: float = 0.01
    name: str = "dataset"

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")
        self.skipped: dict[int, RecordError] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Features:
        if not 0 <= index < len(self):  # iteration ends by this
            raise IndexError(f"{self.name}: row {index} of {len(self)}")
        for place in range(index, index + len(self)):
            try:
                return self._features(place % len(self))
            except RecordError as error:
                if self.on_error == "raise":
                    raise
                self._skip(place % len(self), error)
        raise TooManySkippedError(f"{self.name}: no row can be used")

    def _features(self, index: int) -> Features:
        record = self.records[index]
        return make_features(record, self.tokenizer, self.image_processor, self.config, self.max_seq_length)

    def _skip(self, index: int, error: RecordError) -> None:
        if index in self.skipped:
            return
        self.skipped[index] = error
        logger.warning("%s: skipped %s (%d so far)", self.name, error, len(self.skipped))
        worker = get_worker_info()
        rows = len(self) / (worker.num_workers if worker else 1)  # what this process sees of the dataset
        if len(self.skipped) > self.max_skip_share * rows:
            raise TooManySkippedError(
                f"{self.name}: {len(self.skipped)} of about {rows:.0f} rows cannot be used, more than max_skip_share="
                f"{self.max_skip_share}; the last one was {error}"
            ) from error
