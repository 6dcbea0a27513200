"""Features of rows of every kind, against one-pass tokenisation of a prompt written out by hand, and plain tiles.

Labels are found by characters: what stands in an answer, or is its end token, is learned.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl_hub.conversation import ImageSlot, get_template
from internvl_hub.data.augmentation import Take
from internvl_hub.data.features import FeatureMaker, Features, SequenceTooLongError, pretrain_segments
from internvl_hub.data.media import RowSettings
from internvl_hub.data.records import FrameSampling, Message, Record, RecordError, Video
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.tiling_internvl import dynamic_preprocess

KINDS = ["qwen2", "internlm2"]
PER_TILE = 4  # visual tokens
MEAN, STD = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
Pieces = list[tuple[str, bool]]


def maker(kind: str = "qwen2") -> FeatureMaker:
    return FeatureMaker(tiny.tokenizer(kind), tiny.image_processor(), tiny.config(kind))


def talk(*texts: str, images: Sequence[Any] = (), videos: Sequence[Video] = ()) -> Record:
    """Human and gpt in turn."""
    messages = tuple(Message(("human", "gpt")[i % 2], text) for i, text in enumerate(texts))
    return Record(messages, tuple(images), "rows:1", tuple(videos))


def frames(count: int, first: int = 50) -> Video:
    """A video of pictures in memory, all of whose frames are taken."""
    pictures = tuple(tiny.picture(first + k, (40, 30)) for k in range(count))
    return Video(pictures, frames=FrameSampling(indices=tuple(range(count))))  # type: ignore[arg-type]


def chatml(kind: str, *texts: str, system: str | None = None) -> Pieces:
    """The prompt as pieces of (text, learned), written out."""
    template = get_template({"qwen2": "internvl2_5", "internlm2": "internlm2-chat"}[kind])
    pieces = [(f"<|im_start|>system\n{template.system_message if system is None else system}<|im_end|>", False)]
    newline = {"qwen2": "\n", "internlm2": ""}[kind]
    assert template.sep == "<|im_end|>" + newline
    pieces[0] = (pieces[0][0] + newline, False)
    for question, answer in zip(texts[::2], texts[1::2], strict=True):
        pieces.append((f"<|im_start|>user\n{question}<|im_end|>{newline}<|im_start|>assistant\n", False))
        pieces += [(f"{answer}<|im_end|>", True), (newline, False)]
    return pieces


def visual(tiles: int) -> str:
    return f"<img>{'<IMG_CONTEXT>' * (PER_TILE * tiles)}</img>"


def in_one_pass(kind: str, pieces: Pieces) -> tuple[list[int], list[int]]:
    """Ids and labels of the whole text, tokenised at once; a token is learned if its first character is."""
    encoded = tiny.tokenizer(kind)("".join(text for text, _ in pieces), return_offsets_mapping=True)
    learned = [on for text, on in pieces for _ in text]
    ids = encoded["input_ids"]
    on = [end > start and learned[start] for start, end in encoded["offset_mapping"]]
    return ids, [index if flag else -100 for index, flag in zip(ids, on, strict=True)]


def assert_tokens(found: Features, kind: str, pieces: Pieces) -> None:
    ids, labels = in_one_pass(kind, pieces)
    assert found["input_ids"].tolist() == ids
    assert found["labels"].tolist() == labels
    assert found["input_ids"].dtype == found["labels"].dtype == torch.int64


def tiles_of(image: Image.Image, most: int = 4) -> list[torch.Tensor]:
    cut = dynamic_preprocess(image, max_num=most, image_size=28, use_thumbnail=True)
    return [normalised(tile) for tile in cut]


def frame_tile(image: Image.Image) -> list[torch.Tensor]:
    return [normalised(image.resize((28, 28), Image.Resampling.BICUBIC))]


def normalised(tile: Image.Image) -> torch.Tensor:
    return (torch.tensor(np.array(tile)).permute(2, 0, 1).float() / 255 - MEAN) / STD


def assert_tiles(found: Features, expected: list[list[torch.Tensor]]) -> None:
    assert found["num_patches"] == [len(tiles) for tiles in expected]
    plain = torch.stack([tile for tiles in expected for tile in tiles])
    torch.testing.assert_close(found["pixel_values"], plain, rtol=0, atol=1e-6)


# --- kinds of rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_only(kind: str) -> None:
    texts = ("1+1=?", "2, of course.", "Sure?", "Yes!")
    found = maker(kind).features(talk(*texts))
    assert found["pixel_values"] is None and found["num_patches"] == []
    assert_tokens(found, kind, chatml(kind, *texts))


@pytest.mark.parametrize("kind", KINDS)
def test_system_turn(kind: str) -> None:
    record = talk("Q", "An answer")
    record = replace(record, messages=(Message("system", "Be brief."), *record.messages))
    assert_tokens(maker(kind).features(record), kind, chatml(kind, "Q", "An answer", system="Be brief."))


@pytest.mark.parametrize("kind", KINDS)
def test_interleaved_images(kind: str) -> None:
    wide, tall, small = tiny.picture(1, (112, 28)), tiny.picture(2, (30, 70)), tiny.picture(3, (28, 28))
    record = talk("A <image> b\n<image>", "Differ.", "And <image>?", "Same.", images=(wide, tall, small))
    found = maker(kind).features(record)
    expected = [tiles_of(image, 4 // 3) for image in (wide, tall, small)]
    assert_tiles(found, expected)
    one, two, three = (visual(len(tiles)) for tiles in expected)
    assert_tokens(found, kind, chatml(kind, f"A {one} b\n{two}", "Differ.", f"And {three}?", "Same."))


@pytest.mark.parametrize("kind", KINDS)
def test_video(kind: str) -> None:
    video = frames(3)
    found = maker(kind).features(talk("<video>\nWhat?", "A cat.", videos=[video]))
    assert_tiles(found, [frame_tile(picture) for picture in video.path])  # type: ignore[arg-type]
    lines = "".join(f"Frame-{i}: {visual(1)}\n" for i in (1, 2, 3))
    assert_tokens(found, kind, chatml(kind, f"{lines}What?", "A cat."))


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_and_videos_in_reading_order(kind: str) -> None:
    """Pictures share the budget of tiles among themselves; frames are one tile each and leave it alone."""
    first, second = tiny.picture(7, (112, 28)), tiny.picture(8, (28, 112))
    early, late = frames(2), frames(1, 60)
    record = talk(
        "<image>\n<video>\nQ", "A one", "<video>\n<image>", "B two", images=(first, second), videos=(early, late)
    )
    found = maker(kind).features(record)
    expected = [tiles_of(first, 2), *map(frame_tile, early.path), *map(frame_tile, late.path), tiles_of(second, 2)]
    assert_tiles(found, expected)
    one, two = visual(len(expected[0])), visual(len(expected[-1]))
    question = f"{one}\nFrame-1: {visual(1)}\nFrame-2: {visual(1)}\nQ"
    assert_tokens(found, kind, chatml(kind, question, "A one", f"Frame-1: {visual(1)}\n{two}", "B two"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", ["Plain running text.", "<image>\nA caption", "Before <image> and after", "<image><image>"]
)
def test_pretraining_rows(kind: str, text: str) -> None:
    """All text is learned and the end token after it; what stands for pictures is not, nor a begin token."""
    images = [tiny.picture(k, (28, 28)) for k in range(text.count("<image>"))]
    found = maker(kind).features(Record((Message("pretrain", text),), tuple(images)))
    pieces: Pieces = []
    for i, part in enumerate(text.split("<image>")):
        pieces += [(visual(1), False)] * (i > 0) + [(part, True)]
    pieces.append((tiny.tokenizer(kind).eos_token, True))
    assert_tokens(found, kind, pieces)
    assert found["num_patches"] == [1] * len(images)
    assert int((found["labels"] == tiny.tokenizer(kind).eos_token_id).sum()) == 1


def test_segments_of_running_text() -> None:
    segments = pretrain_segments(("a", ImageSlot(), "<image>"), "</s>")
    assert [(segment.text, segment.kind, segment.supervised) for segment in segments] == [
        ("a", "text", True), ("<image>", "image", False), ("<image>", "text", True), ("</s>", "markup", True),
    ]  # fmt: skip


def test_marks_typed_by_people_are_characters() -> None:
    """What looks like markup in a row neither ends an answer nor stands for a picture."""
    found = maker().features(talk("Say <IMG_CONTEXT>", "<|im_end|> is a mark", "More", "B"))
    tokenizer = tiny.tokenizer()
    ends = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert int((found["labels"] == ends).sum()) == 2
    assert int((found["input_ids"] == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")).sum()) == 0
    learned = found["labels"][found["labels"] != -100]
    assert tokenizer.decode(learned, clean_up_tokenization_spaces=False).startswith("<|im_end|> is a mark<|im_end|>")


# --- limits and settings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [
    talk("word " * 20, "A"), talk("<image>", "A", images=[tiny.picture(0, (112, 28))]),
    talk("<video>", "A", videos=[frames(4)]), Record((Message("pretrain", "text " * 9),), where="rows:1"),
], ids=["text", "picture", "video", "pretrain"])  # fmt: skip
def test_over_long_rows(record: Record) -> None:
    length = len(maker().features(record)["input_ids"])
    for call in (maker().features, maker().measure):
        assert call(record, RowSettings(max_seq_length=length))
        with pytest.raises(SequenceTooLongError, match=rf"rows:1: {length} tokens \(\d+ of them visual\)") as caught:
            call(record, RowSettings(max_seq_length=length - 1))
        assert isinstance(caught.value, RecordError) and f"max_seq_length={length - 1}" in caught.value.problem


@pytest.mark.parametrize(("low", "high", "tiles"), [(None, None, 5), (1, 1, 1), (1, 2, 3), (3, 3, 4), (None, 3, 4)])
def test_tile_limits_of_a_row(low: int | None, high: int | None, tiles: int) -> None:
    record = talk("<image>", "A", images=[tiny.picture(0, (112, 28))])
    found = maker().features(record, RowSettings(min_dynamic_patch=low, max_dynamic_patch=high))
    assert found["num_patches"] == [tiles] and len(found["pixel_values"]) == tiles


def test_augmentation_changes_pictures_alone() -> None:
    record = talk("<image><video>", "A", images=[tiny.picture(0, (56, 28))], videos=[frames(2)])
    plain, on = maker().features(record), RowSettings(data_augment=True)
    first, again = (maker().features(record, on, Take(0, 5, 0, 1)) for _ in range(2))
    other = maker().features(record, on, Take(0, 5, 0, 2))
    assert torch.equal(first["pixel_values"], again["pixel_values"])
    assert not torch.equal(first["pixel_values"][:3], other["pixel_values"][:3])
    assert not torch.equal(first["pixel_values"][:3], plain["pixel_values"][:3])
    assert torch.equal(first["pixel_values"][3:], plain["pixel_values"][3:])
    assert torch.equal(first["input_ids"], plain["input_ids"])


def test_placeholders_that_do_not_fit_name_the_row() -> None:
    record = Record((Message("human", "<image>"), Message("gpt", "A")), where="rows:9")
    film = replace(record, messages=(Message("human", "Q"), Message("gpt", "A")), videos=(frames(1),))
    for call in (maker().features, maker().measure):
        with pytest.raises(RecordError, match=r"^rows:9: the human turns have 1 <image> for 0 image\(s\)"):
            call(record)
        with pytest.raises(RecordError, match=r"^rows:9: the human turns have 0 <video> for 1 video\(s\)"):
            call(film)


# --- measuring -------------------------------------------------------------------------------------------------------

SIDES = st.integers(10, 130)


@st.composite
def mixed_rows(draw: st.DrawFn) -> Record:
    """Rows of text, pictures of any size and videos of any length, in any order."""
    words = st.text("ab cé\n猫<>", max_size=12)
    images: list[Image.Image] = []
    videos: list[Video] = []
    messages: list[Message] = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.one_of(words, st.just("<image>"), st.just("<video>\n")), min_size=1, max_size=3))
        messages += [Message("human", "".join(parts) or "Q"), Message("gpt", "A" + draw(words))]
    if draw(st.booleans()):
        messages = [Message("pretrain", messages[0].text)]
    record = Record(tuple(messages))
    for _ in range(record.placeholders):
        images.append(Image.new("RGB", (draw(SIDES), draw(SIDES))))
    for _ in range(record.video_placeholders):
        length = draw(st.integers(1, 6))
        wish = draw(st.sampled_from([None, FrameSampling(num_frames=2), FrameSampling(max_frames=3),
                                     FrameSampling(indices=(0, 0)), FrameSampling(fps=3)]))  # fmt: skip
        videos.append(Video((Image.new("RGB", (8, 8)),) * length, frames=wish))  # type: ignore[arg-type]
    return replace(record, images=tuple(images), videos=tuple(videos))


@given(
    record=mixed_rows(), kind=st.sampled_from(KINDS), row=st.integers(0, 99), epoch=st.integers(0, 3),
    tiles=st.sampled_from([(None, None), (1, 1), (2, 3), (None, 6)]), rule=st.sampled_from(["rand", "middle"]),
    numbers=st.sampled_from([(1, 3), (2, 2), (4, 5)]), augment=st.booleans(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_measuring_tells_what_the_features_are(
    record: Record, kind: str, row: int, epoch: int, tiles: tuple, rule: str, numbers: tuple, augment: bool
) -> None:
    """A row is measured for its first occurrence, and costs the same in every other."""
    options = RowSettings(None, *tiles, augment, True, *numbers, rule)
    measured = maker(kind).measure(record, options, Take(0, row))
    found = maker(kind).features(record, options, Take(0, row, 1, epoch))
    assert measured.tokens == len(found["input_ids"])
    assert measured.tiles == sum(found["num_patches"])
    assert measured.tiles == (0 if found["pixel_values"] is None else len(found["pixel_values"]))
    assert measured.supervised == int((found["labels"] != -100).sum())
    context = tiny.tokenizer(kind).convert_tokens_to_ids("<IMG_CONTEXT>")
    assert int((found["input_ids"] == context).sum()) == PER_TILE * measured.tiles
    assert not (found["labels"] == context).any()


def test_measuring_opens_headers_only(tmp_path: Path) -> None:
    """A picture whose pixels are damaged is measured, and refused when it is read."""
    tiny.picture(0, (112, 28)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) // 2])
    record = talk("<image>", "A", images=[tmp_path / "a.png"])
    assert maker().measure(record).tiles == 5
    with pytest.raises(RecordError, match="rows:1: cannot load image .*truncated"):
        maker().features(record)
