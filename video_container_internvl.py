"""Films (mp4, mkv, webm, avi, mpeg-ts, ...) through PyAV: which frames there are, and exactly those asked for.

The time stamps of all packets, which are read without decoding, say where the frames lie
(`video_index_internvl.py`); then only the pictures between a wanted frame and the keyframe before it are decoded. A
film without usable time stamps is decoded from its start and counted. How films are opened is in
`video_film_internvl.py`.

A truncated film is told by the index of mp4 and mov and by the header of Matroska, WebM, FLV and AVI. MPEG and raw
streams and fragmented mp4 do not say how long they should be: cut off, they are shorter films.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .video_film_internvl import FIX_FILE, Film, upright
from .video_index_internvl import FrameIndex, Keyframe, Packet, index_packets
from .video_sources_internvl import VideoInfo, VideoLoadError, timed_info

__all__ = ["TAIL_SHARE", "ContainerSource", "tail_allowance", "timed_info"]

logger = logging.getLogger(__name__)

TAIL_SHARE = 0.05
"""Share of the frames (and at least one) that may be missing at the end of a damaged film; more is an error."""

_ODD_END = 0.5  # seconds by which a stated duration may be off without meaning anything


def tail_allowance(frames: int) -> int:
    """Most frames that may be missing at the end of a film of `frames`."""
    return max(1, int(TAIL_SHARE * frames))


class ContainerSource(Film):
    """A film as a source of pictures.

    Args:
        path: The file.
        fps: Frame rate for films that have no time stamps; others state their own.
        threads: Decoder threads; 0 lets FFmpeg choose.

    Raises:
        VideoLoadError: as for `Film`; from `info` and `pictures`, for a film without frames or a truncated one.
    """

    def __init__(self, path: str | Path, fps: float | None = None, threads: int = 1) -> None:
        super().__init__(path, threads)
        self._given_fps = fps
        self._last_duration = 0.0
        self._frame_index: FrameIndex | None = None
        self._info: VideoInfo | None = None

    # --- what there is -----------------------------------------------------------------------------------------------

    @property
    def info(self) -> VideoInfo:
        """From the index of an mp4 or mov file where that tells all, else from the packets of the film.

        Frames are decoded and counted only where the packets have no time stamps.
        """
        if self._info is None:
            self._info = self._info_from_index() or self._info_from_packets() or self._info_from_counting()
        return self._info

    def _info_from_index(self) -> VideoInfo | None:
        """None unless all frames are listed, shown, inside the file and equally spaced."""
        if "mov" not in self._container.format.name:
            return None
        entries = list(self._stream.index_entries)
        if not self._stream.frames or len(entries) != self._stream.frames or any(e.is_discard for e in entries):
            return None
        if not entries[0].is_keyframe or max(entry.pos + entry.size for entry in entries) > os.path.getsize(self.path):
            return None
        steps = np.diff([entry.timestamp for entry in entries])
        if not self._stream.average_rate or (len(steps) and steps.max() - steps.min() > 1):
            return None
        times = np.array([entry.timestamp for entry in entries]) * self._tick
        info = timed_info(times, 0.0, self._size, self._rates)
        return info if info.timestamps is None else None

    @property
    def _index(self) -> FrameIndex:
        """From all packets, which are read once."""
        if self._frame_index is None:
            packets = []
            for packet in self._demux():
                if packet.size:
                    packets.append(Packet(packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard))
                    self._last_duration = float(packet.duration or 0) * self._tick
            self._check_length(len(packets))
            index = index_packets(packets, self.path)
            self._check_end(index.pts)
            self._frame_index = index
        return self._frame_index

    def _check_length(self, found: int) -> None:
        """Compares with the index of mp4 and mov files, which lists every frame before the first is read.

        The number of frames in their header is no measure: an edit list may leave some of them out.
        """
        indexed = "mov" in self._container.format.name and self._stream.frames  # fragmented files grow their index
        promised = len(self._stream.index_entries) if indexed else 0
        missing = promised - found
        if missing > tail_allowance(promised):
            cause = f"it is truncated: {found} frames are there of {promised} that its index lists"
            raise VideoLoadError(self.path, cause, FIX_FILE)
        if missing > 0:
            logger.warning("%s lacks the last %d of its %d frames", self.path, missing, promised)

    def _check_end(self, pts: list[int]) -> None:
        """Compares with the duration that the header states, in formats that have such a header.

        Pictures may end before the sound does, so only what lacks both is truncated. A last frame may be shown for as
        long as any other.
        """
        stated = self._stated_end
        if stated is None or not pts:
            return
        usual = max(np.diff(pts).max(initial=0) * self._tick, self._last_duration, min(_ODD_END, TAIL_SHARE * stated))
        end = pts[-1] * self._tick + self._last_duration
        if stated - end > usual:
            end = max(end, self._last_moment())
        if stated - end <= usual:
            return
        if stated - end > TAIL_SHARE * stated:
            cause = f"it is truncated: it ends after {end:.1f} s of the {stated:.1f} s that its header states"
            raise VideoLoadError(self.path, cause, FIX_FILE)
        logger.warning("%s ends after %.1f s of the %.1f s that its header states", self.path, end, stated)

    def _info_from_packets(self) -> VideoInfo | None:
        if not self._index.pts:
            return None
        times = np.array(self._index.pts, dtype=np.int64) * self._tick
        return timed_info(times, self._last_duration, self._size, self._rates)

    def _info_from_counting(self) -> VideoInfo:
        self._reopen()
        frames = sum(1 for _ in self._decode(self._demux()))
        if not frames:
            raise VideoLoadError(self.path, "no frame of the film can be decoded", FIX_FILE)
        fps = self._given_fps
        return VideoInfo(frames, fps, *self._size, duration=None if fps is None else frames / fps)

    # --- pictures ----------------------------------------------------------------------------------------------------

    def pictures(self, indices: list[int]) -> dict[int, Image.Image]:
        """See `VideoSource.pictures`."""
        if not self._index.pts:
            return self._counted_pictures(indices)
        # Past the end only where the file ends before its index does; the last frame then tells where.
        reachable = sorted({min(index, len(self._index.pts) - 1) for index in indices})
        found: dict[int, Image.Image] = {}
        for number, run in groupby(reachable, self._index.key_number):
            # All of the run follow their keyframe on the screen too, so what they refer to is decoded with them.
            self._take(self._packets_from(self._index.keys[number]), list(run), found)
        missing = [index for index in reachable if index not in found]
        if missing:
            logger.info("%s: %d frames were not found by seeking; decoding from the start", self.path, len(missing))
            self._reopen()
            self._take(self._demux(), missing, found, damaged=True)
        return found

    def _packets_from(self, key: Keyframe) -> Iterator[Any]:
        """Packets from `key` or a keyframe before it; none if seeking does not lead there.

        Matroska's index holds presentation times, mp4's and MPEG-TS' decoding times, so both are tried, and where a
        seek leads is checked: with MPEG-TS it may be behind the target, and in an MPEG program stream the packets may
        get other time stamps than they had in reading from the start.
        """
        for stamp in (key.pts, key.dts):
            if stamp is None:
                continue
            try:
                self._container.seek(stamp, stream=self._stream)
            except self._av.error.FFmpegError:
                continue
            packets = self._demux()
            first = next((packet for packet in packets if packet.is_keyframe and packet.size), None)
            if first is not None and first.pts in self._index.places and first.pts <= key.pts:
                return self._verified(chain([first], packets), self._index.places[first.pts])
        return iter(())

    def _verified(self, packets: Iterator[Any], place: int) -> Iterator[Any]:
        """Passes packets on while they are those that lie at `place` and after it."""
        for packet in packets:
            if packet.size:
                if place >= len(self._index.signatures) or self._index.signatures[place] != (packet.pts, packet.size):
                    return
                place += 1
            yield packet

    def _take(
        self,
        packets: Iterator[Any],
        wanted: list[int],
        found: dict[int, Image.Image],
        damaged: bool = False,
    ) -> None:
        """Decodes up to the last of `wanted` and adds their pictures to `found`.

        Args:
            packets: Where to read from.
            wanted: Ascending indices.
            found: Result; where `damaged`, the frame that decoding stopped at is added, so that a gap can be told from
                an early end.
            damaged: Take frames that the decoder had to repair too, with a warning.
        """
        targets = {self._index.pts[index]: index for index in wanted}
        end = self._index.pts[wanted[-1]]
        last = None
        for frame in self._decode(packets):
            pts = frame.pts
            if pts is None or (frame.is_corrupt and not damaged):
                continue
            if pts in targets:
                found[targets[pts]] = self._picture(frame, targets[pts])
            last = frame
            if pts >= end:
                break
        if damaged and last is not None and last.pts in self._index.pts:
            index = self._index.pts.index(last.pts)
            found.setdefault(index, self._picture(last, index))

    def _counted_pictures(self, indices: list[int]) -> dict[int, Image.Image]:
        wanted = set(indices)
        found: dict[int, Image.Image] = {}
        index, frame = -1, None
        self._reopen()
        for index, frame in enumerate(self._decode(self._demux())):
            if index in wanted:
                found[index] = self._picture(frame, index)
            if index >= indices[-1]:
                break
        if frame is not None and index not in found:
            found[index] = self._picture(frame, index)
        return found

    def _picture(self, frame: Any, index: int) -> Image.Image:
        if frame.is_corrupt:
            logger.warning("%s: frame %d is damaged and shown as the decoder repaired it", self.path, index)
        return upright(frame)
