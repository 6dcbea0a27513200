"""Films (mp4, mkv, webm, avi, mpeg-ts, ...) through PyAV: which frames there are, and exactly those asked for.

The index of a frame is its place in the order of presentation. It is found from the time stamps of all packets, which
are read without decoding; then only the pictures between a wanted frame and the keyframe before it are decoded. A film
without usable time stamps is decoded from its start and counted. PyAV is imported on first use.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from collections.abc import Iterator
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from .video_sources import VideoInfo, VideoLoadError, timed_info

logger = logging.getLogger(__name__)

TAIL_SHARE = 0.05
"""Share of the frames (and at least one) that may be missing at the end of a damaged film; more is an error."""

MIN_PYAV = 18
"""Major version of PyAV from which a stream gives its index and can be told to skip its packets."""

_FIX_FILE = "Fetch or export the file again."


def tail_allowance(frames: int) -> int:
    """Most frames that may be missing at the end of a film of `frames`."""
    return max(1, int(TAIL_SHARE * frames))


class _Keyframe(NamedTuple):
    pts: int
    dts: int | None


class ContainerSource:
    """A film, opened for reading; only its first video stream that is no cover picture is used.

    Args:
        path: The file.
        fps: Frame rate for films that have no time stamps; others state their own.
        threads: Decoder threads; 0 lets FFmpeg choose.

    Raises:
        VideoLoadError: PyAV is missing, or the file is no film, has no video stream or no frames, or is truncated.
    """

    def __init__(self, path: str | Path, fps: float | None = None, threads: int = 1) -> None:
        self.path = path
        self.threads = threads
        self._av = _import_av(path)
        self._open()
        self._given_fps = fps
        self._last_duration = 0.0
        self._indexed = False
        self._pts: list[int] = []  # of the shown frames, ascending; empty where frames have to be counted
        self._keys: list[_Keyframe] = []  # by time stamp
        self._places: dict[int, int] = {}  # of the keyframes' packets, by time stamp
        self._signatures: list[tuple[int, int]] = []  # time stamp and size of every packet, as they lie in the file
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

    def _index_packets(self) -> None:
        """Reads all packets, once, for the time stamps of the frames and of the keyframes."""
        if self._indexed:
            return
        self._indexed = True
        packets = []
        for packet in self._demux():
            if packet.size:
                packets.append((packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard))
                self._last_duration = float(packet.duration or 0) * self._tick
        self._check_length(len(packets))
        first_key = next((n for n, packet in enumerate(packets) if packet[3]), 0)
        # What precedes the first keyframe, in the file or on the screen, cannot be decoded: a recording cut anywhere.
        packets = packets[first_key:]
        if not packets:
            raise VideoLoadError(self.path, "the film has no frames", _FIX_FILE)
        stamps = [packet[0] for packet in packets]
        if None in stamps or len(set(stamps)) < len(stamps):
            logger.info("%s has no usable time stamps; its frames are decoded from the start and counted", self.path)
            return
        self._pts = sorted(pts for pts, _, _, _, discard in packets if not discard and pts >= stamps[0])
        if not self._pts:
            raise VideoLoadError(self.path, "the film shows no frames", _FIX_FILE)
        # Without any keyframe flag the first packet has to do; seeking then fails and decoding begins at the start.
        self._places = {packet[0]: n for n, packet in enumerate(packets) if packet[3] or not n}
        self._keys = sorted(_Keyframe(packets[n][0], packets[n][1]) for n in self._places.values())
        self._signatures = [(packet[0], packet[2]) for packet in packets]

    def _check_length(self, found: int) -> None:
        """Compares with the index of mp4 and mov files, which lists every frame before the first is read.

        The number of frames in their header is no measure: an edit list may leave some of them out.
        """
        indexed = "mov" in self._container.format.name and self._stream.frames  # fragmented files grow their index
        promised = len(self._stream.index_entries) if indexed else 0
        missing = promised - found
        if missing > tail_allowance(promised):
            cause = f"it is truncated: {found} frames are there of {promised} that its index lists"
            raise VideoLoadError(self.path, cause, _FIX_FILE)
        if missing > 0:
            logger.warning("%s lacks the last %d of its %d frames", self.path, missing, promised)

    def _info_from_packets(self) -> VideoInfo | None:
        self._index_packets()
        if not self._pts:
            return None
        times = np.array(self._pts, dtype=np.int64) * self._tick
        return timed_info(times, self._last_duration, self._size, self._rates)

    def _info_from_counting(self) -> VideoInfo:
        self._reopen()
        frames = sum(1 for _ in self._decode(self._demux()))
        if not frames:
            raise VideoLoadError(self.path, "no frame of the film can be decoded", _FIX_FILE)
        fps = self._given_fps
        return VideoInfo(frames, fps, *self._size, duration=None if fps is None else frames / fps)

    @property
    def _tick(self) -> float:
        return float(self._stream.time_base or 0)

    @property
    def _size(self) -> tuple[int, int]:
        return self._stream.codec_context.width, self._stream.codec_context.height

    @property
    def _rates(self) -> list[float]:
        stated = (self._stream.average_rate, self._stream.guessed_rate)
        return [float(rate) for rate in stated if rate]

    # --- pictures ----------------------------------------------------------------------------------------------------

    def pictures(self, indices: list[int]) -> dict[int, Image.Image]:
        """See `VideoSource.pictures`."""
        self._index_packets()
        if not self._pts:
            return self._counted_pictures(indices)
        # Past the end only where the file ends before its index does; the last frame then tells where.
        reachable = sorted({min(index, len(self._pts) - 1) for index in indices})
        found: dict[int, Image.Image] = {}
        for number, run in groupby(reachable, self._key_number):
            # All of the run follow their keyframe on the screen too, so what they refer to is decoded with them.
            self._take(self._packets_from(self._keys[number]), list(run), found)
        missing = [index for index in reachable if index not in found]
        if missing:
            logger.info("%s: %d frames were not found by seeking; decoding from the start", self.path, len(missing))
            self._reopen()
            self._take(self._demux(), missing, found, damaged=True)
        return found

    def _key_number(self, index: int) -> int:
        """Which keyframe is the last at or before a frame."""
        return bisect_right(self._keys, self._pts[index], key=lambda key: key.pts) - 1

    def _packets_from(self, key: _Keyframe) -> Iterator[Any]:
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
            if first is not None and first.pts in self._places and first.pts <= key.pts:
                return self._verified(chain([first], packets), self._places[first.pts])
        return iter(())

    def _verified(self, packets: Iterator[Any], place: int) -> Iterator[Any]:
        """Passes packets on while they are those that lie at `place` and after it."""
        for packet in packets:
            if packet.size:
                if place >= len(self._signatures) or self._signatures[place] != (packet.pts, packet.size):
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
        targets = {self._pts[index]: index for index in wanted}
        end = self._pts[wanted[-1]]
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
        if damaged and last is not None and last.pts in self._pts:
            index = self._pts.index(last.pts)
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
        return _upright(frame)

    # --- PyAV --------------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        error_type = self._av.error.FFmpegError
        try:
            # The prefix keeps names with a colon from being read as URLs, the list playlists from the network.
            self._container = self._av.open(
                f"file:{os.fspath(self.path)}", options={"protocol_whitelist": "file"}, metadata_errors="ignore"
            )
        except error_type as error:
            cause = f"not a film that FFmpeg can read ({error.strerror})"
            raise VideoLoadError(self.path, cause, _FIX_FILE) from error
        streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams or self._container.format.name == "tty":  # FFmpeg draws text files
            self._container.close()
            fix = "Give a film, an animation or a folder of frames."
            raise VideoLoadError(self.path, "it has no video stream", fix)
        self._stream = streams[0]
        self._stream.codec_context.thread_count = self.threads
        for stream in self._container.streams:
            if stream.index != self._stream.index:
                stream.discard = self._av.stream.Discard.all  # spares reading the sound

    def _reopen(self) -> None:
        self.close()
        self._open()

    def _demux(self) -> Iterator[Any]:
        """Packets of the stream; a damaged end ends them."""
        try:
            yield from self._container.demux(self._stream)
        except self._av.error.FFmpegError as error:
            logger.warning("%s: reading stops early (%s)", self.path, error.strerror)

    def _decode(self, packets: Iterator[Any]) -> Iterator[Any]:
        """Frames in the order of presentation; packets that the decoder refuses are logged and left out."""
        for packet in packets:
            try:
                yield from packet.decode()
            except self._av.error.FFmpegError as error:
                logger.warning("%s: a packet cannot be decoded (%s)", self.path, error.strerror)

    def close(self) -> None:
        self._container.close()


def _import_av(path: str | Path) -> Any:
    try:
        import av
        import av.error
        import av.stream
    except ImportError as error:
        fix = "Run `pip install av` (or install the extra `video`), or give a folder of frames."
        raise VideoLoadError(path, "reading films needs PyAV, which is not installed", fix) from error
    if int(av.__version__.split(".")[0]) < MIN_PYAV:
        fix = f"Run `pip install -U 'av>={MIN_PYAV}'`."
        raise VideoLoadError(path, f"reading films needs PyAV {MIN_PYAV}, {av.__version__} is installed", fix)
    return av


_TURNS: dict[tuple[int, ...], Image.Transpose | None] = {
    # (a, b, c, d) of the display matrix: x' = a x + c y, y' = b x + d y, with y downwards.
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


def _upright(frame: Any) -> Image.Image:
    """The picture as players show it: turned or mirrored as the display matrix says.

    Other angles than quarter turns are left as they are, which is what players do.
    """
    image = frame.to_image()
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return image
    matrix = np.frombuffer(bytes(data), dtype=np.int32)
    turn = _TURNS.get(tuple(int(value) for value in np.round(matrix[[0, 1, 3, 4]] / 65536)))  # 16.16 fixed point
    return image if turn is None else image.transpose(turn)
