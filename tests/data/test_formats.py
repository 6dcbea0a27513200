"""Every known format to the canonical row, each example in the shape that the format's documentation shows."""

import json
from typing import Any

import pytest

from internvl_hub.conversation import ImageSlot, conversation_from_messages, get_template
from internvl_hub.data.formats import to_row
from internvl_hub.data.records import RecordError, VideoSlot, parse_record


def said(*values: str, system: str | None = None) -> list[dict[str, str]]:
    output = [] if system is None else [{"from": "system", "value": system}]
    return output + [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


def user(*parts: Any, answer: str = "A") -> dict[str, Any]:
    content = parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


QA = said("Q", "A")
TWO = said("Q1", "A1", "Q2", "A2", system="S")
PICTURE = {"type": "image_url", "image_url": {"url": "http://h/a.png"}}

# name: row, conversations, image, video
EXAMPLES: dict[str, tuple[dict[str, Any], list[dict[str, Any]], list[Any], list[Any]]] = {
    "internvl single image": (
        {"id": 0, "image": "a.jpg", "width": 9, "height": 9, "length": 7, "conversations": said("<image>\nQ", "A")},
        said("<image>\nQ", "A"), ["a.jpg"], [],
    ),
    "internvl several images": (
        {"id": 0, "image": ["a.jpg", "b.jpg"], "width_list": [9, 9], "height_list": [9, 9],
         "conversations": said("Image-1: <image>\nImage-2: <image>\nQ", "A")},
        said("Image-1: <image>\nImage-2: <image>\nQ", "A"), ["a.jpg", "b.jpg"], [],
    ),
    "internvl video with clip": (
        {"id": 0, "video": "v.mp4", "clip": [1, 2.5], "conversations": said("<video>\nQ", "A")},
        said("<video>\nQ", "A"), [], [{"path": "v.mp4", "clip": [1, 2.5]}],
    ),
    "internvl videos with clips": (
        {"video": ["v.mp4", "w.mp4"], "clip": [None, [0, 1]], "conversations": said("<video><video>Q", "A")},
        said("<video><video>Q", "A"), [], [{"path": "v.mp4"}, {"path": "w.mp4", "clip": [0, 1]}],
    ),
    "internvl pre-training": (
        {"conversations": [{"from": "pretrain", "value": "Once"}]}, [{"from": "pretrain", "value": "Once"}], [], [],
    ),
    "llava text row": ({"id": "x", "image": None, "conversations": QA}, QA, [], []),
    "sharegpt": (
        {"id": "x", "conversations": [
            {"from": "system", "value": "S"}, {"from": "user", "value": "Q1"}, {"from": "chatgpt", "value": "A1"},
            {"from": "human", "value": "Q2"}, {"from": "bing", "value": "A2"}]},
        TWO, [], [],
    ),
    "sharegpt of llama-factory": (
        {"conversations": said("<image>Q", "A"), "system": "S", "tools": "[]", "images": ["a.jpg"]},
        said("<image>Q", "A", system="S"), ["a.jpg"], [],
    ),
    "llama-factory messages": (
        {**user("<image><video>Q"), "images": ["a.jpg"], "videos": ["v.mp4"]},
        said("<image><video>Q", "A"), ["a.jpg"], [{"path": "v.mp4"}],
    ),
    "llama-factory video of frames": (
        {**user("<video>Q"), "videos": [["1.jpg", "2.jpg"]]},
        said("<video>Q", "A"), [], [{"path": ["1.jpg", "2.jpg"]}],
    ),
    "alpaca": (
        {"instruction": "Add", "input": "1+1", "output": "2", "system": "", "history": [["Q", "A"]]},
        said("Q", "A", "Add\n1+1", "2"), [], [],
    ),
    "alpaca without input": (
        {"instruction": "Q", "input": "", "output": "A", "images": ["a.jpg"]}, QA, ["a.jpg"], [],
    ),
    "llama-factory pre-training": ({"text": "Once"}, [{"from": "pretrain", "value": "Once"}], [], []),
    "swift messages": (
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "<image>Q"},
                      {"role": "assistant", "content": "A", "loss": True}], "images": [{"path": "a.jpg"}]},
        said("<image>Q", "A", system="S"), ["a.jpg"], [],
    ),
    "swift pairs": (
        {"system": "S", "conversation": [{"human": "Q1", "assistant": "A1"}, {"human": "Q2", "assistant": "A2"}]},
        TWO, [], [],
    ),
    "swift query": (
        {"system": "S", "query": "Q2", "response": "A2", "history": [["Q1", "A1"]]}, TWO, [], [],
    ),
    "swift pre-training": (
        {"messages": [{"role": "assistant", "content": "<image>is a cat"}], "images": ["a.jpg"]},
        [{"from": "pretrain", "value": "<image>is a cat"}], ["a.jpg"], [],
    ),
    "openai text": (
        {"messages": [{"role": "developer", "content": "S"}, {"role": "user", "content": [text("Q1")]},
                      {"role": "assistant", "content": [text("A"), text("1")]}, {"role": "user", "content": "Q2"},
                      {"role": "assistant", "content": "A2", "weight": 1}]},
        TWO, [], [],
    ),
    "openai image url": (user(PICTURE, text("Q")), said("<image>\nQ", "A"), ["http://h/a.png"], []),
    "openai data url": (
        user(text("Q"), {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}}),
        said("Q<image>\n", "A"), ["data:image/png;base64,AA=="], [],
    ),
    "transformers parts": (
        user({"type": "image", "url": "a.png"}, {"type": "image", "path": "b.png"}, text("Q")),
        said("<image>\n<image>\nQ", "A"), ["a.png", "b.png"], [],
    ),
    "trl parts and images": (
        {**user({"type": "image"}, text("Q"), {"type": "image", "text": None}), "images": ["a.png", "b.png"]},
        said("<image>\nQ<image>\n", "A"), ["a.png", "b.png"], [],
    ),
    "qwen parts": (
        user({"type": "image", "image": "file:///d/a.png"}, {"type": "video", "video": "file:///d/v.mp4", "fps": 1.0,
             "max_frames": 8, "video_start": 2, "video_end": 4}, text("Q")),
        said("<image>\n<video>\nQ", "A"), ["/d/a.png"],
        [{"path": "/d/v.mp4", "clip": [2, 4], "fps": 1.0, "max_frames": 8}],
    ),
    "vllm video url": (
        user({"type": "video_url", "video_url": {"url": "http://h/v.mp4"}}, text("Q")),
        said("<video>\nQ", "A"), [], [{"path": "http://h/v.mp4"}],
    ),
    "frames as a video part": (
        user({"type": "video", "video": ["1.png", "2.png"], "nframes": 2}, text("Q")),
        said("<video>\nQ", "A"), [], [{"path": ["1.png", "2.png"], "num_frames": 2}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name: str) -> None:
    row, conversations, image, video = EXAMPLES[name]
    before = json.dumps(row)
    canonical = to_row(row, name)
    assert canonical == {"conversations": conversations, "image": image, "video": video}
    assert json.dumps(row) == before
    assert to_row(json.loads(json.dumps(canonical)), name) == canonical
    record = parse_record(row, name)
    assert (len(record.images), len(record.videos)) == (len(image), len(video))


# --- text that looks like a placeholder ------------------------------------------------------------------------------

LITERAL = "the <image> and <video> tags"


def test_text_parts_stay_text() -> None:
    row = user(text(f"{LITERAL} "), PICTURE, text("<image>"))
    record = parse_record(row)
    assert record.messages[0].parts == (f"{LITERAL} ", ImageSlot(), "\n<image>")
    assert record.messages[0].text == f"{LITERAL} <image>\n<image>"
    assert parse_record(to_row(to_row(row))) == record


def test_parts_are_those_of_the_chat_template() -> None:
    row = user(PICTURE, text(f"One. {LITERAL}"), PICTURE, text("Two."))
    conversation = conversation_from_messages(get_template("internvl2_5"), row["messages"])

    def joined(parts: Any) -> list[Any]:
        output: list[Any] = []
        for part in parts:
            if isinstance(part, str) and output and isinstance(output[-1], str):
                output[-1] += part
            else:
                output.append(part)
        return output

    assert joined(parse_record(row).messages[0].parts) == joined(conversation.messages[0][1])


def test_strings_beside_parts_stay_text() -> None:
    row = {"messages": user(PICTURE, text("Q"))["messages"] + user(LITERAL)["messages"]}
    record = parse_record(row)
    assert record.messages[2].parts == (LITERAL,)
    assert (record.placeholders, record.video_placeholders) == (1, 0)


def test_listed_text_without_media_stays_text() -> None:
    assert parse_record(user(text(LITERAL))).messages[0].parts == (LITERAL,)


def test_listed_text_with_the_rows_own_images_has_placeholders() -> None:
    row = {**user(text("<image>\nQ")), "images": ["a.png"]}
    assert parse_record(row).messages[0].parts == (ImageSlot(), "\nQ")


def test_slots_written_by_hand() -> None:
    turn = {"from": "human", "value": {"text": "<video> <image> <image>", "slots": [8]}}
    record = parse_record({"image": "a.png", "conversations": [turn, {"from": "gpt", "value": "A"}]})
    assert record.messages[0].parts == ("<video> ", ImageSlot(), " <image>")
    turn["value"]["slots"] = [0]
    record = parse_record({"video": "a.mp4", "conversations": [turn, {"from": "gpt", "value": "A"}]})
    assert record.messages[0].parts == (VideoSlot(), " <image> <image>")


def test_answers_may_name_the_tags() -> None:
    record = parse_record(user(PICTURE, text("Q"), answer=LITERAL))
    assert record.messages[1].parts == (LITERAL,)


# --- refusals --------------------------------------------------------------------------------------------------------

HUMAN, GPT = QA


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (7, "must be a json object, got int"),
        ({}, r"keys \(none\); understood are 'conversations'"),
        ({"question": "Q", "answer": "A"}, "unknown format: the row has the keys 'question', 'answer'; understood"),
        ({"conversations": QA, "messages": []}, "conversations and messages; keep one"),
        ({"messages": {}}, "'messages' must be a non-empty list"),
        ({"image": "a", "question": "Q", "chosen": "A", "rejected": "B"}, "'chosen': this is a row for preference"),
        ({**user("Q"), "rejected_response": "B"}, "'rejected_response': this is a row for preference"),
        ({**user("<audio>Q"), "audios": ["a.wav"]}, "audio is not supported"),
        ({**user("Q"), "tools": [{"name": "f"}]}, "tool descriptions are not supported"),
        ({"messages": [{"role": "tool", "content": "1"}]}, "turn 1 is from 'tool'; expected one of human, user, "),
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool calls are not supported"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 must be an object"),
        ({"messages": [{"role": ["user"], "content": "Q"}]}, r"turn 1 is from \['user'\]"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "loss": False}]},
         "turn 2 sets its own loss"),
        ({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "weight": 0}]},
         "turn 2 sets its own loss"),
        ({"messages": [{"role": "user", "content": "Q", "loss": True}]}, "turn 1 sets its own loss"),
        (user({"type": "input_audio"}), "turn 1 has a part of type 'input_audio'; expected text"),
        (user(3, text("Q")), "turn 1 has a part of type 'int'"),
        (user(text("Q"), {"type": "text"}), "turn 1 has a part of type 'text'"),
        ({"messages": [{"role": "system", "content": [PICTURE]}]}, "only human turns may"),
        (user({"type": "image"}, PICTURE, text("Q")), "every image part needs its path"),
        ({**user(PICTURE, text("Q")), "images": ["b.png"]}, "every image part needs its path"),
        ({"image": "a", "images": ["b"], "conversations": QA}, "'image' and 'images'; keep one"),
        ({"images": [["a.png"]], "conversations": QA}, "'images' must be a path"),
        ({"video": 3, "conversations": QA}, "'video' must be a path"),
        ({"video": ["a", "b"], "clip": [0, 1], "conversations": QA * 2}, "'clip' must be"),
        ({"video": ["a", "b"], "clip": [[0, 1]], "conversations": QA}, r"one \[start, end\] per video \(2\)"),
        ({"query": "Q"}, "'query' but no 'response'"),
        ({"instruction": "Q"}, "'instruction' but no 'output'"),
        ({"query": "Q", "response": "A", "history": ["Q"]}, r"'history' must be a list of \[question, answer\]"),
        ({"query": "Q", "response": ["A"]}, "turn 2 must be text"),
        ({"conversation": [{"human": "Q"}]}, "objects with 'human' and 'assistant'"),
        ({"text": 3}, "'text' must be text"),
        ({"system": "S", "conversations": said("Q", "A", system="T")}, "that differ; keep one"),
        ({"system": 3, "conversations": QA}, "'system' must be text"),
        ({"query": "<img>/d/a.png</img>Q", "response": "A"}, "write <image> for <img>path</img>"),
        (user(PICTURE, text("<IMG_CONTEXT>Q")), "put the image and video parts where"),
        ({**user("<image>Find <ref-object>"), "images": ["a"], "objects": {"ref": ["x"]}}, "'<ref-object>': write"),
        ({"conversations": [{"from": "human", "value": {"text": "Q"}}, GPT]}, "'text' and 'slots'"),
        ({"conversations": [{"from": "human", "value": {"text": "<image>", "slots": [1]}}, GPT]}, "offsets of pl"),
        ({"conversations": [{"from": "human", "value": {"text": "<image><image>", "slots": [7, 0]}}]}, "in order"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_refused(row: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message) as caught:
        parse_record(row, "rows.jsonl:3")
    assert str(caught.value).startswith("rows.jsonl:3: ")
