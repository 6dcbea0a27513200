"""Media of rows: what a video is spelled out as, which frames and pictures are read, and how they are turned."""

import pickle
import random
from collections.abc import Sequence
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from internvl_hub.conversation import ImageSlot
from internvl_hub.data import media as media_module
from internvl_hub.data.augmentation import Take
from internvl_hub.data.media import (
    RowSettings,
    count_frames,
    picture_sizes,
    read_pictures,
    read_videos,
    spell_out,
)
from internvl_hub.data.mixture import DataSource
from internvl_hub.data.records import FrameSampling, Message, Record, RecordError, Video
from internvl_hub.tiling_internvl import ImageLoadError, load_image

FRAMES, STEP = 40, 6  # frame k is a grey of level 6 k
RATE = 10  # of the animation, frames a second
EXIF_ORIENTATION, QUARTER_TURN = 0x0112, 6


def grey(index: int, size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, (index * STEP,) * 3)


def shown(frames: Sequence[Image.Image]) -> list[int]:
    """The indices that the greys stand for."""
    return [round(float(np.asarray(frame.convert("L")).mean()) / STEP) for frame in frames]


@pytest.fixture(scope="module")
def animation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 frames, 4 seconds."""
    path = tmp_path_factory.mktemp("video") / "a.gif"
    first, *rest = [grey(k) for k in range(FRAMES)]
    first.save(path, save_all=True, append_images=rest, duration=1000 // RATE)
    return path


def turned(path: Path, index: int = 0) -> Path:
    """A picture of 32x24 that says it must be turned to 24x32."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = QUARTER_TURN
    picture = grey(index)
    picture.paste((250, 0, 0), (0, 0, 16, 12))  # top left as stored, top right when turned
    picture.save(path, exif=exif, quality=100)
    return path


def of_videos(*videos: Video, text: str | None = None) -> Record:
    text = "<video>\n" * len(videos) + "Q" if text is None else text
    return Record((Message("human", text), Message("gpt", "A")), where="rows:3", videos=videos)


def read(record: Record, settings: RowSettings, take: Take) -> list[list[int]]:
    """The indices of the frames read; counting must agree."""
    found = [shown(frames) for frames in read_videos(record, settings, take)]
    assert count_frames(record, settings, take) == [len(frames) for frames in found]
    return found


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "counts", "expected"),
    [
        ("<video>\nWhat?", [2], "Frame-1: <image>\nFrame-2: <image>\nWhat?"),
        ("<video>What?", [1], "Frame-1: <image>\nWhat?"),
        ("Look: <video>\n\nWhat?", [1], "Look: Frame-1: <image>\n\nWhat?"),
        ("<video>\n<video>\nSame?", [1, 2], "Frame-1: <image>\nFrame-1: <image>\nFrame-2: <image>\nSame?"),
        ("<video><video>", [1, 1], "Frame-1: <image>\nFrame-1: <image>\n"),
        ("No media", [], "No media"),
    ],
    ids=["line", "no line", "inside", "two", "joined", "none"],
)
def test_videos_are_spelled_out(text: str, counts: list[int], expected: str) -> None:
    media = spell_out(of_videos(*[Video("v")] * len(counts), text=text), counts)
    (speaker, parts), (_, answer) = media.turns
    assert speaker == "human" and answer == ("A",)
    assert "".join("<image>" if isinstance(part, ImageSlot) else part for part in parts) == expected
    assert media.frames == (True,) * sum(counts)


def test_pictures_and_frames_in_reading_order() -> None:
    turns = (
        Message("human", "<image><video>\nQ<image>"), Message("gpt", "A <video>"),
        Message("human", "<video>\n<image>"), Message("gpt", "B"),
    )  # fmt: skip
    media = spell_out(Record(turns, ("a", "b", "c"), videos=(Video("v"), Video("w"))), [2, 1])
    assert media.frames == (False, True, True, False, True, False)
    assert media.turns[1] == ("gpt", ("A <video>",))
    assert sum(isinstance(part, ImageSlot) for _, parts in media.turns for part in parts) == 6


# --- which frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", ["rand", "middle"])
def test_number_of_frames_is_fixed_for_a_run_and_within_its_limits(animation: Path, sampling: str) -> None:
    settings = RowSettings(min_num_frame=3, max_num_frame=6, frame_sampling=sampling)
    for row in range(4):
        takes = [Take(0, row, copy, epoch) for copy in range(2) for epoch in range(2)]
        found = [read(of_videos(Video(animation)), settings, take)[0] for take in takes]
        assert len({len(frames) for frames in found}) == 1
        assert (len({tuple(frames) for frames in found}) > 1) == (sampling == "rand")
        assert all(frames == sorted(set(frames)) and frames[-1] < FRAMES for frames in found)
    names = of_videos(Video(("a", "b", "c")))  # files that need not exist to be counted
    assert {count_frames(names, settings, Take(0, row))[0] for row in range(60)} == {3, 4, 5, 6}


def test_videos_of_a_row_have_numbers_of_their_own(animation: Path) -> None:
    settings = RowSettings(min_num_frame=2, max_num_frame=9)
    counts = [count_frames(of_videos(*[Video(animation)] * 4), settings, Take(0, row)) for row in range(6)]
    assert max(len(set(row)) for row in counts) > 1
    assert counts[0] != counts[1]


@pytest.mark.parametrize(
    ("wish", "allowed"),
    [
        (FrameSampling(num_frames=5), {5}),
        (FrameSampling(max_frames=2), {2}),  # below the run's minimum
        (FrameSampling(min_frames=12), {12}),  # above the run's maximum
        (FrameSampling(min_frames=4, max_frames=5), {4, 5}),
        (FrameSampling(num_frames=50), {50}),  # more than there are: the last is repeated
    ],
    ids=["exactly", "at most", "at least", "between", "too many"],
)
@pytest.mark.parametrize("rule", ["rand", "middle"])
def test_numbers_that_a_row_asks_for(animation: Path, wish: FrameSampling, allowed: set[int], rule: str) -> None:
    settings = RowSettings(min_num_frame=3, max_num_frame=8, frame_sampling=rule)
    record = of_videos(Video(animation, frames=wish))
    assert {len(read(record, settings, Take(0, row))[0]) for row in range(10)} == allowed


def test_indices_that_a_row_names(animation: Path, tmp_path: Path) -> None:
    wish = FrameSampling(indices=(7, 3, 3, 39))
    files = tuple(tmp_path / f"{k}.png" for k in range(FRAMES))
    for k, path in enumerate(files):
        grey(k).save(path)
    for place in (animation, tmp_path, files):
        assert read(of_videos(Video(place, frames=wish)), RowSettings(), Take()) == [[7, 3, 3, 39]]
        beyond = of_videos(Video(place, frames=FrameSampling(indices=(0, 40))))
        for call in (count_frames, read_videos):
            with pytest.raises(RecordError, match="rows:3: .*frame 40 of a video of 40; choose from 0 to 39"):
                call(beyond, RowSettings(), Take())


def test_rate_of_a_run_and_of_a_row(animation: Path) -> None:
    """Frames nearest to 1/2X, 3/2X, ... seconds: at 3 a second and 10 frames a second, 1.67, 5, 8.33, 11.67, ..."""
    expected = [round((k + 0.5) / 3 * RATE) for k in range(12)]
    assert expected[:4] == [2, 5, 8, 12]
    run, row = RowSettings(frame_sampling="fps3"), Video(animation, frames=FrameSampling(fps=3))
    assert read(of_videos(Video(animation)), run, Take()) == [expected]
    assert read(of_videos(row), RowSettings(), Take()) == [expected]
    assert read(of_videos(row), RowSettings(frame_sampling="fps1"), Take()) == [expected]  # the row decides
    assert read(of_videos(row), RowSettings(max_num_frame=8), Take()) == [expected[:8]]
    most = replace(row, frames=FrameSampling(fps=3, max_frames=2))
    assert read(of_videos(most), RowSettings(), Take()) == [expected[:2]]


def test_an_exact_number_is_not_overruled_by_a_rate(animation: Path) -> None:
    for wish in (FrameSampling(num_frames=5), FrameSampling(fps=1, num_frames=5)):
        record = of_videos(Video(animation, frames=wish))
        (frames,) = read(record, RowSettings(frame_sampling="fps1"), Take())
        assert len(frames) == 5 and frames == sorted(set(frames))


def test_rates_keep_all_their_digits(animation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, choose = [], media_module.training_indices

    def spy(frames: int, sampling: str, **options: Any) -> np.ndarray:
        seen.append(float(sampling.removeprefix("fps")))
        return choose(frames, sampling, **options)

    monkeypatch.setattr(media_module, "training_indices", spy)
    rates = [0.123456789, 30000 / 1001, 2, 1e-5]
    for rate in rates:
        count_frames(of_videos(Video(animation, frames=FrameSampling(fps=rate))), RowSettings(), Take())
    assert seen == rates


@pytest.mark.parametrize(
    ("clip", "first", "last"),
    [((1.0, 2.0), 10, 19), ((3.5, 9.0), 35, 39), ((0.5, inf), 5, 39), ((0.0, inf), 0, 39)],
    ids=["inside", "past the end", "open", "all"],
)
def test_clips(animation: Path, tmp_path: Path, clip: tuple[float, float], first: int, last: int) -> None:
    for k in range(FRAMES):
        grey(k).save(tmp_path / f"{k}.png")
    listed = tuple(tmp_path / f"{k}.png" for k in range(FRAMES))
    taken = FrameSampling(fps=RATE)  # single frames have no clock of their own
    videos = [Video(animation, clip), Video(tmp_path, clip, taken), Video(listed, clip, taken)]
    inside = set(range(first, last + 1))
    for video in videos:
        settings = RowSettings(min_num_frame=4, max_num_frame=4)
        found = [read(of_videos(video), settings, Take(0, row))[0] for row in range(6)]
        assert all(len(frames) == 4 and set(frames) <= inside for frames in found)
        middle = replace(settings, min_num_frame=1, max_num_frame=1, frame_sampling="middle")
        assert read(of_videos(video), middle, Take()) == [[(first + last) // 2]]
        at_rate = replace(settings, max_num_frame=99, frame_sampling="fps5")  # every second frame
        (frames,) = read(of_videos(video), at_rate, Take())
        assert len(frames) == pytest.approx(len(inside) / 2, abs=1) and set(frames) <= inside


def test_clip_behind_the_end_is_refused(animation: Path) -> None:
    for call in (count_frames, read_videos):
        with pytest.raises(RecordError, match="rows:3: .*clip=.* begins at frame 50 of a video of 40"):
            call(of_videos(Video(animation, (5.0, 6.0))), RowSettings(), Take())


def test_rules_that_need_a_clock_name_the_fix(tmp_path: Path) -> None:
    grey(0).save(tmp_path / "0.png")
    for place in (tmp_path, (tmp_path / "0.png",)):
        for video, settings in (
            (Video(place), RowSettings(frame_sampling="fps2")),
            (Video(place, (0.0, 1.0)), RowSettings()),
        ):
            for call in (count_frames, read_videos):
                with pytest.raises(RecordError, match="rows:3: .*needs a frame rate.*give 'fps' with"):
                    call(of_videos(video), settings, Take())


def test_counting_decodes_nothing(animation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("read_frames", "load_image"):
        monkeypatch.setattr(media_module, name, lambda *args, **options: pytest.fail("something was decoded"))
    assert len(count_frames(of_videos(Video(animation), Video(("a", "b"))), RowSettings(), Take())) == 2


def test_same_take_same_frames(animation: Path) -> None:
    record, settings = of_videos(Video(animation), Video(animation)), RowSettings()
    first = read(record, settings, Take(3, 1, 0, 2))
    random.seed(1)
    np.random.seed(1)
    assert read(record, settings, Take(3, 1, 0, 2)) == first
    assert read(record, settings, Take(4, 1, 0, 2)) != first


# --- how they are turned ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exif", [True, False])
def test_pictures_are_turned_where_asked(exif: bool, tmp_path: Path) -> None:
    path = turned(tmp_path / "a.jpg")
    record = Record((Message("human", "<image><image>"), Message("gpt", "A")), (path, grey(1)))
    settings = RowSettings(exif=exif)
    upright, other = read_pictures(record, settings)
    assert picture_sizes(record, settings) == [upright.size, (32, 24)]
    assert upright.size == ((24, 32) if exif else (32, 24)) and upright.mode == "RGB"
    corner = (upright.width - 1, 0) if exif else (0, 0)
    assert upright.getpixel(corner)[0] > 200 and other.size == (32, 24)


@pytest.mark.parametrize("exif", [True, False])
def test_frames_that_are_files_are_turned_where_asked(exif: bool, tmp_path: Path) -> None:
    files = tuple(turned(tmp_path / f"{k}.jpg", k) for k in range(3))
    wish = FrameSampling(indices=(2, 0))
    for place in (tmp_path, files):
        (frames,) = read_videos(of_videos(Video(place, frames=wish)), RowSettings(exif=exif), Take())
        corner = (23, 0) if exif else (0, 0)
        for frame, index in zip(frames, (2, 0), strict=True):
            assert frame.size == ((24, 32) if exif else (32, 24))
            assert frame.getpixel(corner)[0] > 200  # the red quarter
            assert frame.getpixel((0, frame.height - 1))[0] == pytest.approx(index * STEP, abs=3)


def test_repeated_frames_of_a_list_are_loaded_once(tmp_path: Path) -> None:
    grey(4).save(tmp_path / "a.png")
    record = of_videos(Video((tmp_path / "a.png",), frames=FrameSampling(num_frames=3)))
    (frames,) = read_videos(record, RowSettings(), Take())
    assert shown(frames) == [4, 4, 4] and frames[0] is frames[2]


def test_settings_of_a_data_set_come_first() -> None:
    run = RowSettings(100, 1, 6, True, True, 2, 4, "middle")
    assert run.of(DataSource("d", "a.jsonl")) == replace(run, data_augment=False)
    source = DataSource("d", "a.jsonl", "", True, 2, 3, exif=False)
    assert run.of(source) == RowSettings(100, 2, 3, True, False, 2, 4, "middle")


# --- errors ----------------------------------------------------------------------------------------------------------


def test_media_that_cannot_be_read_name_the_row(tmp_path: Path) -> None:
    record = Record((Message("human", "<image>"), Message("gpt", "A")), (tmp_path / "no.png",), "rows:7")
    for call in (picture_sizes, read_pictures):
        with pytest.raises(RecordError, match=r"^rows:7: cannot load image '.*no\.png': No such file.*Check the path"):
            call(record, RowSettings())
    for place, message in ((tmp_path / "no.gif", "no such file"), ((tmp_path / "no.png",), "cannot load image")):
        with pytest.raises(RecordError, match=f"^rows:3: .*{message}"):
            read_videos(of_videos(Video(place)), RowSettings(), Take())


def test_image_errors_survive_processes(tmp_path: Path) -> None:
    with pytest.raises(ImageLoadError) as caught:
        load_image(tmp_path / "no.png")
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error) == str(caught.value) and error.label == repr(str(tmp_path / "no.png"))
    assert (error.cause, error.fix) == ("No such file or directory", "Check the path.")
    # Some causes cannot be pickled themselves, such as those that hold an open file.
    with open(__file__, encoding="utf-8") as file:
        error = ImageLoadError("'a.png'", OSError(5, "lost", file), "Again.")
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


class Loading:
    """A data set of pictures, one of which is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Image.Image:
        return load_image(self.folder / "no.png")


def test_image_errors_of_workers_keep_their_type(tmp_path: Path) -> None:
    loader = DataLoader(Loading(tmp_path), batch_size=None, num_workers=1)
    with pytest.raises(ImageLoadError, match=r"cannot load image '.*no\.png': No such file or directory\. Check"):
        list(loader)
