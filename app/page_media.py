"""Uploads of the demo page, read as if by an enemy: which files, how large, and only what they claim to be.

An upload is a path inside the page's upload folder, of one of a few formats that are told by their first bytes, and
within limits that are checked before anything is decoded. Links, folders and everything outside are refused with one
and the same message. What the model then sees of a picture is `page_view.py`.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image

from ..tiling_internvl import ImageLoadError, load_image

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
VIDEO_ENDINGS = (".mp4", ".mov", ".m4v", ".webm", ".mkv", ".avi")

# How mp4 and mov, webm and mkv, and avi begin. FFmpeg also knows playlists, which may name any file of this machine.
_FILM = re.compile(rb".{4}(?:ftyp|moov|mdat|wide)|\x1a\x45\xdf\xa3|RIFF.{4}AVI ", re.DOTALL)
_NO_UPLOAD = "This file is no upload of this page."


class UploadError(ValueError):
    """An upload that is refused; the message is for the visitor and names no place on the server."""


@dataclass(frozen=True)
class MediaLimits:
    """What one upload may be.

    Attributes:
        image_bytes: Size of an image file.
        image_pixels: Width times height, told by the header before anything is decoded.
        side: Longest side of an image or a frame, pixels: a strip of few pixels needs much memory to be resized.
        video_bytes: Size of a film.
        video_seconds: Length of a film.
        frame_pixels: Width times height of a film.
        frames: Most frames that are taken from a film.
    """

    image_bytes: int = 20 * 2**20
    image_pixels: int = 40_000_000
    side: int = 16_384
    video_bytes: int = 100 * 2**20
    video_seconds: float = 600.0
    frame_pixels: int = 4096 * 2304
    frames: int = 16


@dataclass(frozen=True)
class Upload:
    """What was read from a file.

    Attributes:
        name: The file's own name, shortened, without control characters.
        pictures: An image, or the frames of a video; upright RGB.
        seconds: When each frame is shown; None for an image, or where the film does not say.
        is_video: Whether the pictures are frames.
    """

    name: str
    pictures: tuple[Image.Image, ...]
    seconds: tuple[float, ...] | None = None
    is_video: bool = False


def shown_name(path: str | Path) -> str:
    """The last part of a path as it may be shown: printable, at most 60 characters."""
    name = re.split(r"[/\\]", str(path))[-1]
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= 60 else f"{name[:40]}...{name[-16:]}"


def read_upload(path: str | Path, folder: str | Path, limits: MediaLimits, frames: int = 8) -> Upload:
    """Reads an image or a film that lies in the upload folder.

    Args:
        path: Where the page says that the upload is; not trusted.
        folder: The upload folder.
        limits: What it may be.
        frames: Frames to take from a film, at most `limits.frames`.

    Raises:
        UploadError: it lies elsewhere, is a link, is too large, or is no image or film of a known format.
    """
    real, name = upload_file(path, folder), shown_name(path)
    ending = real.suffix.lower()
    if ending in VIDEO_ENDINGS:
        return _read_film(real, name, limits, min(frames, limits.frames))
    if ending in IMAGE_ENDINGS:
        return Upload(name, (_read_image(real, name, limits),))
    raise UploadError(f"{name}: only images ({_list(IMAGE_ENDINGS)}) and films ({_list(VIDEO_ENDINGS)}) are taken.")


def upload_file(path: str | Path, folder: str | Path) -> Path:
    """The real path of an upload.

    Raises:
        UploadError: it is not there, lies outside `folder`, goes through a link, or is no ordinary file.
    """
    try:
        root = Path(folder).resolve(strict=True)
        given = Path(os.path.abspath(root / path))
        real = given.resolve(strict=True)
        # The part below the folder must be without links; the folder itself may lie behind one, as /tmp may.
        linked = any(parent.is_symlink() for parent in _below(given, root, Path(os.path.abspath(folder))))
        ordinary = stat.S_ISREG(os.lstat(given).st_mode)
    except (OSError, ValueError, RuntimeError):  # missing, a NUL byte, a loop of links
        raise UploadError(_NO_UPLOAD) from None
    if linked or not ordinary or not real.is_relative_to(root) or real == root:
        raise UploadError(_NO_UPLOAD)
    return real


def _below(path: Path, *roots: Path) -> list[Path]:
    """`path` and its parents up to the first of the roots that holds it; none of them if none does."""
    root = next((root for root in roots if path.is_relative_to(root)), None)
    if root is None:
        return []
    return [parent for parent in (path, *path.parents) if parent != root and parent.is_relative_to(root)]


# --------------------------------------------------------------------------------------------------------------- image


def _read_image(path: Path, name: str, limits: MediaLimits) -> Image.Image:
    data = _read_bytes(path, name, limits.image_bytes)
    try:
        with Image.open(BytesIO(data), formats=IMAGE_FORMATS) as header:
            size = header.size
    except Image.DecompressionBombError:
        raise UploadError(f"{name}: too many pixels; at most {limits.image_pixels:,}.") from None
    except Exception:  # Pillow's readers raise many types on bad headers
        raise UploadError(f"{name}: no image of a known format ({_list(IMAGE_FORMATS)}), or damaged.") from None
    _check_side(size, name, limits)
    if size[0] * size[1] > limits.image_pixels:
        raise UploadError(f"{name}: {size[0]} x {size[1]} pixels are too many; at most {limits.image_pixels:,}.")
    try:
        return load_image(data, max_pixels=limits.image_pixels)
    except ImageLoadError as error:
        raise UploadError(f"{name}: {error.cause}.") from None


def _read_bytes(path: Path, name: str, most: int) -> bytes:
    _check_size(path, name, most)
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        raise UploadError(_NO_UPLOAD) from None
    with open(descriptor, "rb") as file:
        data = file.read(most + 1)
    if not data or len(data) > most:  # it may have grown since it was measured
        raise UploadError(f"{name}: {'it is empty' if not data else f'larger than {_megabytes(most)}'}.")
    return data


# --------------------------------------------------------------------------------------------------------------- video


def _read_film(path: Path, name: str, limits: MediaLimits, frames: int) -> Upload:
    from ..frames_internvl import segment_indices
    from ..video_internvl import VideoInfo, VideoLoadError, read_frames

    _check_size(path, name, limits.video_bytes)
    with path.open("rb") as file:
        head = file.read(16)
    if not _FILM.match(head):
        raise UploadError(f"{name}: no film of a known format ({_list(VIDEO_ENDINGS)}).")

    def choose(info: VideoInfo) -> Sequence[int]:
        _check_film(info.width, info.height, info.duration, name, limits)
        return segment_indices(info.frames, min(frames, info.frames)).tolist()

    try:
        film = read_frames(path, choose)
    except VideoLoadError as error:
        cause = error.__cause__ if isinstance(error.__cause__, UploadError) else None
        raise cause or UploadError(f"{name}: {_without_paths(error, path)}") from None
    seconds = None if film.timestamps is None else tuple(film.timestamps)
    return Upload(name, tuple(film.frames), seconds, is_video=True)


def _check_film(width: int, height: int, seconds: float | None, name: str, limits: MediaLimits) -> None:
    _check_side((width, height), name, limits)
    if width * height > limits.frame_pixels:
        raise UploadError(f"{name}: frames of {width} x {height} pixels are too large.")
    if seconds is None or seconds > limits.video_seconds:
        length = "an unknown time" if seconds is None else f"{seconds:.0f} s"
        raise UploadError(f"{name}: it lasts {length}; at most {limits.video_seconds:.0f} s are taken.")


def _without_paths(error: Exception, path: Path) -> str:
    cause = str(getattr(error, "cause", None) or "it cannot be read")
    return f"{cause.replace(str(path), 'the film').replace(str(path.parent), '')}."


# -------------------------------------------------------------------------------------------------------------- shared


def _check_size(path: Path, name: str, most: int) -> None:
    size = path.stat().st_size
    if size > most:
        raise UploadError(f"{name}: {_megabytes(size)} are too many; at most {_megabytes(most)} are taken.")
    if not size:
        raise UploadError(f"{name}: it is empty.")


def _check_side(size: tuple[int, int], name: str, limits: MediaLimits) -> None:
    if max(size) > limits.side:
        raise UploadError(f"{name}: a side of {max(size)} pixels is too long; at most {limits.side} are taken.")


def _megabytes(size: int) -> str:
    return f"{size / 2**20:.1f} MB"


def _list(words: Sequence[str]) -> str:
    return ", ".join(word.lstrip(".").upper() for word in words)
