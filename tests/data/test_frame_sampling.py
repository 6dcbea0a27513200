"""Rules that choose frames, against worked numbers and against their definitions in plain Python."""

import random

import numpy as np
import pytest

from internvl_hub.data.frame_sampling import draw_frame_count, get_frame_indices, training_indices
from internvl_hub.frames_internvl import clip_range, frame_prompt, frames_within, segment_indices


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# --- inference -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "segments", "options", "expected"),
    [
        (100, 8, {}, [6, 18, 31, 43, 56, 68, 80, 93]),
        (900, 8, {}, [56, 168, 281, 393, 506, 618, 730, 843]),
        (480, 8, {"fps": 24, "bound": (2, 6)}, [54, 66, 78, 90, 102, 114, 126, 138]),
        (5, 8, {}, [0, 0, 1, 2, 2, 2, 3, 4]),
        (300, 16, {}, [9, 28, 46, 65, 84, 102, 121, 140, 159, 177, 196, 215, 233, 252, 271, 289]),
        (1, 3, {}, [0, 0, 0]),
        (100, 2, {"fps": 10, "bound": (8, 99)}, [84, 94]),  # an end past the video is its end: part = (99 - 80) / 2
        (100, 1, {"first_index": 50, "fps": 10, "bound": (0, 9)}, [70]),
    ],
    ids=["100", "900", "bound", "short", "300", "single", "late end", "first index"],
)
def test_segments(frames: int, segments: int, options: dict, expected: list[int]) -> None:
    indices = segment_indices(frames, segments, **options)
    assert indices.tolist() == expected and indices.dtype == np.int64


def test_segments_follow_their_definition() -> None:
    """Python's round, too, takes halves to even."""
    for seed in range(300):
        draw = random.Random(seed)
        frames, segments, fps = draw.randint(1, 400), draw.randint(1, 40), draw.choice([10.0, 24.0, 30000 / 1001])
        low = draw.uniform(-1, (frames - 1) / fps)
        high = low + draw.uniform(0.01, 20)
        start, end = max(0, round(low * fps)), min(round(high * fps), frames - 1)
        if start > end:
            continue
        part = (end - start) / segments
        expected = [int(start + part / 2 + round(part * k)) for k in range(segments)]
        assert segment_indices(frames, segments, fps, (low, high)).tolist() == expected


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 8), {}, "frames must be at least 1"),
        ((8, 0), {}, "segments must be at least 1"),
        ((100, 8), {"bound": (0, 1)}, "pass fps"),
        ((100, 8), {"bound": (0, 1), "fps": 0}, "fps must be positive"),
        ((100, 8), {"bound": (11, 12), "fps": 10}, "inside the video"),
        ((100, 8), {"bound": (3, 2), "fps": 10}, "start < end"),
        ((100, 8), {"bound": (1, 2, 3), "fps": 10}, "start < end"),
        ((100, 8), {"bound": (0, float("nan")), "fps": 10}, "start < end"),
        ((100, 8), {"first_index": 100}, "inside the video"),
    ],
    ids=["frames", "segments", "no fps", "zero fps", "outside", "reversed", "three", "nan", "first index"],
)
def test_segments_refuse(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segment_indices(*arguments, **options)


def test_bound_of_a_variable_rate_is_placed_by_time() -> None:
    """Ten frames a second for two seconds, then one a second: second 4 is frame 22, not frame 4 * fps."""
    timestamps = [k / 10 for k in range(20)] + [2.0 + k for k in range(10)]
    chosen = segment_indices(30, 4, 30 / 12, (4, 8), timestamps=timestamps)
    assert chosen.tolist() == [22, 23, 24, 25]
    even = [k / 10 for k in range(30)]
    for bound in ((0.3, 1.7), (0.0, 2.9), (1.0, 50.0)):
        assert (segment_indices(30, 5, 10, bound) == segment_indices(30, 5, None, bound, timestamps=even)).all()


# --- training --------------------------------------------------------------------------------------------------------


def intervals(frames: int, count: int) -> list[range]:
    """The intervals of the original without the last frame of each, written out."""
    edges = [int(edge) for edge in np.linspace(0, frames, count + 1)]
    return [range(low, high - 1) for low, high in zip(edges[:-1], edges[1:], strict=True)]


def test_rand_draws_every_frame_of_each_interval_but_the_last() -> None:
    seen: list[set[int]] = [set() for _ in range(8)]
    for seed in range(400):
        for values, index in zip(seen, get_frame_indices(50, 8, "rand", generator=rng(seed)), strict=True):
            values.add(int(index))
    assert seen == [set(interval) for interval in intervals(50, 8)]


def test_rand_with_an_interval_of_one_frame_draws_from_the_whole_video() -> None:
    """Frame 11, the last of its interval, is only reachable by the second rule (12 frames in 8 intervals)."""
    assert any(len(interval) == 0 for interval in intervals(12, 8))
    seen = set()
    for seed in range(100):
        indices = get_frame_indices(12, 8, "rand", generator=rng(seed)).tolist()
        assert indices == sorted(set(indices)) and len(indices) == 8
        seen.update(indices)
    assert seen == set(range(12))


def test_middle() -> None:
    # int(linspace(0, 100, 9)) = 0 12 25 37 50 62 75 87 100
    assert get_frame_indices(100, 8, "middle").tolist() == [5, 18, 30, 43, 55, 68, 80, 93]
    for frames in range(1, 60):
        for count in range(1, frames + 1):
            expected = [(one.start + one.stop) // 2 for one in intervals(frames, count)]
            assert get_frame_indices(frames, count, "middle").tolist() == expected


@pytest.mark.parametrize("sampling", ["rand", "middle"])
def test_short_videos_repeat_their_last_frame(sampling: str) -> None:
    assert get_frame_indices(5, 8, sampling, generator=rng()).tolist() == [0, 1, 2, 3, 4, 4, 4, 4]
    assert get_frame_indices(1, 3, sampling, generator=rng()).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("frames", "sampling", "fps", "limit", "expected"),
    [
        (300, "fps1", 30.0, None, [15, 45, 75, 105, 135, 165, 195, 225, 255, 285]),
        (300, "fps1", 30.0, 4, [15, 45, 75, 105]),
        (300, "fps0.5", 30.0, None, [30, 90, 150, 210, 270]),
        (10, "fps2", 5.0, None, [1, 4, 6, 9]),  # 1.25, 3.75, 6.25, 8.75
        (10, "fps1", 5.0, None, [2, 8]),  # 2.5 and 7.5: halves to even
        (10, "fps10", 5.0, None, [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]),
        (9, "fps1", 30.0, None, [4]),  # shorter than half a second
    ],
    ids=["one a second", "limit", "half", "two", "halves", "more than there are", "short"],
)
def test_fps(frames: int, sampling: str, fps: float, limit: int | None, expected: list[int]) -> None:
    chosen = get_frame_indices(frames, 99, sampling, fps=fps, max_frames=limit)
    assert chosen.tolist() == expected


def test_fps_of_a_variable_rate_follows_the_clock() -> None:
    timestamps = [k / 10 for k in range(20)] + [2.0 + k for k in range(10)]
    indices = get_frame_indices(30, 1, "fps1", fps=30 / 12, timestamps=timestamps)
    for moment, index in enumerate(indices):
        distance = [abs(time - (moment + 0.5)) for time in timestamps]
        assert distance[index] == pytest.approx(min(distance))
    assert len(indices) == 11


def test_number_of_frames_is_uniform_with_both_ends() -> None:
    generator = rng()
    counts = np.bincount([draw_frame_count(8, 12, generator) for _ in range(5000)], minlength=13)
    assert counts[:8].sum() == 0 and len(counts) == 13
    assert np.abs(counts[8:] - 1000).max() < 150  # five standard deviations


def test_training_rows_are_a_function_of_the_generator() -> None:
    rows = [training_indices(500, generator=rng(seed)).tolist() for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2]
    np.random.seed(3)  # a global state must not matter
    assert training_indices(500, generator=rng(1)).tolist() == rows[0]
    for seed in range(50):
        row = training_indices(500, generator=rng(seed), min_frames=3, max_frames=6)
        assert 3 <= len(row) <= 6 and (np.diff(row) >= 0).all() and 0 <= row[0] <= row[-1] < 500


def test_training_row_is_the_drawn_count_then_the_drawn_frames() -> None:
    generator = rng(7)
    expected = get_frame_indices(40, draw_frame_count(8, 32, generator), "rand", generator=generator)
    assert (training_indices(40, generator=rng(7)) == expected).all()


def test_fps_rows_take_at_most_max_frames() -> None:
    row = training_indices(3000, "fps1", generator=rng(), min_frames=1, max_frames=5, fps=30.0)
    assert row.tolist() == [15, 45, 75, 105, 135]


@pytest.mark.parametrize("sampling", ["rand", "middle", "fps2"])
def test_clip_restricts_the_frames(sampling: str) -> None:
    for seed in range(20):
        row = training_indices(900, sampling, generator=rng(seed), fps=30.0, clip=(10, 12))
        assert row.min() >= 300 and row.max() < 360
    middle = training_indices(900, "middle", generator=rng(), min_frames=8, max_frames=8, fps=30.0, clip=(10, 12))
    assert (middle == 300 + get_frame_indices(60, 8, "middle")).all()


def test_clip_range() -> None:
    assert clip_range(900, (10, 12), 30.0) == (300, 60)
    assert clip_range(900, (0.99, 2.51), 10.0) == (9, 15)  # both rounded down
    assert clip_range(900, (29, 99), 30.0) == (870, 30)
    assert clip_range(900, (1, 1.001), 30.0) == (30, 1)
    for fps in (8.0, 25.0, 30.0):
        timestamps = [k / fps for k in range(200)]
        for clip in ((0, 1), (1, 4), (3, 5), (2, 99)):
            assert clip_range(200, clip, fps) == clip_range(200, clip, timestamps=timestamps)


def test_clip_of_a_variable_rate_has_the_frames_of_its_seconds() -> None:
    timestamps = [k / 10 for k in range(20)] + [2.0 + k for k in range(10)]
    for start, end in ((0, 2), (1, 4), (2, 5), (0.5, 3)):
        first, count = clip_range(30, (start, end), timestamps=timestamps)
        inside = [k for k, time in enumerate(timestamps) if start <= time < end]
        assert list(range(first, first + count)) == inside


def test_clip_of_a_variable_rate_counts_seconds_from_its_start() -> None:
    timestamps = [k / 10 for k in range(20)] + [2.0 + k for k in range(10)]
    row = training_indices(30, "fps1", generator=rng(), fps=30 / 12, clip=(1, 6), timestamps=timestamps)
    moments = [timestamps[index] for index in row]
    assert moments == pytest.approx([1.5, 2.5, 3.5, 4.5], abs=0.51) and row.min() >= 10 and row.max() < 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: get_frame_indices(10, 8), "generator"),
        (lambda: get_frame_indices(10, 8, "fps1"), "pass fps"),
        (lambda: get_frame_indices(10, 8, "uniform"), "none of rand, middle and fpsX"),
        (lambda: get_frame_indices(10, 8, "fps"), "none of rand"),
        (lambda: get_frame_indices(10, 8, "fps-1"), "none of rand"),
        (lambda: get_frame_indices(10, 8, "fpsinf"), "none of rand"),
        (lambda: get_frame_indices(0, 8, "middle"), "frames must be at least 1"),
        (lambda: draw_frame_count(9, 8, rng()), "min_frames <= max_frames"),
        (lambda: draw_frame_count(0, 8, rng()), "min_frames <= max_frames"),
        (lambda: training_indices(10, generator=rng(), clip=(0, 1)), "pass fps"),
        (lambda: clip_range(10, (2, 3), 5.0), "inside the video"),
        (lambda: clip_range(10, (-1, 3), 5.0), "inside the video"),
        (lambda: clip_range(10, (1, 1), 5.0), "start < end"),
        (lambda: frames_within(200), "cannot hold one frame"),
        (lambda: frame_prompt(2, [0.5]), "1 values for 2 frames"),
        (lambda: frame_prompt(0), "count must be at least 1"),
    ],
    ids=[str(number) for number in range(16)],
)
def test_wrong_arguments(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# --- budget and prompt -----------------------------------------------------------------------------------------------


def test_frames_within_is_the_largest_number_that_fits() -> None:
    for tokens in (266, 531, 532, 8192, 16384):
        frames = frames_within(tokens)
        assert frames * 266 <= tokens < (frames + 1) * 266
    assert frames_within(1000, tokens_per_frame=64, label_tokens=0) == 15


def test_frame_prompt() -> None:
    assert frame_prompt(2) == "Frame-1: <image>\nFrame-2: <image>\n"
    assert frame_prompt(2, [0.5, 12.25]) == "Frame-1 (0.5s): <image>\nFrame-2 (12.2s): <image>\n"


def test_frame_prompt_is_what_the_processor_writes() -> None:
    """The processor leaves the last newline to the text behind `<video>`."""
    from internvl_hub.processing_internvl import _add_video, _Row

    row = _Row([], [])
    _add_video(row, ["frame"] * 3)
    assert "".join(segment.text for segment in row.segments) + "\n" == frame_prompt(3)
