"""Videos to pictures. The decoder is `video_internvl.py`, which is published with every model, so that training and
chat read the same frames of a film; these are its names for the rest of the package.
"""

from __future__ import annotations

from ..video_internvl import VideoFrames, VideoInfo, VideoLoadError, probe_video, read_frames

__all__ = ["VideoFrames", "VideoInfo", "VideoLoadError", "probe_video", "read_frames"]
