"""Rows of data files: what is accepted, what is refused, and that every refusal names its file and line."""

import json
import pickle
from pathlib import Path

import pytest

from internvl_hub.data.records import RecordError, RecordFile, parse_record


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
        ({}, "'conversations' must be a non-empty list"),
        ({"conversations": []}, "'conversations' must be a non-empty list"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "turn 1 is from 'robot'"),
        ({"conversations": [{"from": "human"}]}, "turn 1 must be an object"),
        ({"conversations": turns("Q")}, "end with gpt"),
        ({"conversations": turns("Q", "A")[::-1]}, "human and gpt in turn"),
        ({"conversations": turns(system="S")}, "human and gpt in turn"),
        ({"image": "a.png", "conversations": turns("<image><image>Q", "A")}, "2 <image> for 1 image"),
        ({"image": ["a", "b"], "conversations": turns("Q", "A")}, "0 <image> for 2 image"),
        ({"conversations": turns("<image>Q", "A")}, "1 <image> for 0 image"),
        ({"image": 3, "conversations": turns("Q", "A")}, "'image' must be a path"),
        ({"video": "v.mp4", "conversations": turns("Q", "A")}, "video"),
    ],
)
def test_bad_rows_are_refused_by_name(row: object, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row, "train.jsonl:7")
    assert str(caught.value).startswith("train.jsonl:7: ")


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
