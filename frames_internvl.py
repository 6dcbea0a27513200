"""Frames of a video in a prompt: which are shown, the lines that announce them, how many a budget of tokens holds.

Pure functions of numbers: nothing here opens a file (`video_internvl.py` does). What training draws at random is
`data/frame_sampling.py`, on top of this.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .conversation import IMAGE_PLACEHOLDER

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
    try:
        values = tuple(float(value) for value in clip)
    except (TypeError, ValueError):
        values = ()
    if len(values) != 2 or not (np.isfinite(values[0]) and values[0] < values[1]):
        raise ValueError(f"a clip is (start, end) in seconds with start < end, got {clip!r}")
    return values[0], values[1]


def check_positive(**values: int) -> None:
    """Refuses values below 1, by the names that they are passed under.

    Raises:
        ValueError: one is.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


# -------------------------------------------------------------------------------------------------------- which frames


def segment_indices(
    frames: int,
    segments: int,
    fps: float | None = None,
    bound: Clip | None = None,
    first_index: int = 0,
    *,
    timestamps: Sequence[float] | None = None,
) -> np.ndarray:
    """The middle of each of `segments` equal parts (original: `get_index` of the model cards and of its MVBench).

    With start = max(first_index, round(s fps)), end = min(round(e fps), frames - 1) and part = (end - start) /
    segments, frame k is int(start + part / 2 + round(part k)), where rounding takes halves to even. A video shorter
    than `segments` repeats frames.

    Args:
        frames: Number of frames of the video.
        segments: How many indices to return.
        fps: Frames per second; only `bound` needs it.
        bound: Start and end in seconds; None for the whole video. An end past the video counts as its end.
        first_index: Lowest frame allowed.
        timestamps: Seconds of every frame where the rate varies; they replace `fps` in placing the bound.

    Returns:
        Ascending indices, int64 of shape (segments,).

    Raises:
        ValueError: an argument is out of range, or the bound lies outside the video.
    """
    check_positive(frames=frames, segments=segments)
    start, end = first_index, frames - 1
    if bound is not None:
        low, high = check_clip(bound)
        start = max(start, round(frame_at(low, fps, timestamps)))
        end = end if high == np.inf else min(end, round(frame_at(high, fps, timestamps)))
    if not 0 <= start <= end:
        asked = f"first_index={first_index}" if bound is None else f"the clip from {bound[0]:g} to {bound[1]:g} s"
        raise ValueError(
            f"{asked} would be frames {start} to {end} of a video of {frames}; choose them inside the video"
        )
    part = (end - start) / segments
    return (start + part / 2 + np.round(part * np.arange(segments))).astype(np.int64)


# --------------------------------------------------------------------------------------------------------- in a prompt


LABEL_TOKENS = 10
"""Text tokens around the visual ones of a frame, from above: `Frame-100: <img>...</img>` and the line's end."""


def frames_within(tokens: int, tokens_per_frame: int = 256, label_tokens: int = LABEL_TOKENS) -> int:
    """Most frames whose lines take at most `tokens` tokens, to bound `max_frames` or `segments` with.

    Args:
        tokens: What is left for the video: the length limit less the text of the row.
        tokens_per_frame: Visual tokens of one frame (one tile; 256 in all released models).
        label_tokens: Text tokens around them.

    Raises:
        ValueError: not even one frame fits.
    """
    check_positive(tokens_per_frame=tokens_per_frame)
    fitting = tokens // (tokens_per_frame + label_tokens)
    if fitting < 1:
        raise ValueError(
            f"a budget of {tokens} tokens cannot hold one frame of {tokens_per_frame} + {label_tokens} tokens; "
            "raise the limit"
        )
    return fitting


def frame_prompt(count: int, timestamps: Sequence[float] | None = None) -> str:
    """The lines that stand for a video, each ended by a newline: `Frame-1: <image>`, `Frame-2: <image>`, ...

    They go before the question, or in place of `<video>` and its newline. The plain form is that of the original's
    training code and model cards.

    Args:
        count: Number of frames.
        timestamps: Seconds of each frame, for questions about time: `Frame-1 (0.5s): <image>`. No release was trained
            on this form; it is for models that are.
    """
    check_positive(count=count)
    if timestamps is None:
        return "".join(f"Frame-{i}: {IMAGE_PLACEHOLDER}\n" for i in range(1, count + 1))
    if len(timestamps) != count:
        raise ValueError(f"timestamps has {len(timestamps)} values for {count} frames; give one per frame")
    return "".join(f"Frame-{i} ({moment:.1f}s): {IMAGE_PLACEHOLDER}\n" for i, moment in enumerate(timestamps, 1))
