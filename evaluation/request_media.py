"""The media of a request at their places in its text, videos spelled out as frames; what both engines begin with.

Frames of a video are those of inference: the middles of equal parts (`frame_sampling.segment_indices`), unless the
request's `Video` itself says which or how many. Pictures are not opened here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..conversation import IMAGE_PLACEHOLDER, ImageSlot
from ..data.augmentation import Take
from ..data.media import RowSettings, read_videos, spell_out
from ..data.records import VIDEO_PLACEHOLDER, FrameSampling, Message, Record, Video, check_placeholders
from ..frames_internvl import segment_indices
from ..video_internvl import VideoInfo, probe_video
from .engines import Request

DEFAULT_FRAMES = 16


@dataclass(frozen=True)
class Picture:
    """A picture of a request.

    Attributes:
        source: Path, URL or picture in memory.
        is_frame: Whether it is a frame of a video, which is one tile.
    """

    source: str | Path | Image.Image
    is_frame: bool = False


def spell_request(request: Request, num_frames: int = DEFAULT_FRAMES, exif: bool = True) -> list[str | Picture]:
    """The texts and pictures of a request in order; each frame stands behind its `Frame-i: `.

    Args:
        request: What is asked.
        num_frames: Frames of a video that does not say itself how many.
        exif: Turn frames that are files of their own upright.

    Raises:
        ValueError: a video cannot be read, or marks and media differ in number.
    """
    videos = tuple(_with_indices(video, num_frames) for video in request.videos)
    message = Message("human", _with_mark(request))
    record = Record((message, Message("gpt", "")), request.images, "the request", videos)
    check_placeholders(record)
    settings = RowSettings(exif=exif, min_num_frame=num_frames, max_num_frame=num_frames, frame_sampling="middle")
    clips = read_videos(record, settings, Take())
    media = spell_out(record, [len(clip) for clip in clips])
    pictures, frames = iter(request.images), (frame for clip in clips for frame in clip)
    kinds = iter(media.frames)

    def picture() -> Picture:
        return Picture(next(frames), True) if next(kinds) else Picture(next(pictures))

    (_, parts), _ = media.turns
    return [picture() if isinstance(part, ImageSlot) else part for part in parts]


def question_text(parts: Sequence[str | Picture]) -> str:
    """What `spell_request` gave as one text with an `<image>` for every picture."""
    return "".join(IMAGE_PLACEHOLDER if isinstance(part, Picture) else part for part in parts)


def _with_mark(request: Request) -> str:
    """The text; a missing mark of the only medium is put in front."""
    media = {IMAGE_PLACEHOLDER: len(request.images), VIDEO_PLACEHOLDER: len(request.videos)}
    for mark, count in media.items():
        if sum(media.values()) == count == 1 and mark not in request.text:
            return f"{mark}\n{request.text}"
    return request.text


def _with_indices(video: Video, num_frames: int) -> Video:
    """The video with the frames of inference named, where it does not choose its frames otherwise."""
    wish = video.frames or FrameSampling()
    is_still = isinstance(video.path, tuple) or Path(video.path).is_dir()
    if wish.indices is not None or wish.min_frames or wish.max_frames or (wish.fps and not is_still):
        return video
    rate = wish.fps if is_still else None
    if isinstance(video.path, tuple):
        info = VideoInfo(len(video.path), rate, 0, 0)
    else:
        info = probe_video(video.path, fps=rate)
    count = wish.num_frames or num_frames
    if is_still and video.clip is None and info.frames <= count:
        indices = range(info.frames)  # a short list of frames is shown as it is
    else:
        indices = segment_indices(info.frames, count, info.fps, video.clip, timestamps=info.timestamps).tolist()
    return replace(video, clip=None, frames=FrameSampling(fps=rate, indices=tuple(indices)))
