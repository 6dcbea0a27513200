"""Videos that Pillow reads: folders of frames and animations (GIF, APNG, WebP); and what every video source shares.

A source has an `info` and gives the pictures of some frames. Films are in `video_container_internvl.py`, the
functions to call in `video_internvl.py`. PyAV is not needed here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .tiling_internvl import ImageLoadError, load_image, to_rgb

FRAME_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
"""Files of a folder that count as frames; case does not matter."""

DEFAULT_DELAY_MS = 100.0
"""How long a frame of an animation without a duration is shown, as in browsers."""


class VideoLoadError(ValueError):
    """A video that cannot be used; the message names the file, the cause and the fix.

    Args:
        path: The file. A DataLoader raises the error of a worker again with the whole message as its only argument.
        cause: What is wrong.
        fix: How to put it right.
    """

    def __init__(self, path: str | Path, cause: object = "", fix: str = "") -> None:
        super().__init__(path, cause, fix)
        self.path, self.cause, self.fix = path, cause, fix

    def __str__(self) -> str:
        return f"cannot load video '{self.path}': {self.cause}. {self.fix}" if self.cause else str(self.path)


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video without its pictures.

    Attributes:
        frames: Frames that are shown, in the order of presentation; hidden and undecodable leading ones do not count.
        fps: Frames per second, on average where the rate varies; None if the source has no times.
        width, height: Size in pixels as stored, before any rotation.
        duration: Seconds from the first frame to the end of the last.
        timestamps: Seconds of every frame from the first one, where the rate varies; None for a constant rate.
    """

    frames: int
    fps: float | None
    width: int
    height: int
    duration: float | None = None
    timestamps: tuple[float, ...] | None = None

    def seconds(self, indices: Sequence[int] | np.ndarray) -> list[float] | None:
        """Moments at which frames are shown, counted from the first; None if the source has no times."""
        if self.timestamps is not None:
            return [self.timestamps[i] for i in indices]
        return None if self.fps is None else [float(i / self.fps) for i in indices]


class VideoSource(Protocol):
    """An open video."""

    @property
    def info(self) -> VideoInfo: ...

    def pictures(self, indices: list[int]) -> dict[int, Image.Image]:
        """RGB pictures of ascending, distinct indices. Where one of them is missing, the last decodable frame of the
        video is among the result, wanted or not."""
        ...

    def close(self) -> None: ...


def timed_info(
    times: np.ndarray,
    last_duration: float,
    size: tuple[int, int],
    rates: Sequence[float] = (),
) -> VideoInfo:
    """A `VideoInfo` from the moments of its frames.

    The rate is constant if, at one of `rates` or the measured one, no frame is off by more than a quarter of a period.
    The first rate that fits is taken: what a file states is more exact than what its rounded times yield.

    Args:
        times: Ascending seconds, float64 of shape (frames,).
        last_duration: Seconds that the last frame is shown; 0 if unknown.
        size: Width and height.
        rates: Rates that the file states.
    """
    times = times - times[0]
    frames = len(times)
    # Without a second frame only a statement or a duration tells the rate.
    measured = [(frames - 1) / times[-1]] if frames > 1 else [1 / last_duration] if last_duration > 0 else []
    for rate in (*rates, *measured):
        if np.abs(times - np.arange(frames) / rate).max() <= 0.25 / rate:
            return VideoInfo(frames, float(rate), *size, duration=float(frames / rate))
    if not measured:
        return VideoInfo(frames, None, *size)
    duration = float(times[-1] + (last_duration or 1 / measured[0]))
    return VideoInfo(frames, float(measured[0]), *size, duration=duration, timestamps=tuple(times.tolist()))


# --- folders ---------------------------------------------------------------------------------------------------------


def frame_files(folder: str | Path) -> list[Path]:
    """The frames of a folder in order: by N where every name ends in `_N` (as the original sorts), else naturally.

    In natural order numbers compare as numbers, so `f2` comes before `f10`. Hidden files, subfolders and files that
    are no pictures are left out.

    Raises:
        VideoLoadError: the folder has no frames.
    """
    files = [path for path in Path(folder).iterdir() if path.suffix.lower() in FRAME_SUFFIXES and path.is_file()]
    files = [path for path in files if not path.name.startswith(".")]
    if not files:
        kinds = ", ".join(sorted(FRAME_SUFFIXES))
        raise VideoLoadError(folder, "the folder has no frames", f"Its files must be of these kinds: {kinds}.")
    numbers = [re.search(r"_(\d+)$", path.stem) for path in files]
    if all(numbers):
        order = {path: int(number[1]) for path, number in zip(files, numbers, strict=True) if number}
        return sorted(files, key=lambda path: (order[path], _natural(path)))
    return sorted(files, key=_natural)


def _natural(path: Path) -> tuple[Any, ...]:
    # re.split alternates text and digits, so equal positions always compare equal types.
    parts = re.split(r"(\d+)", path.name)
    return (*(int(part) if part.isdigit() else part.lower() for part in parts), path.name)


class FolderSource:
    """Frames in a folder, one picture each.

    Args:
        path: The folder.
        fps: Frames per second; None leaves the frames without times.
        exif: Turn frames as their EXIF orientation says.
    """

    def __init__(self, path: str | Path, fps: float | None = None, exif: bool = True) -> None:
        self.path = path
        self.exif = exif
        self.files = frame_files(path)
        try:
            with Image.open(self.files[0]) as first:
                size = first.size
        except Exception as error:  # Pillow's format plugins raise many types on bad headers
            raise VideoLoadError(path, f"frame '{self.files[0].name}': {error}", "Export it again.") from error
        duration = None if fps is None else len(self.files) / fps
        self.info = VideoInfo(len(self.files), fps, *size, duration=duration)

    def pictures(self, indices: list[int]) -> dict[int, Image.Image]:
        try:
            return {index: load_image(self.files[index], exif=self.exif) for index in indices}
        except ImageLoadError as error:
            raise VideoLoadError(self.path, str(error).rstrip("."), "A folder must hold good frames only.") from error

    def close(self) -> None:
        """Nothing is kept open."""


# --- animations ------------------------------------------------------------------------------------------------------


def is_animation(path: str | Path) -> bool:
    """Whether the file begins as a GIF, PNG or WebP does, whatever its name says."""
    with open(path, "rb") as file:
        head = file.read(12)
    return head.startswith((b"GIF8", b"\x89PNG\r\n")) or (head[:4] == b"RIFF" and head[8:] == b"WEBP")


class AnimationSource:
    """A GIF, APNG or WebP; a still one is a video of one frame.

    Args:
        path: The file.
        fps: Frames per second, for a still picture only; an animation has its own durations.
    """

    def __init__(self, path: str | Path, fps: float | None = None) -> None:
        self.path = path
        try:
            self.image = Image.open(os.fspath(path))
        except Exception as error:  # as in load_image: Pillow raises OSError, SyntaxError, struct.error, ...
            raise self._damaged(error) from error
        try:
            # The default picture of such an APNG is for viewers without animation.
            self._skipped = int(bool(self.image.info.get("default_image")))
            frames = getattr(self.image, "n_frames", 1) - self._skipped
            delays = [self._delay(index) for index in range(frames)] if frames > 1 else [0.0]
        except Exception as error:
            self.close()
            raise self._damaged(error) from error
        times = np.cumsum([0.0, *delays[:-1]]) / 1000  # milliseconds add up exactly, seconds do not
        rates = ([fps] if fps else []) if frames == 1 else [1000 / float(np.median(delays))]
        self.info = timed_info(times, delays[-1] / 1000, self.image.size, rates)

    def _delay(self, index: int) -> float:
        """Milliseconds that a frame is shown."""
        self.image.seek(index + self._skipped)
        self.image.load()  # a WebP tells the duration only then
        return float(self.image.info.get("duration") or DEFAULT_DELAY_MS)

    def pictures(self, indices: list[int]) -> dict[int, Image.Image]:
        """See `VideoSource.pictures`."""
        found = {}
        for index in indices:
            try:
                self.image.seek(index + self._skipped)
                found[index] = to_rgb(self.image.copy())
            except Exception as error:
                raise self._damaged(error) from error
        return found

    def _damaged(self, error: Exception) -> VideoLoadError:
        return VideoLoadError(self.path, f"damaged animation ({error})", "Fetch or export the file again.")

    def close(self) -> None:
        self.image.close()
