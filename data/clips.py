"""Parts of a video given in seconds, as numbers of frames, at a constant or a varying frame rate.

Which frames of a part are shown is `frame_sampling`; nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Clip = Sequence[float]
"""Start and end in seconds, counted from the first frame; the end may be infinite."""


def clip_range(
    frames: int, clip: Clip, fps: float | None = None, timestamps: Sequence[float] | None = None
) -> tuple[int, int]:
    """First frame and number of frames of a clip, by the training rule: int(s fps) and int((e - s) fps).

    At least one frame; an end past the video counts as its end.

    Args:
        frames: Number of frames of the video.
        clip: Start and end in seconds.
        fps: Frames per second.
        timestamps: Seconds of every frame where the rate varies; they replace `fps`.

    Raises:
        ValueError: the clip is malformed or begins after the video, or neither `fps` nor `timestamps` is given.
    """
    start, end = check_clip(clip)
    first = int(frame_at(start, fps, timestamps))
    if start < 0 or first >= frames:
        raise ValueError(f"clip={clip} begins at frame {first} of a video of {frames}; choose it inside the video")
    if end == np.inf:
        length = frames
    elif timestamps is None:
        length = int(frame_at(end - start, fps, None))
    else:
        length = int(frame_at(end, fps, timestamps)) - first
    return first, min(max(1, length), frames - first)


def frame_at(seconds: float, fps: float | None, timestamps: Sequence[float] | None) -> float:
    """Frame number at a moment, with its fraction; beyond the last timestamp it grows by one frame a second."""
    if timestamps is not None:
        moments = np.asarray(timestamps, dtype=np.float64)
        inside = float(np.interp(seconds, moments, np.arange(len(moments))))
        # A moment read back from a rounded timestamp must not fall to the frame before.
        return round(inside, 6) + max(0.0, seconds - float(moments[-1]))
    if fps is None:
        raise ValueError("a clip in seconds needs the frame rate of the video; pass fps")
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}")
    return seconds * fps


def check_clip(clip: Clip) -> tuple[float, float]:
    """Start and end of a clip in seconds.

    Raises:
        ValueError: not two numbers, start first; only the end may be infinite.
    """
    values = tuple(float(value) for value in clip)
    if len(values) != 2 or not (np.isfinite(values[0]) and values[0] < values[1]):
        raise ValueError(f"a clip is (start, end) in seconds with start < end, got {clip}")
    return values[0], values[1]


def check_positive(**values: int) -> None:
    """Refuses values below 1, by the names that they are passed under.

    Raises:
        ValueError: one is.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
