"""A video file for `chat`: frames, lines and tiles under a budget; films are written here, frame k in grey 20 k."""

import sys
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CHAT, QWEN2, load
from transformers import PreTrainedTokenizerFast

from internvl_hub.data import media
from internvl_hub.frames_internvl import LABEL_TOKENS, segment_indices
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.video_internvl import VideoLoadError, read_frames

FRAMES, RATE = 12, 4
TOKENS = 4  # per tile of the tiny models


@cache
def loaded():
    return load(QWEN2), PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN2)


def grey(index: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    return Image.new("RGB", size, (index * 20,) * 3)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 seconds at 4 frames a second."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    with av.open(str(path), "w") as output:
        stream = output.add_stream("mpeg4", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, RATE)
        for k in range(FRAMES):
            frame = av.VideoFrame.from_image(grey(k))
            frame.pts, frame.time_base = k, Fraction(1, RATE)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(FRAMES):
        grey(k).save(tmp_path / f"f{k}.png")
    return tmp_path


def levels(video) -> list[int]:
    """Which frames the tiles show, by their grey."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    shades = video.pixel_values.mean((2, 3)) * std + mean
    return [round(shade * 255 / 20) for shade in shades.mean(1).tolist()]


@pytest.mark.parametrize(
    ("options", "count", "part"),
    [
        ({}, 8, None),
        ({"num_frames": 3}, 3, None),
        ({"fps": 1}, 3, None),
        ({"fps": RATE - 0.4}, FRAMES - 1, None),
        ({"fps": 2, "clip": (1, 2)}, 2, (1, 2)),
        ({"num_frames": 9, "max_frames": 2}, 2, None),
        ({"num_frames": 2, "clip": (1.0, float("inf"))}, 2, (1.0, float("inf"))),
        ({"num_frames": 8, "token_budget": 3 * (TOKENS + LABEL_TOKENS) + 2}, 3, None),
        ({"num_frames": 20}, 20, None),
    ],
    ids=range(9),
)
def test_frames_are_those_of_the_rule(film: Path, options: dict, count: int, part) -> None:
    video = loaded()[0].load_video(film, **options)
    indices = segment_indices(FRAMES, count, RATE, part).tolist()
    assert video.indices == indices and levels(video) == indices
    assert video.num_patches_list == [1] * count and video.pixel_values.shape == (count, 3, 56, 56)
    assert video.prompt == "".join(f"Frame-{i}: <image>\n" for i in range(1, count + 1))
    assert video.timestamps == [index / RATE for index in indices]
    assert str(count) in video.choice and f"{count * TOKENS} visual tokens" in video.choice


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"fps": RATE}, range(FRAMES)),
        ({"fps": 100}, range(FRAMES)),
        ({"fps": 100, "clip": (1, 2)}, range(4, 8)),
        ({"fps": 100, "clip": (0.375, 1.125)}, range(1, 4)),  # frames 1.5 to 4.5, both rounded to even
        ({"fps": 3, "clip": (2.4, 9)}, [9, 10]),
        ({"fps": 100, "max_frames": FRAMES - 1}, segment_indices(FRAMES, FRAMES - 1)),
    ],
    ids=range(6),
)
def test_a_rate_shows_no_frame_twice(film: Path, options: dict, wanted) -> None:
    video = loaded()[0].load_video(film, **options)
    assert video.indices == levels(video) == list(wanted)
    assert video.choice.startswith(f"{len(wanted)} of {FRAMES} frames")


def test_a_whole_processor_stands_for_its_image_processor(film: Path) -> None:
    model, tokenizer = loaded()
    images = InternVLImageProcessor(image_size=56, max_dynamic_patch=2, image_mean=[0.1] * 3)
    processor = SimpleNamespace(image_processor=images, tokenizer=tokenizer)
    one, other = (model.load_video(film, num_frames=2, image_processor=given) for given in (images, processor))
    assert torch.equal(one.pixel_values, other.pixel_values)
    assert not torch.equal(one.pixel_values, model.load_video(film, num_frames=2).pixel_values)
    one, other = (
        model.ground(tokenizer, grey(5), "the dog", {"max_new_tokens": 2}, image_processor=given)
        for given in (images, processor)
    )
    assert one == other


def test_timestamps_stand_in_the_lines(film: Path) -> None:
    video = loaded()[0].load_video(film, num_frames=2, timestamps=True)
    seconds = [index / RATE for index in video.indices]
    assert video.prompt == "".join(f"Frame-{i} ({s:.1f}s): <image>\n" for i, s in enumerate(seconds, 1))


def test_tiles_give_way_before_frames(film: Path) -> None:
    model, _ = loaded()
    sizes = [(48, 32), (32, 48)]
    for budget in (1000, 260, 120, 60):
        video = model.load_video(film, num_frames=4, max_tiles=6, token_budget=budget)
        used = sum(video.num_patches_list) * TOKENS + len(video.num_patches_list) * LABEL_TOKENS
        assert used <= budget and len(video.num_patches_list) == 4
        processor = InternVLImageProcessor(image_size=56, use_thumbnail=model.config.use_thumbnail)
        most = max(
            n for n in range(1, 7)
            if n == 1 or 4 * (LABEL_TOKENS + TOKENS * max(
                processor.num_tiles(*size, max_dynamic_patch=n, min_dynamic_patch=1) for size in sizes)) <= budget
        )  # fmt: skip
        assert f"at most {most} tile(s)" in video.choice
    with pytest.raises(ValueError, match="cannot hold one frame"):
        model.load_video(film, token_budget=5)


def test_a_folder_needs_a_rate_for_times(folder: Path) -> None:
    model, _ = loaded()
    assert levels(model.load_video(folder, num_frames=3)) == segment_indices(FRAMES, 3).tolist()
    assert model.load_video(folder, num_frames=3).timestamps is None
    assert len(model.load_video(folder, fps=1, source_fps=RATE).indices) == 3
    for options in ({"fps": 1}, {"timestamps": True}, {"clip": (0, 1)}):
        with pytest.raises(VideoLoadError):
            model.load_video(folder, **options)


@pytest.mark.parametrize(
    "options",
    [{"fps": 1, "num_frames": 2}, {"fps": 0}, {"num_frames": -1}, {"max_frames": 0}, {"token_budget": 0},
     {"max_tiles": 0}, {"fps": float("nan")}, {"clip": (9, 10)}, {"clip": (2, 1)}, {"fps": 1, "clip": (9, 10)},
     {"num_frames": 2.0}, {"max_frames": 1.5}, {"token_budget": 100.5}, {"max_tiles": 1.5}, {"num_frames": True},
     {"num_frames": "3"}, {"fps": "2"}, {"source_fps": "2"}, {"clip": (-1, 2)}, {"clip": (-1, 2), "fps": 1},
     {"clip": 3}, {"clip": (0, None)}, {"clip": "ab"}],
    ids=range(23),
)  # fmt: skip
def test_bad_arguments(film: Path, options: dict) -> None:
    with pytest.raises(ValueError, match="|".join([*options, "bound"])):  # VideoLoadError is one
        loaded()[0].load_video(film, **options)


def test_numbers_of_numpy_are_numbers(film: Path) -> None:
    options = {"num_frames": np.int64(3), "max_frames": np.int32(2), "clip": (np.float32(0), 2)}
    assert len(loaded()[0].load_video(film, **options).indices) == 2


def test_without_pyav_the_error_says_what_to_do(film: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "av" or name.startswith("av.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(VideoLoadError, match="pip install av"):
        loaded()[0].load_video(film)
    assert len(loaded()[0].load_video(folder).indices) == 8


def test_chat_video_is_chat_with_the_frames(film: Path) -> None:
    model, tokenizer = loaded()
    options = {"max_new_tokens": 4, "do_sample": False}
    video = model.load_video(film, num_frames=2)
    wanted = model.chat(
        tokenizer, video.pixel_values, f"{video.prompt}What happens?", options, num_patches_list=[1, 1],
        return_history=True,
    )  # fmt: skip
    given = model.chat_video(
        tokenizer, film, "What happens?", options, video_options={"num_frames": 2}, return_history=True
    )
    assert given == wanted and given[1][0][0].startswith("Frame-1: <image>\nFrame-2: <image>\nWhat")


def test_training_reads_with_the_same_decoder() -> None:
    assert media.read_frames is read_frames and media.VideoLoadError is VideoLoadError
