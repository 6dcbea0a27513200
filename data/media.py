"""The media of a record as one list of pictures in reading order, and how a run wants them read.

A video becomes lines `Frame-1: <image>` ... in its turn and frames of one tile each; pictures share the tile budget.
How many frames a row has is fixed for the whole run, so that its length is known before it is decoded; which ones is
drawn anew in every epoch.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..conversation import ImageSlot, split_image_placeholders
from ..frames_internvl import frame_prompt
from ..tiling_internvl import ImageLoadError, load_image, read_image_size
from ..video_internvl import VideoInfo, VideoLoadError, probe_video, read_frames
from .augmentation import Take
from .frame_sampling import draw_frame_count, training_indices
from .mixture import DataSource
from .records import FrameSampling, Record, RecordError, Video, VideoSlot

if TYPE_CHECKING:
    from ..training.arguments import DataArguments

Turn = tuple[str, tuple[str | ImageSlot, ...]]


@dataclass(frozen=True)
class RowSettings:
    """How rows are read.

    Attributes:
        max_seq_length: Most tokens of a row, visual ones included; None for no limit.
        min_dynamic_patch, max_dynamic_patch: Tiles of a picture; None for those of the image processor.
        data_augment: JPEG compression of the tiles of pictures.
        exif: Turn pictures, and frames that are files of their own, upright; boxes of published data sets refer to
            files as they are stored.
        min_num_frame, max_num_frame: Frames of a video.
        frame_sampling: `rand`, `middle` or `fpsX`, see `frame_sampling.get_frame_indices`.
    """

    max_seq_length: int | None = None
    min_dynamic_patch: int | None = None
    max_dynamic_patch: int | None = None
    data_augment: bool = False
    exif: bool = True
    min_num_frame: int = 8
    max_num_frame: int = 32
    frame_sampling: str = "rand"

    @classmethod
    def of_arguments(cls, data: DataArguments, max_seq_length: int | None = None) -> RowSettings:
        """What the arguments of a run say for every data set."""
        return cls(
            max_seq_length=max_seq_length,
            data_augment=data.data_augment,
            exif=data.exif,
            min_num_frame=data.min_num_frame,
            max_num_frame=data.max_num_frame,
            frame_sampling=data.frame_sampling,
        )

    def of(self, source: DataSource) -> RowSettings:
        """These settings with what a data set says otherwise."""
        names = ("min_dynamic_patch", "max_dynamic_patch", "data_augment", "exif")
        return replace(self, **{name: v for name in names if (v := getattr(source, name)) is not None})


@dataclass(frozen=True)
class Media:
    """What `spell_out` makes of a record.

    Attributes:
        turns: (speaker, parts), videos spelled out as frames.
        frames: For each picture in reading order, whether it is a frame of a video.
    """

    turns: tuple[Turn, ...]
    frames: tuple[bool, ...]


def spell_out(record: Record, counts: Sequence[int]) -> Media:
    """The turns of a record with each video as the lines of its frames; `counts` are their numbers."""
    turns, frames, numbers = [], [], iter(counts)
    for message in record.messages:
        parts: list[str | ImageSlot] = []
        before: object = None
        for part in message.parts:
            if isinstance(part, VideoSlot):
                count = next(numbers)
                parts += split_image_placeholders(frame_prompt(count))
                frames += [True] * count
            elif isinstance(part, ImageSlot):
                parts.append(part)
                frames.append(False)
            else:  # the last line of a video has its own newline
                parts.append(part.removeprefix("\n") if isinstance(before, VideoSlot) else part)
            before = part
        turns.append((message.speaker, tuple(parts)))
    return Media(tuple(turns), tuple(frames))


# --- videos ----------------------------------------------------------------------------------------------------------


def count_frames(record: Record, settings: RowSettings, take: Take) -> list[int]:
    """Frames of each video of a record, without decoding any.

    Raises:
        RecordError: a video cannot be used.
    """
    counts = _drawn_counts(record, settings, take)
    generator = np.random.default_rng(0)  # positions do not change how many there are
    with _naming(record):
        return [
            len(_choose(video, _probe(video), count, settings, generator))
            for video, count in zip(record.videos, counts, strict=True)
        ]


def read_videos(record: Record, settings: RowSettings, take: Take) -> list[list[Image.Image]]:
    """The frames of each video of a record, RGB; arguments and errors as in `count_frames`."""
    counts, generator = _drawn_counts(record, settings, take), take.generator()
    with _naming(record):
        return [
            _read(video, settings, partial(_choose, video, count=count, settings=settings, generator=generator))
            for video, count in zip(record.videos, counts, strict=True)
        ]


def _drawn_counts(record: Record, settings: RowSettings, take: Take) -> list[int]:
    """A number of frames for each video; `_choose` may have to take fewer."""
    generator = take.fixed_generator()
    counts = []
    for video in record.videos:
        wish = video.frames or FrameSampling()
        low = wish.num_frames or wish.min_frames or min(settings.min_num_frame, wish.max_frames or math.inf)
        high = wish.num_frames or wish.max_frames or max(settings.max_num_frame, low)
        counts.append(draw_frame_count(int(low), int(high), generator))
    return counts


def _choose(
    video: Video, info: VideoInfo, count: int, settings: RowSettings, generator: np.random.Generator
) -> Sequence[int]:
    """Frames of a video: those that its row names, else by the row's rate or the settings' rule.

    A rate that the row gives for single frames is not one to take them at (`_taken_at`), and no rate gives an exact
    number of frames: where a row wants one, they are drawn.
    """
    wish = video.frames or FrameSampling()
    if wish.indices is not None:
        return _checked(wish.indices, info.frames)
    rate = None if _taken_at(video) else wish.fps
    sampling = settings.frame_sampling if rate is None else f"fps{float(rate)!r}"
    if wish.num_frames and sampling != "middle":
        sampling = "rand"
    if info.fps is None and (video.clip or sampling.startswith("fps")):
        needs = f"clip={video.clip}" if video.clip else f"frame_sampling={sampling!r}"
        raise ValueError(
            f"{needs} needs a frame rate, which the video lacks; give 'fps' with a folder or list of frames"
        )
    most = wish.max_frames or settings.max_num_frame
    limits = (1, most) if sampling.startswith("fps") else (count, count)
    return training_indices(
        info.frames,
        sampling,
        generator=generator,
        min_frames=limits[0],
        max_frames=limits[1],
        fps=info.fps,
        clip=video.clip,
        timestamps=info.timestamps,
    ).tolist()


def _checked(indices: Sequence[int], frames: int) -> Sequence[int]:
    """Indices that a row names; measured and read alike, so that a bad one is found before training."""
    if outside := [index for index in indices if not 0 <= index < frames]:
        raise ValueError(f"the row names frame {outside[0]} of a video of {frames}; choose from 0 to {frames - 1}")
    return indices


def _taken_at(video: Video) -> float | None:
    """The rate of a folder or list of frames, if its row gives one; clips and `fpsX` go by it. None for films."""
    is_frames = isinstance(video.path, tuple) or os.path.isdir(video.path)
    return video.frames.fps if is_frames and video.frames else None


def _probe(video: Video) -> VideoInfo:
    if isinstance(video.path, tuple):
        return VideoInfo(len(video.path), _taken_at(video), 0, 0)
    return probe_video(video.path, fps=_taken_at(video))


def _read(video: Video, settings: RowSettings, choose: Callable[[VideoInfo], Sequence[int]]) -> list[Image.Image]:
    if not isinstance(video.path, tuple):
        return read_frames(video.path, choose, fps=_taken_at(video), exif=settings.exif).frames
    chosen = choose(_probe(video))
    pictures = {index: load_image(video.path[index], exif=settings.exif) for index in sorted(set(chosen))}
    return [pictures[index] for index in chosen]


# --- pictures --------------------------------------------------------------------------------------------------------


def picture_sizes(record: Record, settings: RowSettings) -> list[tuple[int, int]]:
    """Width and height of each picture of a record, from its header.

    Raises:
        RecordError: a picture cannot be read.
    """
    with _naming(record):
        return [read_image_size(source, exif=settings.exif) for source in record.images]


def read_pictures(record: Record, settings: RowSettings) -> list[Image.Image]:
    """The pictures of a record, RGB; errors as in `picture_sizes`."""
    with _naming(record):
        return [load_image(source, exif=settings.exif) for source in record.images]


@contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Errors of media as errors of the record, which name its file and line."""
    try:
        yield
    except (ImageLoadError, VideoLoadError, ValueError) as error:
        raise RecordError(record.where, str(error)) from error
