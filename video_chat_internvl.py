"""A video for a conversation: frames chosen under a budget, their tiles, and the lines that announce them.

Decoding is `video_internvl.py`, the rules by which frames are chosen `frames_internvl.py`: those of training too.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .frames_internvl import LABEL_TOKENS, Clip, check_clip, clip_range, frame_prompt, frames_within, segment_indices
from .image_processing_internvl import InternVLImageProcessor
from .processing_internvl import image_settings
from .video_internvl import VideoInfo, VideoLoadError, probe_video, read_frames

DEFAULT_FRAMES = 8
"""Frames where nothing else is said, as in the model cards."""


@dataclass(frozen=True)
class VideoInput:
    """What `chat` needs of a video.

    Attributes:
        pixel_values: (tiles, 3, S, S) of all frames.
        num_patches_list: Tiles of each frame.
        prompt: `Frame-1: <image>` and so on, one line per frame; goes before the question.
        indices: Places of the frames in the video.
        timestamps: Their seconds from its first frame; None for a folder without a frame rate.
        choice: What was chosen and why, in words.
    """

    pixel_values: torch.Tensor
    num_patches_list: list[int]
    prompt: str
    indices: list[int]
    timestamps: list[float] | None
    choice: str


def load_video_frames(
    config: Any,
    path: str | Path,
    *,
    fps: float | None = None,
    num_frames: int | None = None,
    max_frames: int | None = None,
    timestamps: bool = False,
    token_budget: int | None = None,
    clip: Clip | None = None,
    max_tiles: int = 1,
    source_fps: float | None = None,
    image_processor: Any = None,
) -> VideoInput:
    """See `InternVLVideoMixin.load_video`; `config` is the model's."""
    _check(Real, "number", fps=fps, source_fps=source_fps)
    _check(
        Integral, "integer", num_frames=num_frames, max_frames=max_frames, max_tiles=max_tiles,
        token_budget=token_budget,
    )  # fmt: skip
    if clip is not None and check_clip(clip)[0] < 0:
        raise ValueError(f"clip={clip} begins before the video; let it begin at 0 or later.")
    if fps is not None and num_frames is not None:
        raise ValueError("Give fps or num_frames, not both: each says alone how many frames are shown.")
    info = probe_video(path, fps=source_fps)
    if timestamps and info.fps is None:
        raise VideoLoadError(path, "its frames have no times to write as timestamps", "Pass source_fps.")
    processor = tiling_processor(config, image_processor)
    per_tile = config.tokens_per_tile(1)[0]
    count, reason = _frame_count(path, info, fps, num_frames, clip)
    tiles = max_tiles
    limits = [(max_frames, f"max_frames={max_frames}")]
    if token_budget is not None:
        # Frames before detail: tiles give way first.
        tiles, most = _fit(token_budget, min(count, max_frames or count), per_tile, max_tiles, info, processor)
        limits.append((most, f"token_budget={token_budget}"))
    for limit, name in limits:
        if limit is not None and count > limit:
            count, reason = limit, f"{reason}, cut to {limit} by {name}"
    read = read_frames(path, lambda video: _indices(video, count, clip, fps is not None), fps=source_fps)
    settings = {"dynamic_image_size": tiles > 1, "max_dynamic_patch": tiles, "min_dynamic_patch": 1}
    output = processor(read.frames, **settings)
    patches = output["num_patches"].tolist()
    tokens = sum(patches) * per_tile
    choice = f"{count} of {info.frames} frames ({reason}), at most {tiles} tile(s) each: {tokens} visual tokens"
    prompt = frame_prompt(count, read.timestamps if timestamps else None)
    return VideoInput(output["pixel_values"], patches, prompt, read.indices, read.timestamps, choice)


def tiling_processor(config: Any, given: Any = None) -> Any:
    """The image processor to cut tiles with.

    Args:
        config: Of the model; where none is given, one is made from it.
        given: An image processor, or a whole processor that has one.
    """
    return getattr(given, "image_processor", given) or InternVLImageProcessor(**image_settings(config))


def _check(kind: type, noun: str, **values: Any) -> None:
    for name, value in values.items():
        number = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            raise ValueError(f"{name} must be a positive {noun}, got {value!r}.")


def _frame_count(
    path: str | Path, info: VideoInfo, fps: float | None, num_frames: int | None, clip: Clip | None
) -> tuple[int, str]:
    """How many frames are asked for, and what asked for them."""
    if num_frames is not None:
        return num_frames, f"num_frames={num_frames}"
    if fps is None:
        return DEFAULT_FRAMES, "by default"
    if info.fps is None:
        raise VideoLoadError(path, "its frames have no times, which fps needs", "Pass num_frames or source_fps.")
    shown = info.frames
    if clip is not None:
        try:
            shown = clip_range(info.frames, clip, info.fps, info.timestamps)[1]
        except ValueError as error:
            raise VideoLoadError(path, error, f"The video has {info.frames} frames at {info.fps:g} fps.") from error
    # As many as the rate gives, but not more than there are.
    return min(shown, max(1, round(shown / info.fps * fps))), f"fps={fps:g}"


def _fit(budget: int, count: int, per_tile: int, max_tiles: int, info: VideoInfo, processor: Any) -> tuple[int, int]:
    """Most tiles per frame with which `count` frames keep within the budget, and most frames with them."""
    for tiles in range(max_tiles, 0, -1):
        settings = {"dynamic_image_size": tiles > 1, "max_dynamic_patch": tiles, "min_dynamic_patch": 1}
        # A film that is shown turned has its sides exchanged.
        sizes = [(info.width, info.height), (info.height, info.width)]
        used = max(processor.num_tiles(*size, **settings) for size in sizes)
        if tiles == 1 or count * (used * per_tile + LABEL_TOKENS) <= budget:
            return tiles, frames_within(budget, used * per_tile, LABEL_TOKENS)
    raise AssertionError("max_tiles is at least 1")


def _indices(info: VideoInfo, count: int, clip: Clip | None, once: bool) -> np.ndarray:
    """Frames to show; `once` where there are enough of them for none to be shown twice."""
    indices = segment_indices(info.frames, count, info.fps, clip, timestamps=info.timestamps)
    if not once or len(np.unique(indices)) == count:
        return indices
    # The model cards' rule repeats frames where its parts are shorter than one.
    first, shown = (0, info.frames) if clip is None else clip_range(info.frames, clip, info.fps, info.timestamps)
    return first + np.arange(count) * shown // count


class InternVLVideoMixin:
    """Methods of `InternVLChatModel` for talking about a video file."""

    def load_video(self, path: str | Path, **options: Any) -> VideoInput:
        """Frames of a video, ready for `chat`: `chat(tokenizer, video.pixel_values, video.prompt + question, ...)`.

        The frames are the middles of equal parts of the video, as in the model cards; a video shorter than
        `num_frames` repeats frames. `fps` repeats none: at the video's rate and above it all frames are shown.

        Args:
            path: A film (needs PyAV), a GIF, APNG or WebP animation, or a folder of pictures.
            **options: As keywords:
                fps: Frames to show per second of video; or
                num_frames: how many in all (default 8).
                max_frames: Upper limit to either.
                timestamps: Write the second of each frame into its line. No release was trained on that form.
                token_budget: Most tokens that the video may take, its lines included: first the tiles per frame are
                    reduced down to one, then the frames.
                clip: (start, end) in seconds; the end may be infinite.
                max_tiles: Most tiles per frame, thumbnail aside; 1, as in training.
                source_fps: Frame rate of a folder of pictures, which has none of its own.
                image_processor: The checkpoint's, if it has settings of its own; or its whole processor.

        Returns:
            Tiles, their numbers and the lines to put before the question, with `choice` saying what was chosen.

        Raises:
            VideoLoadError: PyAV is missing, the file cannot be used, or `clip` lies outside it.
            ValueError: `fps` with `num_frames`, a value that is not positive or not a whole number where one is
                needed, a malformed `clip`, or a budget below one frame.
        """
        return load_video_frames(self.config, path, **options)

    def chat_video(
        self,
        tokenizer: Any,
        path: str | Path,
        question: str,
        generation_config: Any = None,
        *,
        video_options: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """Asks about a video file; for further turns keep what `load_video` gives and call `chat`.

        Args:
            tokenizer, question, generation_config: As in `chat`.
            path: As in `load_video`.
            video_options: Keywords of `load_video`.
            **options: Keywords of `chat` (`return_history`, `system`, `thinking`, ...), but for images.

        Raises:
            VideoLoadError, ValueError: as in `load_video`.
        """
        video = self.load_video(path, **(video_options or {}))
        asked = {**options, "num_patches_list": video.num_patches_list}
        return self.chat(tokenizer, video.pixel_values, video.prompt + question, generation_config, **asked)
