"""What an evaluation found, as json for programs and as a page for people.

Failures and answers that could not be read count as wrong and are listed; questions without a gold answer and
questions not asked yet are counted apart.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .aggregates import mean
from .engines import Answer
from .questions import Question
from .scoring import Mark
from .totals import TOTALS
from .verifiers import THRESHOLD
from .voting import pass_at_k

FAILED = "failed"
_PACKAGES = ("internvl-hub", "torch", "transformers", "pillow", "rapidfuzz", "math-verify")
_LISTED, _CELL = 10, 160


@dataclass(frozen=True)
class Row:
    """A question with its answers and marks.

    Attributes:
        question: What was asked.
        mark: What counts; None without a gold answer.
        answers: As the engine gave them.
        marks: Of each answer.
        failure: Why there is no answer.
        votes: For the answer that counts, of several.
    """

    question: Question
    mark: Mark | None
    answers: tuple[Answer, ...]
    marks: tuple[Mark, ...]
    failure: str | None = None
    votes: int | None = None


@dataclass(frozen=True)
class Report:
    """The report on an evaluation; `content` is what `report.json` holds, `rows` what `marks.jsonl` holds."""

    content: dict[str, Any]
    rows: tuple[Row, ...]

    def write(self, folder: str | Path) -> None:
        """Writes `report.json`, `report.md` and `marks.jsonl`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.json").write_text(_dumps(self.content, indent=2) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(render(self.content), encoding="utf-8")
        with (folder / "marks.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(_dumps(_row_content(row)) + "\n" for row in self.rows)


def build_report(
    rows: Sequence[Row], settings: dict[str, Any], metric: str, totals: str, missing: int, more: dict[str, Any]
) -> Report:
    """The report on marked rows.

    Args:
        rows: In the order of the questions.
        settings: Of the answer store.
        metric: That the rows were marked with.
        totals: How marks become the score, of `totals.TOTALS`.
        missing: Questions not asked yet.
        more: Goes into the report.
    """
    scored = [(row.question, row.mark) for row in rows if row.mark is not None and row.question.answers]
    figures = TOTALS[totals](scored)
    content = {
        "preset": settings["preset"],
        "metric": metric,
        "score": figures.score,
        "error": figures.error,
        "unit": figures.unit,
        "categories": figures.categories,
        "more": figures.more,
        "questions": {"scored": len(scored), "without_gold": len(rows) - len(scored), "missing": missing},
        "samples": _samples(rows, settings["sampling"]["n"]),
        "cut": sum(not answer.complete for row in rows for answer in row.answers),
        "failures": [{**_place(row), "reason": row.failure} for row in rows if row.failure is not None],
        "unreadable": [
            {**_place(row), "problem": row.mark.problem, "answer": row.answers[0].text}
            for row in rows
            if row.mark is not None and row.mark.problem is not None and row.failure is None
        ],
        "model": settings["model"],
        "settings": {key: value for key, value in settings.items() if key not in ("preset", "model")},
        "versions": _versions(),
        **more,
    }
    return Report(content, tuple(rows))


def _samples(rows: Sequence[Row], count: int) -> dict[str, Any] | None:
    """What several answers of each question tell; None for one. Failures count as answers that are all wrong."""
    kept = [row for row in rows if row.mark is not None and row.question.answers]
    if count == 1 or not kept:
        return None
    means = [sum(mark.score for mark in row.marks) / count for row in kept]
    right = [sum(mark.score > THRESHOLD for mark in row.marks) for row in kept]
    sizes = sorted({2**i for i in range(count.bit_length()) if 2**i <= count} | {count})
    return {
        "count": count,
        "mean": mean(means).value,
        "mean_error": mean(means).error,
        "pass_at": {str(k): mean([pass_at_k(each, count, k) for each in right]).value for k in sizes},
        "agreement": mean([(row.votes or 0) / count for row in kept]).value,
    }


def _place(row: Row) -> dict[str, str]:
    return {"key": row.question.key, "where": row.question.where}


def _row_content(row: Row) -> dict[str, Any]:
    question, mark = row.question, row.mark
    return {
        "key": question.key,
        "question": question.text,
        "gold": list(question.answers),
        "category": question.category,
        "score": None if mark is None else mark.score,
        "read_as": None if mark is None else mark.label,
        "problem": None if mark is None else mark.problem,
        "answers": [answer.text for answer in row.answers],
        "scores": [each.score for each in row.marks],
        "failure": row.failure,
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _dumps(value: Any, **options: Any) -> str:
    """Json in which a missing figure is null, and a lone surrogate, which is no UTF-8, is escaped."""
    value = _without_nan(value)
    text = json.dumps(value, ensure_ascii=False, **options)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **options)
    return text


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- for people ------------------------------------------------------------------------------------------------------


def render(content: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = [
        f"# {content['preset']['title']}: {content['model']}\n",
        f"**{_headline(content)}**\n",
        _counts(content),
        _category_table(content["categories"]),
        _table(("", "value"), [(name, _figure(value)) for name, value in content["more"].items()]),
        _sample_lines(content["samples"]),
        _settings_table(content),
        _listing("Failures", content["failures"], "reason"),
        _listing("Answers that could not be read", content["unreadable"], "problem", "answer"),
    ]
    return "\n".join(part for part in parts if part)


def _headline(content: dict[str, Any]) -> str:
    if content["score"] is None or not math.isfinite(content["score"]):
        return "no score: no question has a gold answer"
    scale, sign = (1, "") if content["unit"] == "points" else (100, " %")
    error = "" if content["error"] is None else f" ± {scale * content['error']:.2f}"
    line = f"{scale * content['score']:.2f}{error}{sign} ({content['unit']}, {content['metric']})"
    return f"INCOMPLETE: {line}" if content["questions"]["missing"] else line


def _counts(content: dict[str, Any]) -> str:
    counts = content["questions"]
    line = f"{counts['scored']:,} questions scored"
    for number, words in (
        (len(content["failures"]), "failed and count as wrong"),
        (len(content["unreadable"]), "could not be read and count as wrong"),
        (content["cut"], "answers were cut at the limit"),
        (counts["without_gold"], "without a gold answer"),
        (counts["missing"], "not asked yet"),
    ):
        line += f"; {number:,} {words}" if number else ""
    return line + ".\n"


def _category_table(categories: dict[str, dict[str, Any]]) -> str:
    if not categories:
        return ""
    columns = list(next(iter(categories.values())))
    rows = [(name, *(_figure(each[column]) for column in columns)) for name, each in categories.items()]
    return _table(("category", *columns), rows)


def _sample_lines(samples: dict[str, Any] | None) -> str:
    if samples is None:
        return ""
    rows = [("mean of single answers", _figure(samples["mean"]))]
    rows += [(f"right among {k} (pass@{k})", _figure(value)) for k, value in samples["pass_at"].items()]
    rows += [("votes for the majority", _figure(samples["agreement"]))]
    return f"The score is that of the majority of {samples['count']} answers.\n\n" + _table(("", "share"), rows)


def _settings_table(content: dict[str, Any]) -> str:
    preset, settings = content["preset"], dict(content["settings"])
    sampling = settings.pop("sampling")
    rows: list[tuple[str, Any]] = [
        ("preset", preset["name"]),
        ("prompt", preset["prompt"].replace("\n", "\\n")),
        ("reasoning", preset["style"]),
        ("system text", "the model's, or the row's" if preset["system"] is None else preset["system"]),
        ("tiles", "the checkpoint's" if preset["max_tiles"] is None else preset["max_tiles"]),
        ("sampling", ", ".join(f"{key}={value}" for key, value in sampling.items())),
        *((key, value) for key, value in settings.items() if key != "requests_digest"),
        ("versions", ", ".join(f"{name} {number}" for name, number in content["versions"].items())),
    ]
    if content.get("seconds") is not None:
        rows.append(("time", f"{content['seconds']:.1f} s, of this call"))
    note = f"Note: {preset['note']}.\n\n" if preset["note"] else ""
    return note + _table(("setting", "value"), [(key, _escaped(value)) for key, value in rows])


def _listing(title: str, entries: Sequence[dict[str, Any]], *names: str) -> str:
    if not entries:
        return ""
    rows = [(entry["where"], *(_cell(entry[name]) for name in names)) for entry in entries[:_LISTED]]
    left = f"\n{len(entries) - _LISTED:,} more are in report.json.\n" if len(entries) > _LISTED else ""
    return f"## {title}\n\n" + _table(("where", *names), rows) + left


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def _figure(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else f"{value:,}"


def _escaped(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def _cell(value: Any) -> str:
    text = _escaped(value)
    return text if len(text) <= _CELL else f"{text[: _CELL - 1]}…"
