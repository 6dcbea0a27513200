"""Frames of films, animations and folders, against decoding everything from the start.

Every film is written here: frame k is a solid grey of level 6 k, so a wrong frame is seen whatever the codec does.
"""

import logging
import pickle
import wave
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from internvl_hub import video_container_internvl as video_container
from internvl_hub.data.frame_sampling import training_indices
from internvl_hub.frames_internvl import segment_indices
from internvl_hub.video_internvl import VideoLoadError, probe_video, read_frames

av = pytest.importorskip("av")
av.logging.set_level(None)

FRAMES, STEP, GOP = 40, 6, 8
STEADY = [40 * k for k in range(FRAMES)]  # milliseconds
VARIABLE = np.cumsum([0] + [40 if k % 3 else 110 for k in range(FRAMES - 1)]).tolist()
MILLISECONDS = Fraction(1, 1000)


def grey(index: int) -> np.ndarray:
    return np.full((24, 32, 3), index * STEP, np.uint8)


def write_film(
    path: Path,
    codec: str = "libx264",
    times: Sequence[int] = STEADY,
    options: dict[str, str] | None = None,
    pictures: Sequence[np.ndarray] | None = None,
    clock: Fraction = MILLISECONDS,
    gop: int = GOP,
    muxing: dict[str, str] | None = None,
    rotation: dict | None = None,
) -> Path:
    """A film of 32x24 frames shown at `times`, in units of `clock`."""
    if codec not in av.codec.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    pictures = [grey(k) for k in range(len(times))] if pictures is None else pictures
    with av.open(str(path), "w", options=muxing or {}) as output:
        stream = output.add_stream(codec, rate=25, options={"threads": "1", **(options or {})})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = stream.codec_context.time_base = clock
        stream.codec_context.gop_size = gop
        if rotation:
            stream.set_display_rotation(**rotation)
        for picture, time in zip(pictures, times, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = time, clock
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def remux(source: Path, path: Path, skip: int = 0, earlier: float = 0.0, muxing: dict[str, str] | None = None) -> Path:
    """Copies the packets of a film, without the first `skip` and `earlier` seconds earlier."""
    with av.open(str(source)) as film, av.open(str(path), "w", options=muxing or {}) as output:
        original = film.streams.video[0]
        stream = output.add_stream_from_template(original)
        for number, packet in enumerate(film.demux(original)):
            if packet.size and number >= skip:
                shift = round(earlier / original.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                output.mux(packet)
    return path


def everything(path: Path) -> tuple[list[np.ndarray], list[float | None]]:
    """All frames decoded from the start by PyAV alone, and their seconds from the first one."""
    with av.open(str(path)) as film:
        frames = list(film.decode(video=0))
    start = frames[0].time
    return [f.to_image() for f in frames], [None if f.time is None else f.time - start for f in frames]


def shown(picture: Image.Image) -> int:
    """The index that a picture's grey stands for."""
    return round(float(np.asarray(picture).mean()) / STEP)


X264 = {"x264-params": "bframes=3:b-adapt=0:scenecut=0:threads=1:log=-1"}
FINE = {"bf": "2", "qmin": "1", "qmax": "2"}  # greys two levels apart at most
FILMS = {
    "mp4": lambda p: write_film(p / "a.mp4", options=X264),
    "mp4 variable": lambda p: write_film(p / "a.mp4", times=VARIABLE, options=X264),
    "mp4 mpeg4": lambda p: write_film(p / "a.mp4", "mpeg4", range(FRAMES), FINE, clock=Fraction(1, 25)),
    "mp4 fragmented": lambda p: write_film(p / "a.mp4", options=X264, muxing={"movflags": "frag_keyframe+empty_moov"}),
    "mp4 edit list": lambda p: remux(
        write_film(p / "b.mp4", options=X264), p / "a.mp4", earlier=0.2, muxing={"avoid_negative_ts": "disabled"}
    ),
    "mov hevc": lambda p: write_film(
        p / "a.mov", "libx265", options={"x265-params": "log-level=none:pools=none:frame-threads=1:bframes=3"}
    ),
    "mkv variable": lambda p: write_film(p / "a.mkv", times=VARIABLE, options=X264),
    "mkv open gop": lambda p: write_film(
        p / "a.mkv", options={"x264-params": X264["x264-params"] + ":open-gop=1:keyint=8:min-keyint=8"}
    ),
    "mkv open gop cut": lambda p: remux(
        write_film(p / "b.mkv", options={"x264-params": X264["x264-params"] + ":open-gop=1:keyint=8:min-keyint=8"}),
        p / "a.mkv",
        skip=5,
    ),
    "mkv intra refresh": lambda p: write_film(
        p / "a.mkv", options={"x264-params": "intra-refresh=1:bframes=0:keyint=12:threads=1:log=-1"}
    ),
    "webm vp8": lambda p: write_film(p / "a.webm", "libvpx", options={"deadline": "good"}),
    "webm vp9": lambda p: write_film(p / "a.webm", "libvpx-vp9", times=VARIABLE),
    "avi": lambda p: write_film(p / "a.avi", "mpeg4", range(FRAMES), FINE, clock=Fraction(1, 25)),
    "flv": lambda p: write_film(p / "a.flv", times=VARIABLE, options=X264),
    "ts": lambda p: write_film(p / "a.ts", times=VARIABLE, options=X264),
    "ts cut": lambda p: remux(write_film(p / "b.mp4", options=X264), p / "a.ts", skip=3),
    "mkv cut": lambda p: remux(write_film(p / "b.mp4", options=X264), p / "a.mkv", skip=3),
    "mpeg program stream": lambda p: write_film(p / "a.mpg", "mpeg2video", range(FRAMES), FINE, clock=Fraction(1, 25)),
    "no time stamps": lambda p: write_film(p / "a.h264", options=X264),
}


# --- films -----------------------------------------------------------------------------------------------------------


@pytest.mark.newest
@pytest.mark.parametrize("kind", list(FILMS))
def test_any_frames_equal_those_of_decoding_everything(kind: str, tmp_path: Path) -> None:
    path = FILMS[kind](tmp_path)
    pictures, times = everything(path)
    info = probe_video(path)
    assert (info.frames, info.width, info.height) == (len(pictures), 32, 24)
    draw = np.random.default_rng(0)
    requests = [list(range(info.frames)), [info.frames - 1], [0]]
    requests += [draw.integers(0, info.frames, draw.integers(1, 9)).tolist() for _ in range(6)]
    for request in requests:
        result = read_frames(path, request)
        assert result.indices == request
        for index, picture in zip(request, result.frames, strict=True):
            assert picture.mode == "RGB" and np.array_equal(np.asarray(picture), np.asarray(pictures[index]))
        if kind == "no time stamps":
            assert result.timestamps is None and result.fps is None
        else:
            assert result.timestamps == pytest.approx([times[index] for index in request], abs=0.002)
    first = shown(pictures[0])
    assert [shown(picture) for picture in read_frames(path, range(info.frames)).frames] == list(
        range(first, first + info.frames)
    )


@pytest.mark.parametrize("kind", ["mp4", "mp4 variable", "mkv variable", "ts", "webm vp9", "flv", "mov hevc"])
def test_only_one_group_of_pictures_is_decoded_for_one_frame(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = FILMS[kind](tmp_path)
    with av.open(str(path)) as film:
        packets = [(packet.pts, packet.is_keyframe) for packet in film.demux(video=0) if packet.size]
    stamps = sorted(stamp for stamp, _ in packets)
    decoded = []
    decode = video_container.ContainerSource._decode

    def counting(source: object, packets: Iterator) -> Iterator:
        for frame in decode(source, packets):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_container.ContainerSource, "_decode", counting)
    for index in (FRAMES // 2 + 3, FRAMES - 1):
        decoded.clear()
        read_frames(path, [index])
        key = max(stamp for stamp, is_key in packets if is_key and stamp <= stamps[index])
        since = sum(key <= stamp <= stamps[index] for stamp in stamps)
        assert len(decoded) <= since + GOP < index  # at worst from one keyframe earlier
    decoded.clear()
    probe_video(path)
    assert not decoded


def test_time_stamps_that_change_after_seeking_mislead_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_film(tmp_path / "a.mkv", options={"x264-params": "bframes=0:scenecut=0:threads=1:log=-1"})
    demux, passes = video_container.ContainerSource._demux, []

    def changing(source: object) -> Iterator:
        passes.append(0)
        for number, packet in enumerate(demux(source)):
            if (
                len(passes) == 2 and number >= 2 and packet.size
            ):  # the first pass makes the index, the second follows a seek
                packet.pts += STEADY[1]
            yield packet

    monkeypatch.setattr(video_container.ContainerSource, "_demux", changing)
    monkeypatch.setattr(video_container.ContainerSource, "_info_from_index", lambda source: None)
    assert shown(read_frames(path, [GOP * 2 + 5]).frames[0]) == GOP * 2 + 5 and len(passes) == 3


def test_rates() -> None:
    """What is stated wins while it fits; see the films for rates that do not vary."""
    info = video_container.timed_info
    ntsc = np.round(np.arange(300) * 1001 / 30) / 1000  # a clock of milliseconds
    assert info(ntsc, 0.033, (1, 1), [30000 / 1001]).fps == 30000 / 1001
    assert info(ntsc, 0.033, (1, 1), [1000.0]).fps == pytest.approx(30000 / 1001, rel=1e-4)
    assert info(ntsc, 0.033, (1, 1), [1000.0]).timestamps is None
    gap = np.delete(np.arange(50) / 25, 20)  # one frame was dropped
    assert info(gap, 0.04, (1, 1), [25.0]).timestamps == pytest.approx(gap)
    assert info(gap, 0.04, (1, 1), [25.0]).duration == pytest.approx(2)
    assert info(np.zeros(1), 0.5, (1, 1)).fps == 2 and info(np.zeros(1), 0.0, (1, 1)).fps is None


def test_constant_and_variable_rates(tmp_path: Path) -> None:
    steady, variable = probe_video(FILMS["mp4"](tmp_path)), probe_video(FILMS["mkv variable"](tmp_path))
    assert (steady.fps, steady.timestamps, steady.duration) == (25, None, FRAMES / 25)
    assert variable.timestamps == pytest.approx([time / 1000 for time in VARIABLE])
    assert variable.fps == pytest.approx((FRAMES - 1) / (VARIABLE[-1] / 1000))
    assert probe_video(FILMS["ts cut"](tmp_path)).fps == 25


def test_mp4_is_probed_without_reading_packets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FILMS["mp4"](tmp_path)
    monkeypatch.setattr(video_container.ContainerSource, "_info_from_index", lambda source: None)
    slow = probe_video(path)
    monkeypatch.undo()
    monkeypatch.setattr(video_container.ContainerSource, "_demux", lambda source: pytest.fail("packets were read"))
    assert probe_video(path) == slow


def test_sampling_functions_see_what_probing_says(tmp_path: Path) -> None:
    path = FILMS["mp4 variable"](tmp_path)
    seen = []
    result = read_frames(path, lambda info: seen.append(info) or segment_indices(info.frames, 8))
    assert seen == [probe_video(path)] and result.indices == segment_indices(FRAMES, 8).tolist()
    row = read_frames(path, lambda info: training_indices(info.frames, generator=np.random.default_rng(1)))
    assert [shown(picture) for picture in row.frames] == row.indices


def test_bounds_are_placed_by_the_clock_of_the_film(tmp_path: Path) -> None:
    result = read_frames(
        FILMS["mkv variable"](tmp_path),
        lambda info: segment_indices(info.frames, 6, info.fps, (0.5, 1.0), timestamps=info.timestamps),
    )
    assert result.timestamps is not None and 0.4 < min(result.timestamps) <= max(result.timestamps) < 1.1


def test_sound_is_ignored(tmp_path: Path) -> None:
    film = FILMS["mp4"](tmp_path)
    with av.open(str(film)) as pictures, av.open(str(tmp_path / "a.mkv"), "w") as output:
        sound = output.add_stream("pcm_s16le", rate=8000, layout="mono")
        stream = output.add_stream_from_template(pictures.streams.video[0])
        for packet in pictures.demux(video=0):
            if packet.size:
                packet.stream = stream
                output.mux(packet)
                silent = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), layout="mono")
                silent.sample_rate = 8000
                output.mux(sound.encode(silent))
    assert probe_video(tmp_path / "a.mkv").frames == FRAMES
    assert [shown(picture) for picture in read_frames(tmp_path / "a.mkv", [31, 4]).frames] == [31, 4]


def test_repeated_frames_are_decoded_once(tmp_path: Path) -> None:
    result = read_frames(FILMS["mp4"](tmp_path), [7, 3, 7])
    assert [shown(picture) for picture in result.frames] == [7, 3, 7] and result.frames[0] is result.frames[2]


def test_threads_do_not_change_pictures(tmp_path: Path) -> None:
    path = FILMS["mp4"](tmp_path)
    one, several = read_frames(path, [5, 30]), read_frames(path, [5, 30], threads=2)
    assert all(np.array_equal(a, b) for a, b in zip(one.frames, several.frames, strict=True))


def test_names_with_special_characters(tmp_path: Path) -> None:
    path = FILMS["mp4"](tmp_path).rename(tmp_path / "http: 50%03d [é].mp4")
    assert shown(read_frames(path, [9]).frames[0]) == 9


def test_rate_may_be_given_where_the_film_has_no_times(tmp_path: Path) -> None:
    path = FILMS["no time stamps"](tmp_path)
    assert probe_video(path, fps=20).duration == FRAMES / 20
    assert read_frames(path, [10], fps=20).timestamps == [0.5]
    assert read_frames(FILMS["mp4"](tmp_path), [10], fps=20).timestamps == [0.4]
    with pytest.raises(ValueError, match="fps must be positive"):
        probe_video(path, fps=0)


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("hflip", [0, 1])
@pytest.mark.parametrize("vflip", [0, 1])
def test_pictures_are_upright(degrees: int, hflip: int, vflip: int, tmp_path: Path) -> None:
    """The file says: turn counter-clockwise, then mirror. Pillow does the same to the picture that was encoded."""
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = 240, 160, 80
    rotation = {"degrees": degrees, "hflip": bool(hflip), "vflip": bool(vflip)}
    path = write_film(tmp_path / "a.mp4", times=[0, 40], pictures=[picture] * 2, rotation=rotation)
    expected = Image.fromarray(picture).rotate(degrees, expand=True)
    expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if hflip else expected
    expected = expected.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if vflip else expected
    result = read_frames(path, [1]).frames[0]
    assert result.size == expected.size
    assert np.abs(np.asarray(result, np.int64) - np.asarray(expected)).mean() < 4


# --- damage ----------------------------------------------------------------------------------------------------------


def streamable(folder: Path) -> tuple[Path, list[tuple[int, int]]]:
    """An mp4 with its index first, every frame a keyframe; and the (position, size) of its frames."""
    path = write_film(folder / "a.mp4", gop=1, options=X264, muxing={"movflags": "faststart"})
    with av.open(str(path)) as film:
        return path, [(packet.pos, packet.size) for packet in film.demux(video=0) if packet.size]


def test_truncated_film_is_refused(tmp_path: Path) -> None:
    path, frames = streamable(tmp_path)
    path.write_bytes(path.read_bytes()[: frames[30][0]])
    with pytest.raises(VideoLoadError, match=r"a\.mp4.*truncated: 30 frames are there of 40"):
        probe_video(path)


def test_last_frame_stands_for_a_missing_tail(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, frames = streamable(tmp_path)
    path.write_bytes(path.read_bytes()[: frames[39][0] + frames[39][1] // 2])
    with caplog.at_level(logging.WARNING):
        result = read_frames(path, [3, 39, 38, 39])
    assert result.indices == [3, 38, 38, 38] and [shown(picture) for picture in result.frames] == [3, 38, 38, 38]
    assert result.timestamps == pytest.approx([index / 25 for index in result.indices])
    assert "[39] cannot be decoded; frame 38, the last one, stands for them" in caplog.text
    assert shown(read_frames(path, [20]).frames[0]) == 20


def test_damage_in_the_middle_is_an_error_for_its_frame_only(tmp_path: Path) -> None:
    path, frames = streamable(tmp_path)
    data = bytearray(path.read_bytes())
    for index in (20, 38):
        position, size = frames[index]
        data[position : position + size] = b"\xff" * size
    path.write_bytes(data)
    for index in (20, 38):  # the second is near the end, but not the end
        with pytest.raises(VideoLoadError, match=f"frame {index} of 40 cannot be decoded"):
            read_frames(path, [5, index])
    assert [shown(picture) for picture in read_frames(path, [19, 21, 39]).frames] == [19, 21, 39]


def cut_at(path: Path, frame: int) -> Path:
    """A film without its frames from `frame` on, as far as the file goes."""
    with av.open(str(path)) as film:
        position = [packet.pos for packet in film.demux(video=0) if packet.size][frame]
    path.write_bytes(path.read_bytes()[:position])
    return path


@pytest.mark.parametrize("kind", ["mkv variable", "webm vp8", "avi", "flv"])
def test_a_film_much_shorter_than_its_header_says_is_refused(kind: str, tmp_path: Path) -> None:
    path = cut_at(FILMS[kind](tmp_path), 25)
    for call in (lambda: probe_video(path), lambda: read_frames(path, [0])):
        with pytest.raises(VideoLoadError, match=r"truncated: it ends after \d\.\d s of the \d\.\d s that its header"):
            call()


def test_a_film_a_little_shorter_than_its_header_says_is_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    times = [100 * k for k in range(200)]  # 20 seconds
    pictures = [grey(k % FRAMES) for k in range(200)]
    path = cut_at(write_film(tmp_path / "a.mkv", times=times, pictures=pictures, gop=1, options=X264), 193)
    with caplog.at_level(logging.WARNING):
        frames = probe_video(path).frames
    assert 192 <= frames <= 193
    assert f"ends after {(frames - 1) / 10:.1f} s of the 19.9 s that its header states" in caplog.text
    result = read_frames(path, range(frames))
    assert [shown(picture) for picture in result.frames] == [k % FRAMES for k in range(frames)]


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
def test_sound_may_go_on_after_the_pictures(whole: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as output:
        stream, sound = output.add_stream("libx264", rate=25), output.add_stream("pcm_s16le", rate=8000, layout="mono")
        stream.width, stream.height, stream.pix_fmt = 32, 24, "yuv420p"
        for k in range(250):  # 10 seconds of sound, 1.6 of pictures
            if k < FRAMES:
                output.mux(stream.encode(av.VideoFrame.from_ndarray(grey(k), "rgb24")))
            silent = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), layout="mono")
            silent.sample_rate, silent.pts = 8000, 320 * k
            output.mux(sound.encode(silent))
        output.mux(stream.encode(None))
    if whole:
        assert [shown(picture) for picture in read_frames(path, [0, FRAMES - 1]).frames] == [0, FRAMES - 1]
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
        with pytest.raises(VideoLoadError, match="truncated: it ends after 7"):
            probe_video(path)


def test_a_film_without_the_end_of_its_index_is_refused(tmp_path: Path) -> None:
    path = FILMS["mp4 mpeg4"](tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"stsd") - 40])
    with pytest.raises(VideoLoadError, match="codec is damaged or unknown|not a film"):
        probe_video(path)


def silence(path: Path) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(1600))
    return path


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "a.mp4", "no such file"),
        (lambda p: written(p / "a.mp4", b""), "it is empty"),
        (lambda p: written(p / "a.mp4", b"no film " * 500), "not a film"),
        (lambda p: written(p / "a.txt", b"no film " * 500), "not a film|no video stream"),
        (lambda p: written(p / "a.gif", b"GIF89a" + bytes(3)), "damaged animation"),
        (lambda p: silence(p / "a.wav"), "no video stream"),
        (lambda p: p, "the folder has no frames"),
    ],
    ids=["missing", "empty", "junk", "text", "gif", "sound", "folder"],
)
def test_unusable_files(make: object, message: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    for call in (lambda: probe_video(path), lambda: read_frames(path, [0])):
        with pytest.raises(VideoLoadError, match=message) as caught:
            call()
        assert str(path) in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ([40], "it has no frame 40. Choose frames from 0 to 39"),
        ([-1], "it has no frame -1"),
        ([], "no frames were asked for"),
        (
            lambda info: segment_indices(info.frames, 8, info.fps, (2, 3)),
            "inside the video. The video has 40 frames at 25",
        ),
        (
            lambda info: training_indices(info.frames, generator=np.random.default_rng(0), fps=25, clip=(9, 10)),
            "inside",
        ),
    ],
    ids=["past", "negative", "none", "bound", "clip"],
)
def test_wrong_requests(sampling: object, message: str, tmp_path: Path) -> None:
    path = FILMS["mp4"](tmp_path)
    with pytest.raises(VideoLoadError, match=message) as caught:
        read_frames(path, sampling)
    assert str(path) in str(caught.value)


def test_errors_survive_processes() -> None:
    error = VideoLoadError("a.mp4", "it is empty", "Fetch it again.")
    assert (
        str(pickle.loads(pickle.dumps(error)))
        == str(error)
        == "cannot load video 'a.mp4': it is empty. Fetch it again."
    )
    assert str(VideoLoadError(str(error))) == str(error)  # as torch's DataLoader raises it again


def test_without_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film, animation = FILMS["mp4"](tmp_path), animate(tmp_path / "b.gif", [50] * 3)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(VideoLoadError, match="PyAV, which is not installed.*pip install av"):
        probe_video(film)
    assert probe_video(animation).frames == 3


def test_old_pyav(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    film = FILMS["mp4"](tmp_path)
    monkeypatch.setattr(av, "__version__", "14.4.0")
    with pytest.raises(VideoLoadError, match="needs PyAV 18, 14.4.0 is installed. Run `pip install -U"):
        probe_video(film)


# --- animations ------------------------------------------------------------------------------------------------------


def animate(path: Path, delays: Sequence[int], **options: object) -> Path:
    """An animation whose frames are greys and last for `delays` milliseconds."""
    pictures = [Image.fromarray(grey(k)) for k in range(len(delays))]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=list(delays), **options)
    return path


@pytest.mark.parametrize("suffix", ["gif", "png", "webp"])
def test_animations(suffix: str, tmp_path: Path) -> None:
    delays = [100, 100, 300, 50, 100, 100]
    path = animate(tmp_path / f"a.{suffix}", delays, **({"lossless": True} if suffix == "webp" else {}))
    starts = [sum(delays[:k]) / 1000 for k in range(6)]
    info = probe_video(path)
    assert (info.frames, info.width, info.height) == (6, 32, 24)
    assert info.timestamps == pytest.approx(starts) and info.duration == pytest.approx(0.75)
    result = read_frames(path, [4, 0, 4, 2])
    assert result.timestamps == pytest.approx([starts[index] for index in (4, 0, 4, 2)])
    with Image.open(path) as image:
        truth = [frame.convert("RGB") for frame in ImageSequence.Iterator(image)]
    for index, picture in zip(result.indices, result.frames, strict=True):
        assert np.array_equal(np.asarray(picture), np.asarray(truth[index])) and shown(picture) == index


def test_steady_animation_has_a_rate(tmp_path: Path) -> None:
    info = probe_video(animate(tmp_path / "a.gif", [50] * 8))
    assert info.fps == pytest.approx(20) and info.timestamps is None and info.duration == pytest.approx(0.4)


def test_animation_without_durations_runs_as_in_browsers(tmp_path: Path) -> None:
    assert probe_video(animate(tmp_path / "a.gif", [0] * 4)).fps == pytest.approx(10)


def test_still_picture_of_an_apng_is_no_frame(tmp_path: Path) -> None:
    path = animate(tmp_path / "a.png", [0, 100, 100, 100], default_image=True)
    assert probe_video(path).frames == 3
    assert [shown(picture) for picture in read_frames(path, [0, 2]).frames] == [1, 3]


def test_contents_decide_not_the_suffix(tmp_path: Path) -> None:
    gif = animate(tmp_path / "a.gif", [50] * 3).rename(tmp_path / "a.mp4")
    assert probe_video(gif).fps == pytest.approx(20)
    film = FILMS["mkv variable"](tmp_path).rename(tmp_path / "b.gif")
    assert probe_video(film).frames == FRAMES


def test_still_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    Image.fromarray(grey(3)).save(tmp_path / "a.png")
    result = read_frames(tmp_path / "a.png", [0, 0])
    assert [shown(picture) for picture in result.frames] == [3, 3] and result.timestamps is None


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["b_1.jpg", "a_2.jpg", "a_10.JPG", "a_011.jpg"],  # by the last number alone
        ["f1.png", "f2.png", "f10.png", "g1.png"],
        ["1.png", "2.png", "10.png"],
        ["a_10.png", "b.png", "b_2.png"],  # not every name has a number
    ],
    ids=["numbered", "natural", "bare", "mixed"],
)
def test_folder(names: list[str], tmp_path: Path) -> None:
    for index in reversed(range(len(names))):
        Image.fromarray(grey(index)).save(tmp_path / names[index])
    (tmp_path / "frames.json").write_text("{}")
    (tmp_path / ".a_0.png").write_bytes(b"")
    (tmp_path / "c_5.png").mkdir()
    assert probe_video(tmp_path).frames == len(names)
    result = read_frames(f"{tmp_path}/", range(len(names)))
    assert [shown(picture) for picture in result.frames] == list(range(len(names)))
    assert result.timestamps is None and result.fps is None
    timed = read_frames(tmp_path, [2, 1], fps=4)
    assert timed.timestamps == [0.5, 0.25] and probe_video(tmp_path, fps=4).duration == len(names) / 4


def test_bad_frame_of_a_folder_is_named(tmp_path: Path) -> None:
    Image.fromarray(grey(0)).save(tmp_path / "f_0.png")
    (tmp_path / "f_1.png").write_bytes(b"no picture")
    assert shown(read_frames(tmp_path, [0]).frames[0]) == 0
    with pytest.raises(VideoLoadError, match=r"f_1\.png"):
        read_frames(tmp_path, [0, 1])
    (tmp_path / "f_0.png").write_bytes(b"no picture")
    with pytest.raises(VideoLoadError, match=r"f_0\.png"):
        probe_video(tmp_path)
