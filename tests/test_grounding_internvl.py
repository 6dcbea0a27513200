"""Boxes in answers, to pixels and into pictures."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont
from tiny import CHAT, QWEN2, load
from transformers import PreTrainedTokenizerFast

from internvl_hub.grounding_internvl import GROUNDING_PROMPT, Grounding, box_text, draw_boxes, parse_grounding
from internvl_hub.tiling_internvl import ImageLoadError

HALF = (50.0, 50.0, 100.0, 200.0)  # [[250, 125, 500, 500]] of 200 x 400 pixels


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("<ref>a cat</ref><box>[[250, 125, 500, 500]]</box>", [("a cat", HALF)]),
        ("<box>[250,125,500,500]</box>", [("", HALF)]),
        ("It is at [0.25, 0.125, .5, 0.5].", [("", HALF)]),
        ("<ref>a</ref><box>[[250,125,500,500],[0,0,1000,1000]]</box> and <ref>b</ref><box>[[0,0,1000,1000]]</box>",
         [("a", HALF), ("a", (0, 0, 200, 400)), ("b", (0, 0, 200, 400))]),
        ("<ref>猫</ref><box>[[500.0, 500.0, 250.0, 125.0]]</box>", [("猫", HALF)]),  # corners exchanged
        ("<ref>a<box>[[250,125,500,500]]</box>", [("a", HALF)]),  # an unclosed label
        ("<ref>a</ref>[[250,125,500,500", []),
        ("<quad>[[250,125,500,125,500,500,250,500]]</quad>", [("", HALF)]),
        ("<ref>a</ref><quad>[[[250,125],[500,125],[500,500],[250,500]]]</quad>", [("a", HALF)]),
        ("<box>[[250, 125, 5000, 500]]</box>", [("", (50, 50, 200, 200))]),  # cut at the border
        ("<box>[[-100, 125, 500, 500]]</box>", [("", (0, 50, 100, 200))]),
        ("[0, 0, 1, 1]", [("", (0, 0, 200, 400))]),
        ("[0.25, 0.125, 1.02, 0.5]", [("", (50, 50, 200, 200))]),  # a fraction that overshoots
        ("<ref>a</ref><ref>b</ref><box>[[250,125,500,500]]</box>", [("b", HALF)]),
        ("<ref> two\n words <box></ref><box>[[250,125,500,500]]</box>", [("two words", HALF)]),
        ("no box", []), ("", []), ("[1,2,3]", []), ("[nan,0,1,1]", []),
        ("[" * 50_000, []), ("<ref>" * 20_000, []), ("[1,2," * 10_000, []), ("[" + "[1,2]," * 10_000, []),
    ],
    ids=range(23),
)  # fmt: skip
def test_boxes_are_read_in_pixels(text: str, boxes: list) -> None:
    found = parse_grounding(text, 200, 400)
    assert found.boxes == [(label, tuple(map(pytest.approx, box))) for label, box in boxes]
    assert found.text == text and (found.dropped == 0 or len(text) > 1000)


def test_boxes_without_area_are_dropped_and_counted() -> None:
    text = "[[5,5,5,9]] [[0,0,0,0]] [[1200,0,1500,900]] [[0,0,10,10]]"
    found = parse_grounding(text, 100, 100)
    assert found.boxes == [("", (0, 0, 1, 1))] and found.dropped == 3


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from(["<ref>", "</ref>", "<box>", "</box>", "<quad>", "[", "]", ",", "12", "0.5", "x", " "]))
)
def test_boxes_always_lie_in_the_image(parts: list[str]) -> None:
    for _, (x1, y1, x2, y2) in parse_grounding("".join(parts), 30, 20).boxes:
        assert 0 <= x1 < x2 <= 30 and 0 <= y1 < y2 <= 20


def test_boxes_are_drawn_where_they_are() -> None:
    image = Image.new("RGB", (100, 80), "white")
    drawn = draw_boxes(image, Grounding([("", (20.0, 30.0, 60.0, 70.0))], ""))
    changed = np.argwhere((np.asarray(drawn) != 255).any(-1))
    assert np.asarray(image).min() == 255, "the image itself stays"
    assert changed.min(0).tolist() == [30, 20] and changed.max(0).tolist() == [69, 59]
    assert np.asarray(drawn)[50, 40].tolist() == [255] * 3


@pytest.mark.parametrize(("size", "line"), [((100, 80), 2), ((1500, 400), 10), ((400, 3000), 20)], ids=str)
def test_lines_grow_with_the_longer_side(size: tuple[int, int], line: int) -> None:
    width, height = size
    box = (0.25 * width, 0.25 * height, 0.75 * width, 0.75 * height)
    drawn = np.asarray(draw_boxes(Image.new("RGB", size, "white"), Grounding([("", box)], ""))) != 255
    across, down = drawn[height // 2].any(-1), drawn[:, width // 2].any(-1)
    assert [across[: width // 2].sum(), across[width // 2 :].sum()] == [line] * 2
    assert [down[: height // 2].sum(), down[height // 2 :].sum()] == [line] * 2


@pytest.mark.parametrize("label", ["cat", "橙色的三角形", "x" * 500, "a\nb\x00", "🦁"])
@pytest.mark.parametrize("size", [(5, 4), (64, 48), (300, 20)], ids=str)
def test_labels_of_every_kind_are_drawn_in_every_size(label: str, size: tuple[int, int]) -> None:
    image = Image.new("L", size, 255)
    boxes = [
        (label, (0.0, 0.0, size[0] * 1.0, size[1] * 1.0)),
        (label, (0.0, 0.0, 0.5, 0.5)),
        ("b", (1.0, 1.0, 3.0, 3.0)),
    ]
    drawn = draw_boxes(image, Grounding(boxes, ""))
    assert drawn.size == size and drawn.mode == "RGB" and np.asarray(drawn).min() < 255
    assert draw_boxes(image, Grounding(boxes, ""), ImageFont.load_default(12)).size == size


def test_ground_asks_with_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(QWEN2), PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN2)
    asked = []

    def chat(tokenizer, pixel_values, question, options, **extra) -> str:
        asked.append((question, pixel_values.shape[1:], extra["keep_markup"]))
        return "<ref>a dog</ref><box>[[0, 500, 500, 1000]]</box>"

    monkeypatch.setattr(model, "chat", chat)
    image = Image.new("RGB", (90, 60))
    found = model.ground(tokenizer, image, "a dog")
    assert found.boxes == [("a dog", (0, 30, 45, 60))]
    model.ground(tokenizer, image, "Where is <ref>it</ref>?")
    assert asked == [
        (GROUNDING_PROMPT.format("a dog"), (3, 56, 56), True),
        ("Where is <ref>it</ref>?", (3, 56, 56), True),
    ]
    with pytest.raises(ImageLoadError):
        model.ground(tokenizer, "missing.png", "a dog")


# ------------------------------------------------------------------------------------------------------------- writing


def test_boxes_are_written_as_models_write_them() -> None:
    assert box_text([HALF], 200, 400, "a cat") == "<ref>a cat</ref><box>[[250, 125, 500, 500]]</box>"
    assert box_text([HALF[2:] + HALF[:2], (0, 0, 200, 400)], 200, 400) == (
        "<box>[[250, 125, 500, 500], [0, 0, 1000, 1000]]</box>"
    )


@given(
    size=st.tuples(st.integers(1, 4000), st.integers(1, 4000)),
    shares=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
@settings(max_examples=200, deadline=None)
def test_written_boxes_are_read_back(size: tuple[int, int], shares: list[float]) -> None:
    """To half a thousandth; a box that is thinner than that has no area."""
    box = [share * size[i % 2] for i, share in enumerate(shares)]
    wanted = (min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3]))
    found = parse_grounding(box_text([box], *size, "x"), *size).boxes
    if all(wanted[i + 2] - wanted[i] > size[i] / 500 and wanted[i + 2] > size[i] / 300 for i in range(2)):
        ((label, read),) = found
        assert label == "x"
        assert all(abs(a - b) <= size[i % 2] / 1999 for i, (a, b) in enumerate(zip(read, wanted, strict=True)))


@pytest.mark.parametrize(
    ("boxes", "size"),
    [([], (10, 10)), ([(1, 2, 3)], (10, 10)), ([(1, 2, 11, 4)], (10, 10)), ([(-1, 2, 3, 4)], (10, 10)),
     ([(1, 2, float("nan"), 4)], (10, 10)), ([(0, 0, 0, 0)], (0, 10))],
    ids=range(6),
)  # fmt: skip
def test_boxes_that_cannot_be_written(boxes: list, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"box|width"):
        box_text(boxes, *size)
