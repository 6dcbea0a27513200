"""Which frames of a video are shown: pure functions of numbers.

Two families of rules: `segment_indices`, of `frames_internvl.py`, is what InternVL does at inference,
`training_indices` what it does in training. Nothing here opens a file, and nothing draws from a global random state.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..frames_internvl import Clip, check_positive, clip_range

# ------------------------------------------------------------------------------------------------------------ training


def training_indices(
    frames: int,
    sampling: str = "rand",
    *,
    generator: np.random.Generator,
    min_frames: int = 8,
    max_frames: int = 32,
    fps: float | None = None,
    clip: Clip | None = None,
    timestamps: Sequence[float] | None = None,
) -> np.ndarray:
    """Frames of one training row (original: `read_frames_decord` in internvl_chat/internvl/train/dataset.py).

    First the number of frames is drawn (`draw_frame_count`), then the frames (`get_frame_indices`), both from
    `generator`; so equal generators give equal rows. `fpsX` draws neither.

    Args:
        frames: Number of frames of the video.
        sampling: `rand`, `middle` or `fpsX`.
        generator: Source of all randomness.
        min_frames, max_frames: Range of the number of frames, ends included.
        fps: Frames per second; `clip` and `fpsX` need it.
        clip: Part of the video to use, as in `clip_range`.
        timestamps: Seconds of every frame where the rate varies.

    Returns:
        Ascending indices into the whole video, int64 of shape (count,).

    Raises:
        ValueError: an argument is out of range, or the clip lies outside the video.
    """
    check_positive(frames=frames)
    _check_range(min_frames, max_frames)
    first, length = (0, frames) if clip is None else clip_range(frames, clip, fps, timestamps)
    count = max_frames if frames_per_second(sampling) else draw_frame_count(min_frames, max_frames, generator)
    if timestamps is not None:
        timestamps = [moment - timestamps[first] for moment in timestamps[first : first + length]]
    return first + get_frame_indices(
        length, count, sampling, fps=fps, max_frames=max_frames, generator=generator, timestamps=timestamps
    )


def draw_frame_count(min_frames: int, max_frames: int, generator: np.random.Generator) -> int:
    """A number of frames, uniform over min_frames..max_frames with both ends."""
    _check_range(min_frames, max_frames)
    return int(generator.integers(min_frames, max_frames, endpoint=True))


def get_frame_indices(
    frames: int,
    count: int,
    sampling: str = "rand",
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    generator: np.random.Generator | None = None,
    timestamps: Sequence[float] | None = None,
) -> np.ndarray:
    """The rules of the original's function of this name (internvl_chat/internvl/train/dataset.py).

    `rand` and `middle` cut the video into min(count, frames) intervals at int(linspace):
    - `rand` takes one frame of each interval, its last frame excepted. Where an interval has a single frame, it takes
      that many distinct frames of the whole video instead.
    - `middle` takes the middle of each, the earlier of two.
    - Both repeat the last index up to `count`.

    `fpsX` (`fps1`, `fps0.5`) ignores `count`: it takes the frames nearest to 1/2X, 3/2X, 5/2X ... seconds, at most the
    first `max_frames` of them. A video shorter than 1/2X seconds gives its middle frame.

    Args:
        frames: Number of frames to choose from.
        count: Length of the result for `rand` and `middle`.
        sampling: The rule.
        fps: Frames per second of the video; only `fpsX` needs it.
        max_frames: Most frames of `fpsX`; None for no limit.
        generator: Source of randomness; only `rand` needs it.
        timestamps: Seconds of every frame from the first where the rate varies; they replace `fps`.

    Returns:
        Ascending indices, int64.

    Raises:
        ValueError: an argument is out of range, or one that the rule needs is missing.
    """
    check_positive(frames=frames, count=count)
    rate = frames_per_second(sampling)
    if rate:
        return _at_rate(frames, rate, fps, timestamps)[:max_frames]
    chosen = min(count, frames)
    edges = np.linspace(0, frames, chosen + 1).astype(np.int64)
    if sampling == "middle":
        indices = (edges[:-1] + edges[1:] - 1) // 2
    elif generator is None:
        raise ValueError("sampling='rand' draws frames; pass generator=numpy.random.default_rng(seed)")
    elif np.diff(edges).min() > 1:
        indices = generator.integers(edges[:-1], edges[1:] - 1)
    else:
        indices = np.sort(generator.permutation(frames)[:chosen])
    return np.concatenate([indices, np.repeat(indices[-1:], count - chosen)])


def _at_rate(frames: int, rate: float, fps: float | None, timestamps: Sequence[float] | None) -> np.ndarray:
    step = 1 / rate
    if timestamps is not None:
        moments = np.asarray(timestamps, dtype=np.float64)
        middles = np.arange(step / 2, moments[-1] + step / 2, step)
        middles = middles[middles <= moments[-1]]
        indices = np.round(np.interp(middles, moments, np.arange(frames))).astype(np.int64)
    elif fps is None:
        raise ValueError(f"sampling='fps{rate:g}' needs the frame rate of the video; pass fps")
    else:
        middles = np.arange(step / 2, frames / fps + step / 2, step)
        indices = np.round(middles * fps).astype(np.int64)
        indices = indices[indices < frames]
    return indices if len(indices) else np.array([(frames - 1) // 2], dtype=np.int64)


def frames_per_second(sampling: str) -> float | None:
    """The X of `fpsX`; None for the rules without a rate.

    Raises:
        ValueError: `sampling` is no rule.
    """
    if sampling in ("rand", "middle"):
        return None
    try:
        rate = float(sampling.removeprefix("fps")) if str(sampling).startswith("fps") else 0.0
    except ValueError:
        rate = 0.0
    if not 0 < rate < float("inf"):
        raise ValueError(f"sampling={sampling!r} is none of rand, middle and fpsX (X frames a second, such as fps0.5)")
    return rate


def _check_range(min_frames: int, max_frames: int) -> None:
    if not 1 <= min_frames <= max_frames:
        raise ValueError(f"1 <= min_frames <= max_frames must hold, got {min_frames} and {max_frames}")
