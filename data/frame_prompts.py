"""The lines that announce the frames of a video in a prompt; the functions are those of `frames_internvl.py`."""

from __future__ import annotations

from ..frames_internvl import LABEL_TOKENS, frame_prompt, frames_within

__all__ = ["LABEL_TOKENS", "frame_prompt", "frames_within"]
