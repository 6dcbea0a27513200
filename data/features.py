"""Records to model inputs: template, media, tiles, ids, labels.

The ids of a row are those of the inference prompt plus its answers (`prompting_internvl.py`), its tiles those of the
image processor. Nothing is cut: a row that is too long is an error, because a cut row has lost images or answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from PIL import Image

from ..conversation import IMAGE_PLACEHOLDER, Conversation, ImageSlot, Segment, TemplateError, get_template
from ..prompting_internvl import EncodedPrompt, ImageCountError, prompt_encoder
from .augmentation import RandomJPEG, Take
from .lengths import RowLength
from .media import Media, RowSettings, count_frames, picture_sizes, read_pictures, read_videos, spell_out
from .pairs import PairRecord
from .records import Record, RecordError, check_placeholders

Features = dict[str, Any]
DEFAULTS, FIRST = RowSettings(), Take()


class SequenceTooLongError(RecordError):
    """A row with more tokens than the limit."""


def to_conversation(record: Record, config: Any, media: Media | None = None) -> Conversation:
    """The record on the template of `config`; a system turn of the record replaces the default system text.

    Args:
        record: No `pretrain` row, which has no template.
        config: The `InternVLChatConfig`.
        media: What `spell_out` made of the record; None for a record without videos.
    """
    template = get_template(config.template)
    system = template.system_message if config.system_message is None else config.system_message
    conversation = Conversation(template, system)
    for speaker, parts in (media or spell_out(record, ())).turns:
        text = "".join(part for part in parts if isinstance(part, str))
        if speaker == "system":
            conversation.set_system_message(text)
        elif speaker == "human":
            conversation.append_message(template.roles[0], list(parts))
        else:
            conversation.append_message(template.roles[1], text)
    return conversation


def pretrain_segments(parts: Sequence[str | ImageSlot], end: str) -> list[Segment]:
    """Running text: all of it is learned, and the end token after it; pictures are not."""
    segments = [
        Segment(IMAGE_PLACEHOLDER, "image") if isinstance(part, ImageSlot) else Segment(part, "text", supervised=True)
        for part in parts
    ]
    return [*segments, Segment(end, supervised=True)]


def last_answer_only(segments: Sequence[Segment]) -> list[Segment]:
    """The segments with none supervised but those of the last answer and its end."""
    runs = [(learned, list(run)) for learned, run in groupby(segments, lambda segment: segment.supervised)]
    last = max((place for place, (learned, _) in enumerate(runs) if learned), default=-1)
    return [replace(s, supervised=place == last) for place, (_, run) in enumerate(runs) for s in run]


@dataclass(frozen=True)
class FeatureMaker:
    """Model inputs of records for one checkpoint.

    Args:
        tokenizer: The checkpoint's tokenizer.
        image_processor: The checkpoint's `InternVLImageProcessor`.
        config: The `InternVLChatConfig`; gives the template and the visual tokens of a tile.
    """

    tokenizer: Any
    image_processor: Any
    config: Any

    def features(self, record: Record, settings: RowSettings = DEFAULTS, take: Take = FIRST) -> Features:
        """Model inputs of one record, a pure function of the arguments.

        Several images share the tile budget: `max(1, max_dynamic_patch // images)` tiles each, as in the original
        (`train/dataset.py`); frames of videos are one tile each and do not count there.

        Returns:
            `input_ids` (L,) and `labels` (L,), int64, -100 where nothing is learned; `pixel_values` (tiles, 3, S, S)
            float32 or None; `num_patches`, the tiles of each image and frame, a list.

        Raises:
            RecordError: a medium cannot be read, or the row cannot be encoded. SequenceTooLongError: it is too long.
        """
        counts, pixels, tiles = self._read(record, settings, take)
        encoded = self._encode(record, counts, tiles, settings)
        return {
            "input_ids": torch.tensor(encoded.input_ids),
            "labels": torch.tensor(encoded.labels),
            "pixel_values": pixels,
            "num_patches": tiles,
        }

    def measure(self, record: Record, settings: RowSettings = DEFAULTS, take: Take = FIRST) -> RowLength:
        """Tokens, tiles and supervised tokens that `features` will give; pictures are not decoded."""
        counts, tiles = self._count(record, settings, take)
        encoded = self._encode(record, counts, tiles, settings)
        return RowLength(len(encoded.input_ids), sum(tiles), sum(encoded.supervised))

    def pair_features(self, pair: PairRecord, settings: RowSettings = DEFAULTS, take: Take = FIRST) -> Features:
        """Model inputs of a pair, a pure function of the arguments; the media are read and tiled once for both.

        Only the last answer and its end token are labelled; earlier answers belong to the prompt. The ids before the
        answer are those of the inference prompt, so they are the same in both sequences.

        Returns:
            `chosen_input_ids`, `chosen_labels`, `rejected_input_ids` and `rejected_labels`, (L,) int64 each with an L
            of its own; `pixel_values` and `num_patches` as from `features`.

        Raises:
            RecordError: as for `features`. SequenceTooLongError: one of the sequences is too long.
        """
        counts, pixels, tiles = self._read(pair.chosen, settings, take)
        output: Features = {}
        for name, record in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            encoded = self._encode(record, counts, tiles, settings, name)
            output[f"{name}_input_ids"] = torch.tensor(encoded.input_ids)
            output[f"{name}_labels"] = torch.tensor(encoded.labels)
        return {**output, "pixel_values": pixels, "num_patches": tiles}

    def measure_pair(self, pair: PairRecord, settings: RowSettings = DEFAULTS, take: Take = FIRST) -> RowLength:
        """What `pair_features` will give: tokens and supervised tokens of both sequences, tiles once."""
        counts, tiles = self._count(pair.chosen, settings, take)
        both = [
            self._encode(record, counts, tiles, settings, name)
            for name, record in (("chosen", pair.chosen), ("rejected", pair.rejected))
        ]
        return RowLength(sum(len(e.input_ids) for e in both), sum(tiles), sum(sum(e.supervised) for e in both))

    def _read(
        self, record: Record, settings: RowSettings, take: Take
    ) -> tuple[list[int], torch.Tensor | None, list[int]]:
        """Frames of each video, tiles of all media in reading order, and their numbers."""
        check_placeholders(record)
        pictures, videos = read_pictures(record, settings), read_videos(record, settings, take)
        counts = [len(frames) for frames in videos]
        frames = [frame for frames in videos for frame in frames]
        return counts, *self._tiles(pictures, frames, spell_out(record, counts), settings, take)

    def _count(self, record: Record, settings: RowSettings, take: Take) -> tuple[list[int], list[int]]:
        """Frames of each video and tiles of each medium, as `_read` will find them."""
        check_placeholders(record)
        counts = count_frames(record, settings, take)
        sizes = picture_sizes(record, settings)
        each = iter(self.image_processor.num_tiles_per_image(sizes, **self._options(settings)) if sizes else [])
        return counts, [1 if is_frame else next(each) for is_frame in spell_out(record, counts).frames]

    def _options(self, settings: RowSettings) -> dict[str, Any]:
        limits = {name: getattr(settings, name) for name in ("min_dynamic_patch", "max_dynamic_patch")}
        return {**{k: v for k, v in limits.items() if v is not None}, "divide_patches_by_images": True}

    def _tiles(
        self,
        pictures: list[Image.Image],
        frames: list[Image.Image],
        media: Media,
        settings: RowSettings,
        take: Take,
    ) -> tuple[torch.Tensor | None, list[int]]:
        """Tiles of pictures and frames in reading order, and their numbers."""
        jpeg = RandomJPEG(take.generator()) if settings.data_augment else None
        still = self._process(pictures, tile_transform=jpeg, **self._options(settings))
        moving = self._process(frames, dynamic_image_size=False)
        if still is None or moving is None:  # one tensor already: no copy
            return still or moving or (None, [])
        parts = [iter(pixels.split(tiles)) for pixels, tiles in (still, moving)]
        ordered = [next(parts[is_frame]) for is_frame in media.frames]
        return torch.cat(ordered), [len(part) for part in ordered]

    def _process(self, images: list[Image.Image], **options: Any) -> tuple[torch.Tensor, list[int]] | None:
        if not images:
            return None
        output = self.image_processor(images, **options)
        return output["pixel_values"], output["num_patches"].tolist()

    def _encode(
        self, record: Record, counts: list[int], tiles: list[int], settings: RowSettings, answer: str | None = None
    ) -> EncodedPrompt:
        """Ids and labels; with the name of an `answer` of a pair, only the last one is supervised."""
        media = spell_out(record, counts)
        lengths = [sum(self.config.tokens_per_tile(count)) for count in tiles]
        speaker, parts = media.turns[0]
        if speaker == "pretrain":
            segments = pretrain_segments(parts, self.tokenizer.eos_token or "")
        else:
            segments = to_conversation(record, self.config, media).segments()
        if answer is not None:
            segments = last_answer_only(segments)
        try:
            encoded = prompt_encoder(self.tokenizer).encode_supervised(segments, lengths)
        except (ImageCountError, TemplateError) as error:
            raise RecordError(record.where, str(error)) from error
        limit = settings.max_seq_length
        if limit is not None and len(encoded.input_ids) > limit:
            which = "" if answer is None else f"with its {answer} answer: "
            raise SequenceTooLongError(
                record.where,
                f"{which}{len(encoded.input_ids)} tokens ({sum(lengths)} of them visual) exceed "
                f"max_seq_length={limit}; "
                "raise the limit, lower max_dynamic_patch or the number of frames, or leave such rows out",
            )
        return encoded


def make_features(
    record: Record, tokenizer: Any, image_processor: Any, config: Any, max_seq_length: int | None = None
) -> Features:
    """`FeatureMaker.features` for one record with default settings."""
    return FeatureMaker(tokenizer, image_processor, config).features(record, RowSettings(max_seq_length))
