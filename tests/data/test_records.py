"""Rows of data files: what is accepted, what is refused, and that every refusal names its file and line."""

import json
import pickle
from pathlib import Path

import pytest

from internvl_hub.conversation import ImageSlot
from internvl_hub.data.records import (
    FrameSampling,
    Message,
    Record,
    RecordError,
    RecordFile,
    Video,
    VideoSlot,
    parse_record,
)


def turns(*values: str, system: str | None = None) -> list[dict]:
    """Human and gpt turns in order, after an optional system turn."""
    output = [] if system is None else [{"from": "system", "value": system}]
    return output + [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def test_single_image() -> None:
    record = parse_record({"image": "a.png", "conversations": turns("<image>\nQ", "A")}, root="pictures")
    assert record.images == (Path("pictures/a.png"),)
    assert [(m.speaker, m.text) for m in record.messages] == [("human", "<image>\nQ"), ("gpt", "A")]


def test_missing_placeholder_of_a_single_image_leads_the_first_human_turn() -> None:
    record = parse_record({"image": "a.png", "conversations": turns("Q", "A", "R", "B", system="S")})
    assert [m.text for m in record.messages] == ["S", "<image>\nQ", "A", "R", "B"]


def test_text_row() -> None:
    for image in ({}, {"image": ""}, {"image": None}, {"image": []}):
        assert parse_record({**image, "conversations": turns("Q", "A")}).images == ()


def test_several_images() -> None:
    row = {"image": ["a.png", "b.png"], "conversations": turns("<image>\n<image>\nQ", "A, not <image>")}
    record = parse_record(row)
    assert len(record.images) == record.placeholders == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "must be a json object"),
        ({"conversations": []}, "'conversations' must be a non-empty list"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1 is from 'robot'"),
        ({"conversations": [{"from": "human"}]}, "turn 1 must be an object"),
        ({"conversations": turns("Q")}, "end with gpt"),
        ({"conversations": turns("Q", "A")[::-1]}, "human and gpt in turn"),
        ({"conversations": turns(system="S")}, "human and gpt in turn"),
        ({"conversation": []}, "human and gpt in turn .* got none"),
        ({"image": "a.png", "conversations": turns("<image><image>Q", "A")}, "2 <image> for 1 image"),
        ({"image": ["a", "b"], "conversations": turns("Q", "A")}, "0 <image> for 2 image"),
        ({"conversations": turns("<image>Q", "A")}, "1 <image> for 0 image"),
        ({"image": 3, "conversations": turns("Q", "A")}, "'image' must be a path"),
        ({"image": "a", "video": "v.mp4", "conversations": turns("Q", "A")}, "0 <image> for 1 image"),
        (
            {"image": "a", "video": "v.mp4", "conversations": turns("<image>Q<video><video>", "A")},
            "2 <video> for 1 video",
        ),
        ({"video": ["v.mp4", "w.mp4"], "conversations": turns("Q", "A")}, "0 <video> for 2 video"),
        ({"conversations": turns("<video>Q", "A")}, r"1 <video> for 0 video\(s\); .* \{\"text\": \.\.\., \"slots\""),
        (
            {"conversations": [{"from": "pretrain", "value": "P"}, *turns("Q", "A")]},
            "or be one pretrain turn; got pre",
        ),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "pretrain", "value": "P"}]},
            "one pretrain turn",
        ),
        ({"conversations": [{"from": "pretrain", "value": "<image>"}]}, "1 <image> for 0 image"),
        ({"conversations": turns("Q", "A", system="S") * 2}, "system only first"),
    ],
)
def test_bad_rows_are_refused_by_name(row: object, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row, "train.jsonl:7")
    assert str(caught.value).startswith("train.jsonl:7: ")


def test_videos_and_images_are_consumed_in_their_own_order() -> None:
    row = {"image": ["a.png", "b.png"], "video": ["v.mp4", "w.mp4"], "clip": [[1, 2.5], None]}
    row["conversations"] = turns("<video>\n<image>Q", "<video> A", "<image><video>", "B")
    record = parse_record(row, root="media")
    assert record.images == (Path("media/a.png"), Path("media/b.png"))
    assert record.videos == (Video(Path("media/v.mp4"), (1.0, 2.5)), Video(Path("media/w.mp4")))
    assert [message.parts for message in record.messages] == [
        (VideoSlot(), "\n", ImageSlot(), "Q"), ("<video> A",), (ImageSlot(), VideoSlot()), ("B",),
    ]  # fmt: skip
    assert (record.placeholders, record.video_placeholders) == (2, 2)


def test_missing_placeholder_of_a_single_video_leads_the_first_human_turn() -> None:
    record = parse_record({"video": "v.mp4", "conversations": turns("Q", "A", system="S")})
    assert [m.text for m in record.messages] == ["S", "<video>\nQ", "A"]
    record = parse_record({"video": "v.mp4", "image": "a.png", "conversations": turns("Q <image>", "A")})
    assert record.messages[0].parts == (VideoSlot(), "\nQ ", ImageSlot())


def test_leading_placeholder_moves_the_slots() -> None:
    value = {"text": "<image> and <image>", "slots": [12]}
    conversations = [{"from": "human", "value": value}, {"from": "gpt", "value": "A"}]
    record = parse_record({"video": "v.mp4", "image": "a.png", "conversations": conversations})
    assert record.messages[0].parts == (VideoSlot(), "\n<image> and ", ImageSlot())


def test_pretrain_rows() -> None:
    record = parse_record({"conversations": [{"from": "pretrain", "value": "Once <upon> a time"}]})
    assert record.messages == (Message("pretrain", "Once <upon> a time"),)
    row = {"image": ["a", "b"], "conversations": [{"from": "pretrain", "value": "A <image> and <image>."}]}
    assert parse_record(row).messages[0].parts == ("A ", ImageSlot(), " and ", ImageSlot(), ".")
    row = {"image": "a", "conversations": [{"from": "pretrain", "value": "A cat."}]}
    assert parse_record(row).messages[0].text == "<image>\nA cat."


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ("v.mp4", Video(Path("r/v.mp4"))),
        ("/d/v.mp4", Video(Path("/d/v.mp4"))),
        ("http://h/v.mp4", Video("http://h/v.mp4")),
        ([{"path": ["1.png", "http://h/2.png"]}], Video((Path("r/1.png"), "http://h/2.png"))),
        ({"path": "v.mp4", "clip": [2, None]}, Video(Path("r/v.mp4"), (2.0, float("inf")))),
        (
            {"path": "v.mp4", "fps": 0.5, "max_frames": 9},
            Video(Path("r/v.mp4"), None, FrameSampling(0.5, None, None, 9)),
        ),
        ({"path": "v.mp4", "num_frames": 4}, Video(Path("r/v.mp4"), None, FrameSampling(num_frames=4))),
        ({"path": "v.mp4", "indices": [0, 7]}, Video(Path("r/v.mp4"), None, FrameSampling(indices=(0, 7)))),
    ],
)
def test_video_of_a_row(video: object, expected: Video) -> None:
    record = parse_record({"video": video, "conversations": turns("<video>\nQ", "A")}, root="r")
    assert record.videos == (expected,)


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ({"clip": [3, 2]}, "0 <= start < end"),
        ({"clip": [-1, 2]}, "0 <= start < end"),
        ({"clip": [1]}, "0 <= start < end"),
        ({"clip": ["0", "1"]}, "0 <= start < end"),
        ({"clip": [float("nan"), 1]}, "0 <= start < end"),
        ({"num_frames": 0}, "positive integers"),
        ({"max_frames": 2.5}, "positive integers"),
        ({"fps": 0}, "positive number"),
        ({"fps": float("inf")}, "positive number"),
        ({"indices": [-1]}, "list of integers from 0"),
        ({"indices": []}, "list of integers from 0"),
    ],
)
def test_bad_sampling_is_refused(video: dict, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        parse_record({"video": {"path": "v.mp4", **video}, "conversations": turns("<video>Q", "A")})


def test_urls_have_no_root() -> None:
    images = ["http://h/a.png", "data:image/png;base64,AA==", "b.png"]
    row = {"image": images, "conversations": turns("<image><image><image>", "A")}
    assert parse_record(row, root="r").images == (*images[:2], Path("r/b.png"))
    assert parse_record(row, root="http://h/d/").images == (*images[:2], "http://h/d/b.png")


def test_positional_order_of_a_record() -> None:
    record = Record((Message("human", "<image>"),), ("a.png",), "here")
    assert (record.images, record.where, record.videos) == (("a.png",), "here", ())


def test_fingerprint_covers_the_content_and_the_root(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("1\n")
    (tmp_path / "b.jsonl").write_text("2\n")
    first = RecordFile(tmp_path / "a.jsonl", tmp_path).fingerprint()
    assert RecordFile(tmp_path / "a.jsonl", str(tmp_path)).fingerprint() == first
    assert RecordFile(tmp_path / "a.jsonl", tmp_path / "x").fingerprint() != first
    assert RecordFile(tmp_path / "b.jsonl", tmp_path).fingerprint() != first


def test_jsonl_counts_lines_as_an_editor_does(tmp_path: Path) -> None:
    good = json.dumps({"conversations": turns("Q", "答")}, ensure_ascii=False)
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{good}\n\n{good}\n{{broken\n{good}", encoding="utf-8")
    file = RecordFile(path)
    assert len(file) == 4
    assert file[1].where == f"{path}:3"
    assert file[3].messages[1].text == "答"
    with pytest.raises(RecordError, match=r"rows\.jsonl:4: not valid json"):
        file[2]


def test_json_list(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"conversations": turns("Q", "A")}] * 3))
    assert [record.where for record in RecordFile(path)] == [f"{path}[{i}]" for i in range(3)]
    path.write_text("{}")
    with pytest.raises(RecordError, match="must hold a list"):
        RecordFile(path)


def test_errors_cross_processes() -> None:
    error = pickle.loads(pickle.dumps(RecordError("a:1", "broken")))
    assert (error.where, error.problem, str(error)) == ("a:1", "broken", "a:1: broken")
