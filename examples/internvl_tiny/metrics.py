"""Marks for InternVL-tiny's answers: exact match, and overlap for boxes.

Exact match compares whole answers after stripping white space at both ends, upper and lower case kept apart (a word
printed in capitals must be answered in capitals). Boxes are read from any text that holds four numbers in brackets,
with or without the `<box>` tags, which decoding may have removed. Whatever a model writes gets a mark, never an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...evaluation.boxes import box_iou, parse_boxes
from .tasks import Turn

POINTING_HIT = 0.5


@dataclass(frozen=True)
class Row:
    """Mark of one answer; `length` is the number of digits of a `numbers` answer, None for other tasks."""

    task: str
    language: str
    score: float
    length: int | None = None


def score(task: str, prediction: str, turn: Turn) -> float:
    """Mark of `prediction` for `turn`, 0 to 1: IoU for "pointing", else 1.0 for an exact match and 0.0 otherwise.

    Pointing compares the only box of the prediction with `turn.target` (the box before rounding) or, where that is
    missing, with the box in `turn.answer`. No box, several boxes or a box without area score 0.
    """
    if task != "pointing":
        return float(prediction.strip() == turn.answer.strip())
    boxes, wanted = parse_boxes(prediction), [turn.target] if turn.target else parse_boxes(turn.answer)
    return box_iou(boxes[0], wanted[0]) if len(boxes) == 1 and wanted else 0.0


def make_row(turn: Turn, prediction: str) -> Row:
    """Mark one prediction."""
    length = len(turn.answer) if turn.task == "numbers" else None
    return Row(turn.task, turn.language, score(turn.task, prediction, turn), length)


def wilson(hits: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson interval of a share of `hits` in `n` (95 % by default): the shares not rejected by a score test.

    Unlike mean ± z·error it stays inside 0-1 and has width at 0 or n hits. (0, 1) for n = 0.
    """
    if n == 0:
        return 0.0, 1.0
    share, scale = hits / n, 1 + z * z / n
    centre, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def aggregate(rows: Iterable[Row]) -> dict[str, dict[str, float | int | None]]:
    """Table per task, per task and language ("color/en"), per number length ("numbers/4 digits") and over all.

    Every entry holds `n`, `accuracy` (for pointing: IoU of at least 0.5), `low` and `high` of its 95 % Wilson
    interval, and `mean_iou` (None but for pointing).
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        keys = ["all", row.task, f"{row.task}/{row.language}"]
        keys += [] if row.length is None else [f"{row.task}/{row.length} digit{'s' if row.length > 1 else ''}"]
        for key in keys:
            groups.setdefault(key, []).append(row)
    return {key: _entry(key, groups[key]) for key in sorted(groups, key=lambda key: (key != "all", key))}


def _entry(key: str, rows: list[Row]) -> dict[str, float | int | None]:
    hits = sum(row.score >= POINTING_HIT for row in rows)
    low, high = wilson(hits, len(rows))
    mean = sum(row.score for row in rows) / len(rows) if key.startswith("pointing") else None
    return {"n": len(rows), "accuracy": hits / len(rows), "low": low, "high": high, "mean_iou": mean}


def format_table(table: dict[str, dict[str, float | int | None]]) -> str:
    """`aggregate`'s table as Markdown, shares in per cent."""
    lines = ["| task | n | accuracy % | 95 % interval | mean IoU |", "|---|---:|---:|---:|---:|"]
    for key, row in table.items():
        iou = "" if row["mean_iou"] is None else f"{row['mean_iou']:.3f}"
        interval = f"{100 * row['low']:.1f}-{100 * row['high']:.1f}"
        lines.append(f"| {key} | {row['n']} | {100 * row['accuracy']:.1f} | {interval} | {iou} |")
    return "\n".join(lines) + "\n"
