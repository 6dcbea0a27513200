"""Where the frames of a film lie: from the time stamps of its packets, nothing decoded.

The index of a frame is its place in the order of presentation. Nothing here opens a file.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .video_film_internvl import FIX_FILE
from .video_sources_internvl import VideoLoadError

logger = logging.getLogger(__name__)


class Packet(NamedTuple):
    """What is kept of a packet, in the film's own units of time."""

    pts: int | None
    dts: int | None
    size: int
    is_keyframe: bool
    is_discard: bool


class Keyframe(NamedTuple):
    """Time stamps of a keyframe's packet."""

    pts: int
    dts: int | None


@dataclass(frozen=True)
class FrameIndex:
    """Places of frames and keyframes.

    Attributes:
        pts: Time stamps of the shown frames, ascending; empty where frames have to be counted.
        keys: Keyframes by time stamp.
        places: Time stamp of a keyframe to the place of its packet in the file.
        signatures: Time stamp and size of every packet, as they lie in the file.
    """

    pts: list[int] = field(default_factory=list)
    keys: list[Keyframe] = field(default_factory=list)
    places: dict[int, int] = field(default_factory=dict)
    signatures: list[tuple[int, int]] = field(default_factory=list)

    def key_number(self, index: int) -> int:
        """Which keyframe is the last at or before a frame."""
        return bisect_right(self.keys, self.pts[index], key=lambda key: key.pts) - 1


def index_packets(packets: Sequence[Packet], path: str | Path) -> FrameIndex:
    """The index of a film from all its packets, as they lie in the file; `path` is for errors.

    Raises:
        VideoLoadError: there are no frames, or none is shown.
    """
    first_key = next((n for n, packet in enumerate(packets) if packet.is_keyframe), 0)
    # What precedes the first keyframe, in the file or on the screen, cannot be decoded: a recording cut anywhere.
    packets = packets[first_key:]
    if not packets:
        raise VideoLoadError(path, "the film has no frames", FIX_FILE)
    stamps = [packet.pts for packet in packets if packet.pts is not None]
    if len(set(stamps)) < len(packets):
        logger.info("%s has no usable time stamps; its frames are decoded from the start and counted", path)
        return FrameIndex()
    pts = sorted(
        stamp for stamp, packet in zip(stamps, packets, strict=True) if not packet.is_discard and stamp >= stamps[0]
    )
    if not pts:
        raise VideoLoadError(path, "the film shows no frames", FIX_FILE)
    # Without any keyframe flag the first packet has to do; seeking then fails and decoding begins at the start.
    places = {stamps[n]: n for n, packet in enumerate(packets) if packet.is_keyframe or not n}
    keys = sorted(Keyframe(stamp, packets[n].dts) for stamp, n in places.items())
    sizes = [packet.size for packet in packets]
    return FrameIndex(pts, keys, places, list(zip(stamps, sizes, strict=True)))
