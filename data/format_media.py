"""Pictures and videos of rows of any format: where they stand in a row, and what is known of each.

A source is a path, a URL or a data URL; of a video also its part and the frames that are wanted. Nothing is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..conversation import IMAGE_PLACEHOLDER
from .annotations import RecordError

VIDEO_PLACEHOLDER = "<video>"
PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}

Row = dict[str, Any]

_VIDEO_KEYS = {
    "clip": "clip", "fps": "fps", "nframes": "num_frames", "num_frames": "num_frames", "min_frames": "min_frames",
    "max_frames": "max_frames", "indices": "indices", "frame_indices": "indices",
}  # fmt: skip
_PLACEHOLDER = re.compile("|".join(map(re.escape, PLACEHOLDERS.values())))


@dataclass(frozen=True)
class Medium:
    """A picture or video as a part of a message; without a source it takes the next one of the row's list."""

    kind: str
    source: Any = None


def find_placeholders(text: str) -> Iterator[re.Match[str]]:
    """`<image>` and `<video>` in a text, in order."""
    return _PLACEHOLDER.finditer(text)


def listed_media(row: Row, kind: str, where: str) -> list[Any]:
    """Sources under `image` or `images` (`video`, `videos`) of the row."""
    keys = [key for key in (kind, f"{kind}s") if row.get(key)]
    if len(keys) > 1:
        raise RecordError(where, f"the row has {keys[0]!r} and {keys[1]!r}; keep one of them")
    value = row[keys[0]] if keys else []
    items = value if isinstance(value, list) else [value]
    if kind == "image":
        return [path_of(item, keys[0], where) for item in items]
    return [video_of(item, where, clip) for item, clip in zip(items, _clips(row, len(items), where), strict=True)]


def _clips(row: Row, videos: int, where: str) -> list[Any]:
    """The row's `clip` for each of its videos: one pair, or a list with a pair or null for each."""
    clip = row.get("clip")
    if not clip or not videos:
        return [None] * videos
    if isinstance(clip, list) and videos == 1 and not isinstance(clip[0], list):
        return [clip]
    if not isinstance(clip, list) or len(clip) != videos:
        raise RecordError(where, f"'clip' must have one [start, end] per video ({videos}), got {clip!r:.60}")
    return clip


def path_of(value: Any, name: str, where: str) -> str:
    """The path of a picture: a text, or an object that holds it; `name` is what errors call it."""
    if isinstance(value, dict):
        value = next((value[key] for key in ("url", "path", "image") if value.get(key)), value)
    if not isinstance(value, str) or not value:
        raise RecordError(where, f"{name!r} must be a path or a list of paths, got {value!r:.60}")
    return value.removeprefix("file://")


def video_of(value: Any, where: str, clip: Any = None) -> Row:
    """A video in the canonical form: `path`, and what the row says of its part and frames, not yet checked."""
    if not isinstance(value, dict):
        value = {"path": value}
    path: Any = next((value[key] for key in ("path", "url", "video") if value.get(key)), None)
    is_frames = isinstance(path, list) and path
    output: Row = {"path": [path_of(p, "video", where) for p in path] if is_frames else path_of(path, "video", where)}
    if clip:
        output["clip"] = clip
    for key, name in _VIDEO_KEYS.items():
        if value.get(key) is not None:
            output[name] = value[key]
    if value.get("video_start") is not None or value.get("video_end") is not None:
        output["clip"] = [value.get("video_start") or 0, value.get("video_end")]
    return output
