"""Videos to pictures: `probe_video` says what a video has, `read_frames` decodes the frames asked for.

Films need PyAV (the extra `video`); folders of frames and GIF, APNG and WebP animations do not. Which frames to ask
for says `frames_internvl.py`, and the image processor cuts them into tiles. Sound is ignored.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .video_container_internvl import ContainerSource, tail_allowance
from .video_sources_internvl import AnimationSource, FolderSource, VideoInfo, VideoLoadError, VideoSource, is_animation

__all__ = ["VideoFrames", "VideoInfo", "VideoLoadError", "probe_video", "read_frames"]

logger = logging.getLogger(__name__)

Sampling = Sequence[int] | np.ndarray | Callable[[VideoInfo], Sequence[int] | np.ndarray]


@dataclass(frozen=True)
class VideoFrames:
    """Decoded frames in the order asked for.

    Attributes:
        frames: RGB pictures, upright. A repeated index repeats the same object.
        indices: Their places in the video.
        timestamps: Their seconds, counted from the first frame of the video; None if it has no times.
        fps: Frames per second of the video, on average where the rate varies; None if it has no times.
    """

    frames: list[Image.Image]
    indices: list[int]
    timestamps: list[float] | None
    fps: float | None


def probe_video(path: str | Path, *, fps: float | None = None) -> VideoInfo:
    """Number of frames, rate and size of a video, without decoding where its file tells.

    An mp4 or mov file with a constant rate is probed from its index. Other films are read once, packet by packet; raw
    streams without time stamps are decoded and counted. Animations are gone through by Pillow.

    Args:
        path: A film, a GIF, APNG or WebP, or a folder of frames.
        fps: Frame rate where the source has no times: folders, still pictures and raw streams. Others ignore it.

    Raises:
        VideoLoadError: the video cannot be used; the message says why and what to do.
    """
    with _opened(path, fps) as source:
        return source.info


def read_frames(
    path: str | Path, sampling: Sampling, *, fps: float | None = None, threads: int = 1, exif: bool = True
) -> VideoFrames:
    """Decodes the frames asked for, each once, and no more of the video than they need.

    Args:
        path: As for `probe_video`.
        sampling: Indices in any order, or a function from the `VideoInfo` to them, such as
            `lambda info: segment_indices(info.frames, 8)`.
        fps: As for `probe_video`.
        threads: Decoder threads of films; one, because data loaders already run a process per core. 0 lets FFmpeg
            choose.
        exif: Turn the frames of a folder as their EXIF orientation says. Films are turned by their own matrix always.

    A film may lack frames at its end, up to one in twenty and always one: the last frame that is there stands for
    them, and a warning says so. `indices` and `timestamps` are those of the frames returned.

    Raises:
        VideoLoadError: the video cannot be used, an index lies outside it, or a wanted frame cannot be decoded.
    """
    with _opened(path, fps, threads, exif) as source:
        indices = _checked_indices(path, sampling, source.info)
        pictures = source.pictures(sorted(set(indices)))
        indices = _with_tail_clamped(path, indices, pictures, source.info.frames)
        timestamps, rate = source.info.seconds(indices), source.info.fps
    return VideoFrames([pictures[index] for index in indices], indices, timestamps, rate)


def _checked_indices(path: str | Path, sampling: Sampling, info: VideoInfo) -> list[int]:
    try:
        chosen = sampling(info) if callable(sampling) else sampling
    except ValueError as error:
        rate = "an unknown rate" if info.fps is None else f"{info.fps:g} fps"
        raise VideoLoadError(path, error, f"The video has {info.frames} frames at {rate}.") from error
    indices = [int(index) for index in chosen]
    if not indices:
        raise VideoLoadError(path, "no frames were asked for", "Give at least one index.")
    outside = [index for index in indices if not 0 <= index < info.frames]
    if outside:
        raise VideoLoadError(path, f"it has no frame {outside[0]}", f"Choose frames from 0 to {info.frames - 1}.")
    return indices


def _with_tail_clamped(
    path: str | Path, indices: list[int], pictures: dict[int, Image.Image], frames: int
) -> list[int]:
    missing = sorted(set(indices) - set(pictures))
    if not missing:
        return indices
    last = max(pictures, default=-1)
    if last < 0 or missing[0] < last or frames - 1 - last > tail_allowance(frames):
        cause = f"frame {missing[0]} of {frames} cannot be decoded"
        raise VideoLoadError(path, cause, "Fetch or export the file again, or choose a clip without the damage.")
    logger.warning("%s: frames %s cannot be decoded; frame %d, the last one, stands for them", path, missing, last)
    return [min(index, last) for index in indices]


@contextmanager
def _opened(path: str | Path, fps: float | None, threads: int = 1, exif: bool = True) -> Iterator[VideoSource]:
    if fps is not None and not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    source = FolderSource(path, fps, exif) if os.path.isdir(path) else _file_source(path, fps, threads)
    try:
        yield source
    finally:
        source.close()


def _file_source(path: str | Path, fps: float | None, threads: int) -> VideoSource:
    if not os.path.isfile(path):
        raise VideoLoadError(path, "no such file or folder", "Check the path; download videos from the network first.")
    try:
        if not os.path.getsize(path):
            raise VideoLoadError(path, "it is empty (0 bytes)", "Fetch or export the file again.")
        animation = is_animation(path)
    except OSError as error:
        raise VideoLoadError(path, error.strerror or error, "Make the file readable.") from error
    return AnimationSource(path, fps) if animation else ContainerSource(path, fps, threads)
