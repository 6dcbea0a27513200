"""The lines that announce the frames of a video in a prompt, and how many frames a budget of tokens holds.

Which frames they are is `frame_sampling`; tokens are counted from numbers, no tokenizer is asked.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..conversation import IMAGE_PLACEHOLDER
from .clips import check_positive

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
            f"tokens={tokens} cannot hold one frame of {tokens_per_frame} + {label_tokens} tokens; raise the limit"
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
