"""Boxes in text and their overlap."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_hub.evaluation.boxes import NO_BOX, box_iou, grounding_box, grounding_hit, parse_boxes, read_boxes

BOXES = st.tuples(*[st.integers(0, 50)] * 4).map(lambda b: (b[0], b[1], b[0] + b[2] + 1, b[1] + b[3] + 1))


@given(BOXES, BOXES)
def test_iou_counts_unit_squares(first, second):
    squares = [{(x, y) for x in range(b[0], b[2]) for y in range(b[1], b[3])} for b in (first, second)]
    assert box_iou(first, second) == len(squares[0] & squares[1]) / len(squares[0] | squares[1])
    assert box_iou(first, second) == box_iou(second, first)


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[[10, 20, 30, 40]]", [(10, 20, 30, 40)]),
        ("<box>[[1,2,3,4],[5,6,7,8]]</box>", [(1, 2, 3, 4), (5, 6, 7, 8)]),
        ("at [0.1, .2, 0.35, 1]", [(0.1, 0.2, 0.35, 1)]), ("[1,2,3]", []), ("[[[[1,2,3,4", []),
        ("[a,b,c,d]", []),
        ("[nan,inf,1e9,4]", []), ("[1234.5,0,2000,900.25]", [(1234.5, 0, 2000, 900.25)]),
        ("[-5,0,1,1]", [(-5, 0, 1, 1)]),
        ("[١,٢,٣,٤]", []), ("[" * 10**5, []), ("[1,2," * 10**4, []),
    ],
    ids=range(12),
)  # fmt: skip
def test_boxes_are_read_from_any_text(text, boxes):
    assert read_boxes(text) == boxes


def test_grounding_rule():
    assert grounding_box("[[500, 250, 1000, 750]]", 200, 100) == (100, 25, 200, 75)
    assert grounding_box("[0.5, 0.25, 1, 0.75]", 200, 100) == (100, 25, 200, 75)
    assert grounding_box("[1, 1, 1, 1]", 1000, 1000) == (1, 1, 1, 1)  # a sum of 4 is of 0-1000
    assert grounding_box("no box", 200, 100) == NO_BOX and not grounding_hit("no box", (0, 0, 9, 9), 10, 10)
    assert grounding_hit("[0, 0, 500, 1000]", (0, 0, 10, 10), 10, 10)  # half: the threshold is inclusive
    assert not grounding_hit("[0, 0, 499, 1000]", (0, 0, 10, 10), 10, 10)
    assert parse_boxes("[0,0,0,5] [0,0,5,5]") == [(0, 0, 5, 5)]
