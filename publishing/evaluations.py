"""Reports of `internvl eval` as the Hub's model index and as a table of the model card.

Scores in the reports are shares, shown here as percentages, except sums of points (MME). Incomplete reports are
refused: a figure on the Hub must say what it seems to say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_POINTS = ("points", "sum of the categories")
_HEAD = ["| benchmark | metric | score | standard error | questions |", "|---|---|---:|---:|---:|"]
# The Hub's names of metrics, by those of the evaluator; others keep theirs.
_METRICS = {"exact": "exact_match", "letter": "accuracy", "first_letter": "accuracy", "vqa": "vqa_accuracy"}


def read_report(path: str | Path) -> dict[str, Any]:
    """The content of a `report.json`.

    Raises:
        ValueError: it is none, has no score, or questions of its data were not asked.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        preset, score, missing = content["preset"], content["score"], content["questions"]["missing"]
        texts = [preset["title"], preset["name"], content["metric"], content["unit"]]
        numbers = [content["questions"]["scored"], missing, content.get("error") or 0]
        if not all(isinstance(text, str) for text in texts) or not all(map(_is_number, numbers)):
            raise TypeError(f"its texts are {texts}, its numbers {numbers}")
        if not isinstance(content.get("settings") or {}, dict):
            raise TypeError("settings is no object")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is no report.json of internvl eval ({type(error).__name__}: {error})") from error
    if not _is_number(score) or not math.isfinite(score):
        raise ValueError(f"{path} has no score: no question had a gold answer")
    if missing:
        raise ValueError(f"{path} is incomplete, {missing:,} questions were not asked: finish the evaluation first")
    return content


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def value_of(content: dict[str, Any]) -> float:
    """The headline: percent, or points where the benchmark counts points."""
    score = content["score"]
    return round(float(score if content["unit"] in _POINTS else 100 * score), 4)


def eval_results(contents: Sequence[dict[str, Any]], task: str) -> list[Any]:
    """One `huggingface_hub.EvalResult` for each report."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", content["preset"]["name"]),
            dataset_name=_plain(content["preset"]["title"]),
            metric_type=_plain(_METRICS.get(content["metric"], content["metric"])),
            metric_value=value_of(content),
            metric_name=_plain(f"{content['unit']}{'' if content['unit'] in _POINTS else ' (%)'}"),
        )
        for content in contents
    ]


def table(contents: Sequence[dict[str, Any]]) -> str:
    """Scores with their errors, as Markdown."""
    return "\n".join([*_HEAD, *_rows(contents)])


def update_table(text: str, contents: Sequence[dict[str, Any]]) -> str:
    """A card's text with the scores in the table that `table` wrote into it; as it is where there is none."""
    lines = text.split("\n")
    start = next((at for at in range(len(lines)) if lines[at : at + 2] == _HEAD), None)
    if start is None:
        return text
    first = start + len(_HEAD)
    end = next((at for at in range(first, len(lines)) if not lines[at].startswith("|")), len(lines))
    rows = {_measured(row): row for row in [*lines[first:end], *_rows(contents)]}
    return "\n".join([*lines[:first], *rows.values(), *lines[end:]])


def _measured(row: str) -> tuple[str, ...]:
    """Benchmark and metric of a row."""
    return tuple(cell.strip() for cell in row.split("|")[1:3])


def _rows(contents: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for content in contents:
        error, points = content.get("error"), content["unit"] in _POINTS
        shown = "" if error is None else f"{error if points else 100 * error:.2f}"
        title, metric = _plain(content["preset"]["title"]), _plain(f"{content['metric']}, {content['unit']}")
        scale = "" if points else " %"
        scored = content["questions"]["scored"]
        lines.append(f"| {title} | {metric} | {value_of(content):.2f}{scale} | {shown} | {scored:,} |")
    return lines


def _plain(text: Any) -> str:
    """One line that can be neither Markdown's nor HTML's."""
    return re.sub(r"[|<>`\[\]\s]+", " ", str(text)).strip()
