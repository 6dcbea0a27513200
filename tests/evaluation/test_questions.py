"""Questions from files: every kind of row, keys, and errors that name the line."""

import json
from pathlib import Path
from typing import Any

import pytest

from internvl_hub.data.annotations import RecordError
from internvl_hub.data.records import FrameSampling, Video
from internvl_hub.evaluation.questions import Question, parse_questions, read_questions


def write(folder: Path, rows: list[Any], name: str = "data.jsonl") -> Path:
    path = folder / name
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def one(row: dict[str, Any], **options: Any) -> Question:
    (question,) = parse_questions(row, "f.jsonl:1", **options)
    return question


def test_a_question_row(tmp_path: Path) -> None:
    row = {"question": "How many?", "image": "a/b.png", "answer": 3, "task": "relaxed", "category": "count", "id": 7}
    (question,) = read_questions(write(tmp_path, [{**row, "hint": "Look.", "extra": None}]), "root")
    assert question == Question(
        "7", "<image>\nHow many?", (Path("root/a/b.png"),), (), ("3",), (), "relaxed", "count",
        f"{tmp_path}/data.jsonl:1", {"hint": "Look."},
    )  # fmt: skip


ANSWERS = {
    "text": ({"answer": "a"}, ("a",)),
    "list": ({"answer": ["a", 2]}, ("a", "2")),
    "objects": ({"answers": [{"answer": "yes", "answer_id": 1}, {"answer": "no"}]}, ("yes", "no")),
    "short answer first": ({"answer": "long", "answers": ["b"], "answer_gt": "c"}, ("c",)),
    "index": ({"answer": 1, "choices": ["x", "y"]}, ("B",)),
    "number among options": ({"answer": 1, "choices": ["1", "2"]}, ("1",)),
    "none": ({}, ()),
    "null": ({"answer": None}, ()),
    "box": ({"bbox": [10, 20, 30, 40]}, ("[[10, 20, 30, 40]]",)),
    "box in pixels": ({"bbox": [10, 20, 30, 40], "width": 100, "height": 300}, ("[[100, 66.67, 300, 133.33]]",)),
    "answer beside a box": ({"bbox": [1, 2, 3, 4], "answer": "no"}, ("no",)),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_gold_answers(name: str) -> None:
    row, expected = ANSWERS[name]
    assert one({"question": "?", **row}).answers == expected


def overlap(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return (x2 - x1) * (y2 - y1)

    both = area(*map(max, first[:2], second[:2]), *map(min, first[2:], second[2:]))
    return both / (area(*first) + area(*second) - both)


def test_a_box_in_pixels_keeps_its_overlaps() -> None:
    sides, gold, guess = (640, 427, 640, 427), (12.4, 30.0, 300.2, 401.0), (40.0, 10.0, 333.0, 380.0)
    (text,) = one({"question": "?", "bbox": list(gold), "width": 640, "height": 427}).answers
    scaled = tuple(1000 * value / side for value, side in zip(guess, sides, strict=True))
    assert overlap(tuple(json.loads(text)[0]), scaled) == pytest.approx(overlap(gold, guess), abs=1e-4)


OPTIONS = {
    "list": {"options": ["a", 2]},
    "choices": {"choices": ["a", "2"]},
    "object": {"options": {"A": "a", "B": "2"}},
    "letters": {"A": "a", "B": 2, "C": None, "D": "left out"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str) -> None:
    assert one({"question": "?", **OPTIONS[name]}).options == ("a", "2")


def test_one_letter_is_no_choice() -> None:
    question = one({"question": "?", "A": "a"})
    assert question.options == () and question.fields["A"] == "a"


def test_videos_and_several_pictures() -> None:
    question = one({"question": "<image> and <image>?", "images": ["a.png", "http://x/b.png"]}, root="r")
    assert question.images == (Path("r/a.png"), "http://x/b.png")
    film = one({"question": "What?", "video": {"path": "v.mp4", "num_frames": 4}, "clip": [1, 2]}, root="r")
    assert film.text == "<video>\nWhat?"
    assert film.videos == (Video(Path("r/v.mp4"), (1.0, 2.0), FrameSampling(num_frames=4)),)


TURNS = {
    "conversations": {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."},
            {"from": "human", "value": "Colour?"}, {"from": "gpt", "value": "Red."},
        ],
        "image": "a.png",
    },
    "messages": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": "A cat."},
            {"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "Red."},
        ],
        "images": ["a.png"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS)
def test_a_conversation(name: str) -> None:
    question = one({**TURNS[name], "category": "pets"})
    assert (question.text, question.answers, question.images) == ("<image>\nWhat?", ("A cat.",), (Path("a.png"),))
    assert question.category == "pets" and dict(question.fields) == {"system": "Be brief."}


@pytest.mark.parametrize("name", TURNS)
def test_every_turn_on_its_own(name: str) -> None:
    first, second = parse_questions({**TURNS[name], "answer": "cat"}, all_turns=True)
    assert first.answers == ("cat",) and second.answers == ("Red.",)
    assert second.text == "<image>\nColour?" and second.images == first.images


def test_later_turns_see_the_media_before_them() -> None:
    talk = ["<image>\nOne?", "1", "<image> or <video>\n?", "2", "Three?", "3"]
    turns = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(talk)]
    questions = list(parse_questions({"conversations": turns, "image": ["a", "b"], "video": "v"}, all_turns=True))
    assert [q.text for q in questions] == [
        "<image>\nOne?",
        "<image>\n<image> or <video>\n?",
        "<image>\n<image>\n<video>\nThree?",
    ]
    assert [(len(q.images), len(q.videos)) for q in questions] == [(1, 0), (2, 1), (2, 1)]


def test_a_conversation_without_its_answer() -> None:
    question = one({"conversations": [{"from": "human", "value": "Why?"}], "answer": "because"})
    assert (question.text, question.answers) == ("Why?", ("because",))
    assert one({"messages": [{"role": "user", "content": "Why?"}]}).answers == ()


def test_keys(tmp_path: Path) -> None:
    rows = [{"question": "?", "id": value} for value in ("a", 1, "1", None, "b")]
    assert [q.key for q in read_questions(write(tmp_path, rows))] == ["a", "data:2", "data:3", "data:4", "b"]
    assert [q.key for q in read_questions(write(tmp_path, rows, "d.json"))] == ["a", "d:2", "d:3", "d:4", "b"]
    talk = [{"from": ("human", "gpt")[i % 2], "value": str(i)} for i in range(4)]
    rows = [{"conversations": talk, "id": "x"}, {"conversations": talk}]
    keys = [q.key for q in read_questions(write(tmp_path, rows), all_turns=True)]
    assert keys == ["x#1", "x#2", "data:2#1", "data:2#2"]


def test_keys_stay_unique_whatever_the_ids(tmp_path: Path) -> None:
    rows = [{"question": "?", "id": value} for value in ("data:2", None, "c")]
    assert [q.key for q in read_questions(write(tmp_path, rows))] == ["data:1", "data:2", "data:3"]


BAD = {
    "no object": ([1], "json object"),
    "unknown format": ({"prompt": "?"}, "unknown format"),
    "question": ({"question": ["?"]}, "'question' must be text"),
    "answer": ({"question": "?", "answer": True}, "'answer' must be"),
    "nested answer": ({"question": "?", "answers": [["a"]]}, "'answers' must be"),
    "index": ({"question": "?", "answer": 2, "options": ["a", "b"]}, "2 options, counted from 0"),
    "options": ({"question": "?", "options": "a, b"}, "'options' must be"),
    "box": ({"question": "?", "bbox": [1, 2, 3]}, "'bbox' must be"),
    "box of sizes": ({"question": "?", "bbox": [50, 50, 20, 20]}, "not width and height"),
    "size": ({"question": "?", "bbox": [1, 2, 3, 4], "width": 5}, "'width' and 'height'"),
    "task": ({"question": "?", "task": ["vqa"]}, "'task' must be"),
    "id": ({"question": "?", "id": {"a": 1}}, "'id' must be"),
    "media": ({"question": "<image><image>", "image": "a"}, "2 <image> for 1 image"),
    "running text": ({"text": "Once upon"}, "no question"),
    "literal": ({"conversations": [{"from": "human", "value": {"text": "<image>?", "slots": []}}]}, "is only text"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_line(name: str, tmp_path: Path) -> None:
    row, message = BAD[name]
    path = write(tmp_path, [{"question": "fine"}, row])
    with pytest.raises(RecordError, match=message) as caught:
        read_questions(path)
    assert str(caught.value).startswith(f"{path}:2: ")


def test_an_empty_file(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="no rows"):
        read_questions(write(tmp_path, []))
