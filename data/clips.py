"""Parts of a video given in seconds, as numbers of frames; the functions are those of `frames_internvl.py`."""

from __future__ import annotations

from ..frames_internvl import Clip, check_clip, check_positive, clip_range, frame_at

__all__ = ["Clip", "check_clip", "check_positive", "clip_range", "frame_at"]
