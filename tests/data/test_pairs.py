"""Preference rows: the same pair out of every format, and one clear error for every way to get a row wrong."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from internvl_hub.data.mixture import DataSource, Mixture
from internvl_hub.data.pairs import EmptyAnswerError, PairRecord, is_pair, parse_any, parse_pair
from internvl_hub.data.records import Message, PlaceholderError, Record, RecordError, RecordFile, Video, parse_record

Row = dict[str, Any]
PICTURE = {"image": "a.png"}


def pair(*prompt: Message, media: Row | None = None, chosen: str = "Good", rejected: str = "Bad") -> PairRecord:
    """What a row should become, written with the classes themselves."""
    return PairRecord(
        *(Record((*prompt, Message("gpt", text)), where="rows:1", **(media or {})) for text in (chosen, rejected))
    )


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def gpt(value: str) -> Row:
    return {"from": "gpt", "value": value}


ASKED = Message("human", "Q")
SEEN = Message("human", "<image>\nQ")
EARLIER = (Message("human", "<image>\nHi"), Message("gpt", "Hello"), ASKED)
SYSTEM = Message("system", "Be brief.")
ONE = {"images": (Path("a.png"),)}
ANSWERS = {"chosen": "Good", "rejected": "Bad"}
MESSAGES = {"chosen": [assistant("Good")], "rejected": [assistant("Bad")]}
TURNS = {"chosen": gpt("Good"), "rejected": gpt("Bad")}
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Q"}]

FORMATS: dict[str, tuple[Row, PairRecord]] = {
    "mmpr": ({**PICTURE, "question": "<image>\nQ", **ANSWERS}, pair(SEEN, media=ONE)),
    "mmpr-no-mark": ({**PICTURE, "question": "Q", **ANSWERS}, pair(SEEN, media=ONE)),
    "mmpr-list": (
        {"image": ["a.png", "b.png"], "question": "<image><image>Q", **ANSWERS},
        pair(Message("human", "<image><image>Q"), media={"images": (Path("a.png"), Path("b.png"))}),
    ),
    "mmpr-text": ({"question": "Q", **ANSWERS}, pair(ASKED)),
    "mmpr-null-image": ({"image": None, "question": "Q", **ANSWERS}, pair(ASKED)),
    "mmpr-meta": (
        {"id": 3, "question": "Q", **ANSWERS, "answer_gt": "G", "chosen_meta": {"a": 1}, "rejected_meta": ["x"]},
        pair(ASKED),
    ),
    "mmpr-video": (
        {"video": "v.mp4", "clip": [1, 2], "question": "Q", **ANSWERS},
        pair(Message("human", "<video>\nQ"), media={"videos": (Video(Path("v.mp4"), (1.0, 2.0)),)}),
    ),
    "mmpr-system-history": (
        {**PICTURE, "system": "Be brief.", "history": [["<image>\nHi", "Hello"]], "question": "Q", **ANSWERS},
        pair(SYSTEM, *EARLIER, media=ONE),
    ),
    "trl": ({"prompt": [user("Q")], **MESSAGES}, pair(ASKED)),
    "trl-images": ({"images": ["a.png"], "prompt": [user("Q")], **MESSAGES}, pair(SEEN, media=ONE)),
    "trl-parts": ({"prompt": [user(PARTS)], **MESSAGES}, pair(SEEN, media=ONE)),
    "trl-parts-list": (
        {"images": ["a.png"], "prompt": [user([{"type": "image"}, PARTS[1]])], **MESSAGES},
        pair(SEEN, media=ONE),
    ),
    "trl-answer-parts": (
        {"prompt": [user("Q")], "chosen": [assistant([{"type": "text", "text": "Good"}])], "rejected": "Bad"},
        pair(ASKED),
    ),
    "trl-turns": (
        {"images": ["a.png"], "prompt": [{"role": "system", "content": "Be brief."}, user("<image>\nHi"),
         assistant("Hello"), user("Q")], **MESSAGES},
        pair(SYSTEM, *EARLIER, media=ONE),
    ),
    "trl-long-answers": (
        {"images": ["a.png"], "prompt": [user("Hi")], "chosen": [assistant("Hello"), user("Q"), assistant("Good")],
         "rejected": [assistant("Hello"), user("Q"), assistant("Bad")]},
        pair(*EARLIER, media=ONE),
    ),
    "trl-implicit": (
        {"images": ["a.png"], "chosen": [user("Hi"), assistant("Hello"), user("Q"), assistant("Good")],
         "rejected": [user("Hi"), assistant("Hello"), user("Q"), assistant("Bad")], "score_chosen": 8},
        pair(*EARLIER, media=ONE),
    ),
    "trl-strings": ({"prompt": "Q", **ANSWERS}, pair(ASKED)),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}], **TURNS}, pair(ASKED)),
    "sharegpt-turns": (
        {"conversations": [{"from": "human", "value": "<image>\nHi"}, gpt("Hello"), {"from": "human", "value": "Q"}],
         **TURNS, "system": "Be brief.", "images": ["a.png"]},
        pair(SYSTEM, *EARLIER, media=ONE),
    ),
    "sharegpt-openai": (
        {"messages": [user("Q")], "chosen": assistant("Good"), "rejected": assistant("Bad")}, pair(ASKED),
    ),
    "alpaca": ({"instruction": "Q", "input": "", **ANSWERS}, pair(ASKED)),
    "alpaca-input": ({"instruction": "Q", "input": "R", **ANSWERS, "system": "Be brief."},
                     pair(SYSTEM, Message("human", "Q\nR"))),
    "query": ({**PICTURE, "query": "Q", "history": [["Hi", "Hello"]], **ANSWERS}, pair(*EARLIER, media=ONE)),
    "swift": ({"messages": [user("Q"), assistant("Good")], "rejected_response": "Bad"}, pair(ASKED)),
    "swift-turns": (
        {"images": ["a.png"], "messages": [user("<image>\nHi"), assistant("Hello"), user("Q"), assistant("Good")],
         "rejected_response": "Bad"},
        pair(*EARLIER, media=ONE),
    ),
    "swift-messages": (
        {"images": ["a.png"], "rejected_images": ["a.png"], "messages": [user("<image>\nQ"), assistant("Good")],
         "rejected_messages": [user("<image>\nQ"), assistant("Bad")]},
        pair(SEEN, media=ONE),
    ),
    "swift-query": ({"query": "Q", "response": "Good", "rejected_response": "Bad", **PICTURE}, pair(SEEN, media=ONE)),
    "union-of-formats": (
        {"question": "Q", **ANSWERS, "prompt": None, "rejected_response": "", "rejected_messages": "[]", "images": []},
        pair(ASKED),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats(name: str) -> None:
    row, expected = FORMATS[name]
    copy = json.loads(json.dumps(row))
    assert is_pair(row)
    assert parse_pair(row, "rows:1") == parse_any(row, "rows:1") == expected
    assert row == copy


def test_paths_are_below_the_root_and_the_row_is_named() -> None:
    found = parse_pair(FORMATS["mmpr"][0], "rows:7", "folder")
    assert found.chosen.images == found.rejected.images == (Path("folder/a.png"),)
    assert found.where == found.rejected.where == "rows:7"


def test_marks_in_answers_are_text() -> None:
    row = {**PICTURE, "question": "<image>\nQ", "chosen": "the <image> tag", "rejected": "<video>"}
    found = parse_pair(row)
    assert (found.chosen.placeholders, found.rejected.video_placeholders) == (1, 0)


def test_text_parts_of_messages_hold_no_media() -> None:
    found = parse_pair({"prompt": [user([{"type": "text", "text": "an <image> tag"}])], **MESSAGES})
    assert found.chosen.placeholders == found.rejected.placeholders == 0


def test_equal_answers_are_allowed() -> None:
    found = parse_pair({"question": "Q", "chosen": "A", "rejected": "A"})
    assert found.chosen == found.rejected


def test_answers_are_kept_as_they_are() -> None:
    found = parse_pair({"prompt": "The sky is", "chosen": " blue.\n", "rejected": " green "})
    assert [r.messages[-1].text for r in (found.chosen, found.rejected)] == [" blue.\n", " green "]


@pytest.mark.parametrize(
    "row",
    [{"conversations": [gpt("A")]}, {"messages": [], "chosen": None, "rejected": ""}, {"rejected_messages": "[]"}, 3],
    ids=["conversation", "empty", "string", "number"],
)
def test_other_rows_are_no_pairs(row: Any) -> None:
    assert not is_pair(row)


def test_both_kinds_in_one_file() -> None:
    plain = {"query": "Q", "response": "A"}
    assert parse_any(plain, "rows:2") == parse_record(plain, "rows:2")


# -------------------------------------------------------------------------------------------------------------- errors

ERRORS: dict[str, tuple[Any, str]] = {
    "no-object": ([1], "must be a json object, got list"),
    "no-pair": ({"query": "Q", "response": "A"}, "no 'chosen'; a preference row needs a 'chosen' and a 'rejected'"),
    "no-rejected": ({"question": "Q", "chosen": "A"}, "no 'rejected'"),
    "null-chosen": ({"question": "Q", "chosen": None, "rejected": "B"}, "no 'chosen'"),
    "number": ({"question": "Q", "chosen": "A", "rejected": 2}, "'rejected' must be a text, a message or a list"),
    "texts": ({"question": "Q", "chosen": ["A"], "rejected": "B"}, "'chosen' must be a text, a message or a list"),
    "no-messages": ({"question": "Q", "chosen": [], "rejected": "B"}, "'chosen' must be a text, a message or a list"),
    "no-question": (ANSWERS, "no question to its answers; understood are 'question', 'prompt'"),
    "no-prompt": (MESSAGES, "no question to its answers"),
    "two-questions": ({"question": "Q", "prompt": "Q", **ANSWERS}, "'question' and 'prompt'; keep one of them"),
    "two-lists": ({"prompt": [user("Q")], "messages": [user("Q")], **MESSAGES}, "'prompt' and 'messages'; keep one"),
    "two-formats": ({**FORMATS["swift"][0], **ANSWERS}, "'rejected_response' beside 'chosen' and 'rejected'"),
    "whole-and-prompt": (
        {"prompt": [user("Q")], "chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]},
        "with 'chosen' as its answer: turns must be human and gpt in turn",
    ),
    "answered": (
        {"conversations": [{"from": "human", "value": "Q"}, gpt("A")], **TURNS},
        "with 'chosen' as its answer: turns must be human and gpt in turn .* got human, gpt, gpt",
    ),
    "not-last": (
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("B"), user("More?")]},
        "with 'rejected' as its answer: turns must .* end with gpt",
    ),
    "of-user": ({"prompt": [user("Q")], "chosen": user("A"), "rejected": "B"}, "with 'chosen' as its answer: turns"),
    "no-role": ({"prompt": [user("Q")], "chosen": {"content": "A"}, "rejected": "B"}, "'chosen'.*2 is from None"),
    "content": ({"prompt": [user("Q")], "chosen": [assistant(5)], "rejected": "B"}, "turn 2 must be an object"),
    "picture-in-answer": (
        {"prompt": [user("Q")], "chosen": [assistant(PARTS)], "rejected": "B"}, "holds a picture or video",
    ),
    "prompts-differ": (
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("R"), assistant("B")]},
        "the chosen and the rejected conversation differ in turn 1; they must be the same up to their last answer",
    ),
    "turns-differ": (
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("A"), user("R"), assistant("B")]},
        "differ in turn 2",
    ),
    "history": ({"question": "Q", "history": "Hi", **ANSWERS}, "'history' must be a list of"),
    "history-text": ({"question": "Q", "history": [["Hi", None]], **ANSWERS}, "turn 2 must be an object"),
    "system": ({"question": "Q", "system": 3, **ANSWERS}, "'system' must be text"),
    "tools": ({"question": "Q", "tools": "[{}]", **ANSWERS}, "'tools': tool descriptions are not supported"),
    "audio": ({"question": "Q", "audio": "a.wav", **ANSWERS}, "'audio': audio is not supported"),
    "foreign": ({"prompt": "<img>a.png</img>Q", **ANSWERS}, "write <image> for <img>path</img>"),
    "swift-no-answer": ({"messages": [user("Q")], "rejected_response": "B"}, "with 'messages' as its answer: turns"),
    "swift-only-rejected": ({"rejected_response": "B"}, "no chosen answer; it needs 'messages' or 'query'"),
    "swift-only-messages": ({"query": "Q", "response": "A", "rejected_messages": [user("Q")]}, "it needs 'messages'"),
    "swift-list": ({**FORMATS["swift"][0], "rejected_response": ["B"]}, "'rejected_response' must be text"),
    "swift-text": ({**FORMATS["swift-messages"][0], "rejected_messages": "B"}, "'rejected_messages' must be a list"),
    "swift-both": (
        {**FORMATS["swift-messages"][0], "rejected_response": "B"}, "'rejected_response' and 'rejected_messages'",
    ),
    "swift-media": ({**FORMATS["swift-messages"][0], "rejected_images": ["b.png"]}, "'rejected_images' must be those"),
    "swift-prompt": (
        {**FORMATS["swift-messages"][0], "rejected_messages": [user("<image>"), assistant("B")]}, "differ in turn 1",
    ),
    "pretrain": (
        {"messages": [assistant("A")], "rejected_messages": [assistant("B")]}, "an answer, not with pretrain",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(ERRORS))
def test_errors_name_the_line_and_the_fix(name: str) -> None:
    row, problem = ERRORS[name]
    with pytest.raises(RecordError, match=f"^rows.jsonl:3: .*({problem})") as caught:
        parse_pair(row, "rows.jsonl:3")
    assert caught.value.where == "rows.jsonl:3"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"question": "Q", "chosen": "", "rejected": "B"}, "the chosen answer has no text; write it, or leave"),
        ({"question": "Q", "chosen": "A", "rejected": " \n"}, "the rejected answer has no text"),
        ({"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("")]}, "the rejected answer"),
        ({"messages": [user("Q"), assistant("")], "rejected_response": "B"}, "the chosen answer"),
        ({"messages": [user("Q"), assistant("A")], "rejected_response": ""}, "the rejected answer"),
    ],
    ids=["chosen", "spaces", "message", "swift", "swift-rejected"],
)
def test_empty_answers(row: Row, problem: str) -> None:
    with pytest.raises(EmptyAnswerError, match=f"^rows:1: {problem}"):
        parse_pair(row, "rows:1")


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**PICTURE, "question": "<image><image>Q"}, "2 <image> for 1 image"),
        ({"image": ["a.png", "b.png"], "question": "<image>Q"}, "1 <image> for 2 image"),
        ({"image": ["a.png", "b.png"], "question": "Q"}, "0 <image> for 2 image"),
        ({"question": "<image>Q"}, "1 <image> for 0 image"),
        ({"video": "v.mp4", "question": "<video><video>Q"}, "2 <video> for 1 video"),
    ],
    ids=["marks", "media", "order", "none", "video"],
)
def test_marks_and_media(row: Row, problem: str) -> None:
    with pytest.raises(
        PlaceholderError, match=f"^rows:1: with 'chosen' as its answer: the human turns have {problem}"
    ):
        parse_pair({**row, **ANSWERS}, "rows:1")


def test_supervised_training_says_where_pairs_belong() -> None:
    for name in ("mmpr", "trl", "trl-implicit", "sharegpt", "alpaca", "swift", "swift-messages"):
        with pytest.raises(RecordError, match="preference training.*'preference' section.*keep only the answer"):
            parse_record(FORMATS[name][0])


def test_pairs_made_by_hand_are_checked() -> None:
    chosen, rejected = pair(ASKED).chosen, pair(SEEN).rejected
    with pytest.raises(RecordError, match="differ in turn 1"):
        PairRecord(chosen, rejected)
    with pytest.raises(RecordError, match="must have the same images"):
        PairRecord(pair(SEEN, media=ONE).chosen, pair(SEEN, media={"images": (Path("b.png"),)}).rejected)
    with pytest.raises(RecordError, match="must have the same videos"):
        PairRecord(chosen, pair(ASKED, media={"videos": (Video("v"),)}).rejected)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "<image>", "a.png", "user", "gpt", "[]"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "type", "text", "image", "slots"]), inner, max_size=3
    ),
    max_leaves=6,
)  # fmt: skip
KEYS = ["chosen", "rejected", "rejected_response", "rejected_messages", "prompt", "question", "messages", "input",
        "conversations", "conversation", "instruction", "query", "response", "history", "system", "image", "images",
        "rejected_images", "video", "clip"]  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6), st.sampled_from(list(FORMATS)))
def test_any_row_is_a_pair_or_a_record_error(changes: Row, name: str) -> None:
    for row in (changes, {**FORMATS[name][0], **changes}):
        try:
            found = parse_pair(row, "rows:1")
        except RecordError as error:
            assert error.where == "rows:1" and error.problem
        else:
            assert found.chosen.messages[:-1] == found.rejected.messages[:-1]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [FORMATS["mmpr"][0], {"query": "Q", "response": "A"}, FORMATS["swift"][0]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_record_file_and_mixture(rows: Path) -> None:
    file = RecordFile(rows, "folder", parse_pair)
    mixture = Mixture([DataSource("mine", str(rows), "folder")], parse=parse_pair)
    for records in (file, mixture, pickle.loads(pickle.dumps(file)), pickle.loads(pickle.dumps(mixture))):
        assert records[0] == parse_pair(FORMATS["mmpr"][0], f"{rows}:1", "folder")
        with pytest.raises(RecordError, match=r"rows\.jsonl:2: the row has no 'chosen'"):
            records[1]
        assert records[2].rejected.messages[-1] == Message("gpt", "Bad")
    with pytest.raises(RecordError, match=r"rows\.jsonl:1: the row has 'chosen'"):
        RecordFile(rows)[0]


def test_fingerprints_differ_between_parsers(rows: Path) -> None:
    parsers = (parse_record, parse_pair, parse_any)
    files = [RecordFile(rows, parse=parse).fingerprint() for parse in parsers]
    mixtures = [Mixture([DataSource("mine", str(rows))], parse).fingerprint() for parse in parsers]
    assert len(set(files)) == len(set(mixtures)) == 3
    assert files == [RecordFile(rows, parse=parse).fingerprint() for parse in parsers]
    assert RecordFile(rows).fingerprint() == files[0]
