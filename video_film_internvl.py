"""Access to films through PyAV: opening, packets, decoding, upright pictures.

Which packets make which frame is not known here; `video_container_internvl.py` says it. PyAV is imported on first use.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .video_sources_internvl import VideoLoadError

logger = logging.getLogger(__name__)

MIN_PYAV = 18
"""Major version of PyAV from which a stream gives its index and can be told to skip its packets."""

FIX_FILE = "Fetch or export the file again."

_STATES_DURATION = ("matroska,webm", "flv")  # formats whose duration is from the header, not from what is there


class Film:
    """A film, opened for reading; only its first video stream that is no cover picture is used.

    Args:
        path: The file.
        threads: Decoder threads; 0 lets FFmpeg choose.

    Raises:
        VideoLoadError: PyAV is missing, or the file is no film or has no video stream.
    """

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        self.path = path
        self.threads = threads
        self._av = _import_av(path)
        self._open()

    def _open(self) -> None:
        self._container = self._opened_file()
        streams = [s for s in self._container.streams.video if not s.disposition & s.disposition.attached_pic]
        if not streams or self._container.format.name == "tty":  # FFmpeg draws text files
            self._container.close()
            fix = "Give a film, an animation or a folder of frames."
            raise VideoLoadError(self.path, "it has no video stream", fix)
        self._stream = streams[0]
        if self._stream.codec_context is None:  # as in a file whose index is cut off
            self._container.close()
            raise VideoLoadError(self.path, "its codec is damaged or unknown to FFmpeg", FIX_FILE)
        self._stream.codec_context.thread_count = self.threads
        for stream in self._container.streams:
            if stream.index != self._stream.index:
                stream.discard = self._av.stream.Discard.all  # spares reading the sound

    def _opened_file(self) -> Any:
        try:
            # The prefix keeps names with a colon from being read as URLs, the list playlists from the network.
            return self._av.open(
                f"file:{os.fspath(self.path)}", options={"protocol_whitelist": "file"}, metadata_errors="ignore"
            )
        except self._av.error.FFmpegError as error:
            cause = f"not a film that FFmpeg can read ({error.strerror})"
            raise VideoLoadError(self.path, cause, FIX_FILE) from error

    @property
    def _stated_end(self) -> float | None:
        """Second at which the film ends, sound included, as its header says; None where no header says it."""
        name, rate = self._container.format.name, self._stream.average_rate
        if name == "avi":  # FFmpeg shortens its duration to what is there, but not the number of frames
            return float(self._stream.frames / rate) if self._stream.frames and rate else None
        if name not in _STATES_DURATION or self._container.duration is None:
            return None
        return self._container.duration / self._av.time_base

    def _last_moment(self) -> float:
        """Second at which the last packet of any stream ends; reads the file once more."""
        moments = [0.0]
        with self._opened_file() as container:
            try:
                for packet in container.demux():
                    if packet.pts is not None:
                        moments.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
            except self._av.error.FFmpegError:  # a damaged end
                pass
        return max(moments)

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


def upright(frame: Any) -> Image.Image:
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
