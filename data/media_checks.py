"""Looks at the pictures and videos of a record: whether they are there and can be used, headers alone or decoded.

A check yields problems (`checks.Problem`) instead of raising. Damage behind a header, such as a truncated JPEG, shows
only when pictures are decoded.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from PIL import Image

from ..conversation import TemplateError
from ..prompting_internvl import ImageCountError
from ..tiling_internvl import MAX_PIXELS, ImageLoadError, load_image, read_image_size
from ..video_internvl import VideoLoadError, probe_video
from .augmentation import Take
from .checks import Problem
from .media import RowSettings, read_videos
from .records import Record, RecordError, Video

CLIP_TOLERANCE = 1.0
"""Seconds that a clip may end after its video: ends are often rounded up to whole seconds."""


def check_pictures(
    record: Record, exif: bool = True, decode: bool = False, max_pixels: int | None = MAX_PIXELS
) -> Iterator[Problem]:
    """Problems of the pictures of a record, and of frames that are files of their own.

    Args:
        record: The record.
        exif: Whether pictures are turned upright, which damaged EXIF data can prevent.
        decode: Decode every picture instead of reading its header.
        max_pixels: More than these are refused; None: only what Pillow refuses.
    """
    frames = [path for video in record.videos if isinstance(video.path, tuple) for path in video.path]
    for source in (*record.images, *frames):
        if isinstance(source, Image.Image):
            continue
        look = _look_once if isinstance(source, Path) else _look  # URLs may hold whole pictures: not kept
        if (problem := look(source, exif, decode, max_pixels)) is not None:
            yield problem


def _look(source: str | Path, exif: bool, decode: bool, max_pixels: int | None) -> Problem | None:
    if isinstance(source, Path) and not os.path.exists(source):
        return Problem("missing-media", f"there is no picture {str(source)!r}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = read_image_size(source, exif=exif)
            if max_pixels is not None and width * height > max_pixels:
                name = str(source) if isinstance(source, Path) else f"{source:.60}"
                return Problem(
                    "huge-media", f"{name!r} has {width}x{height} pixels, more than {max_pixels}; shrink it"
                )
            if decode:
                load_image(source, exif=exif, max_pixels=max_pixels)
    except ImageLoadError as error:
        bomb = isinstance(error.__cause__, Image.DecompressionBombError)
        return Problem("huge-media" if bomb else "damaged-media", str(error))
    return None


# Data sets ask several questions about a picture, mostly in neighbouring rows.
_look_once = lru_cache(maxsize=4096)(_look)


def check_videos(record: Record, settings: RowSettings, take: Take, decode: bool = False) -> Iterator[Problem]:
    """Problems of videos beyond those that measuring a row finds: absence, ends of clips, damage in their frames.

    Args:
        record: The record.
        settings: How frames are chosen.
        take: Whose frames are decoded.
        decode: Decode the frames that `take` would train on.
    """
    missing = [video.path for video in record.videos if not _exists(video)]
    for path in missing:
        yield Problem("missing-media", f"there is no video {str(path)!r}")
    for video in record.videos:
        if _exists(video) and video.clip is not None and math.isfinite(video.clip[1]):
            yield from _check_clip_end(video)
    if decode and record.videos and not missing:
        try:
            read_videos(record, settings, take)
        except RecordError as error:
            yield explain_unusable(record, error)


def _exists(video: Video) -> bool:
    return isinstance(video.path, tuple) or os.path.exists(video.path)


def _check_clip_end(video: Video) -> Iterator[Problem]:
    assert video.clip is not None
    duration = None
    with suppress(VideoLoadError):  # measuring the row reports it
        duration = _duration(video)
    start, end = video.clip
    if duration is not None and start < duration < end - CLIP_TOLERANCE:
        yield Problem(
            "clip-end", f"clip {[start, end]} of {str(video.path)!r} ends after the video, {duration:.1f} s long"
        )


def _duration(video: Video) -> float | None:
    """Seconds; None without times. A folder or list of frames goes by the rate that its row gives."""
    rate = None if video.frames is None else video.frames.fps
    if isinstance(video.path, tuple):
        return None if rate is None else len(video.path) / rate
    info = probe_video(video.path, fps=rate if os.path.isdir(video.path) else None)
    return info.duration if info.duration is not None or info.fps is None else info.frames / info.fps


def explain_unusable(record: Record, error: RecordError) -> Problem:
    """The problem behind an error of `media` or `features`, by what caused it."""
    cause = error.__cause__
    if isinstance(cause, (ImageCountError, TemplateError)):
        return Problem("encoding", error.problem)
    if isinstance(cause, (ImageLoadError, VideoLoadError)):
        if type(cause.__cause__) is ValueError:  # a choice of frames; errors of FFmpeg are subclasses
            return Problem(_choice(record), error.problem)
        return Problem("damaged-media", error.problem)
    if isinstance(cause, ValueError) and record.videos:
        return Problem(_choice(record), error.problem)
    return Problem("encoding", error.problem)


def _choice(record: Record) -> str:
    return "clip" if any(video.clip for video in record.videos) else "frames"
