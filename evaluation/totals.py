"""From marks to the figures of a benchmark: one headline score with its error, and figures by category."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .aggregates import Mean, all_right, mean, mean_by, mean_of_means, mme_tasks, pope
from .choices import read_yes_no
from .questions import Question
from .scoring import Mark

Scored = Sequence[tuple[Question, Mark]]


@dataclass(frozen=True)
class Totals:
    """The figures of a benchmark.

    Attributes:
        score: The headline; NaN where nothing was scored.
        error: Its standard error; None where there is no simple one (F1, MME).
        unit: What the score is, for people.
        categories: Figures by category, in order of appearance.
        more: Other figures by name.
    """

    score: float
    error: float | None
    unit: str
    categories: dict[str, dict[str, Any]] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)


def check_fields(questions: Sequence[Question], totals: str) -> None:
    """Raises ValueError, naming the line, unless all questions have what a total needs."""
    needed = {"pope": "category", "mme": "category", "mean_of_categories": "", "groups": "group"}.get(totals, "")
    for question in questions:
        value = question.category if needed == "category" else question.fields.get("group")
        if needed and value is None:
            raise ValueError(f"{question.where}: the row has no {needed!r}, which this preset needs")
        if totals in ("pope", "mme") and question.answers and read_yes_no(question.answers[0]) is None:
            raise ValueError(f"{question.where}: the answer must be yes or no, got {question.answers[0]!r:.40}")


def _mean(rows: Scored) -> Totals:
    total = mean([mark.score for _, mark in rows])
    return Totals(total.value, total.error, "mean score", _categories(rows))


def _means(rows: Scored) -> dict[Any, Mean]:
    return mean_by([mark.score for _, mark in rows], [question.category or "(none)" for question, _ in rows])


def _categories(rows: Scored) -> dict[str, dict[str, Any]]:
    """By category; nothing where no row has one."""
    if all(question.category is None for question, _ in rows):
        return {}
    return {name: asdict(each) for name, each in _means(rows).items()}


def _combined_error(means: Sequence[Mean], weight: float) -> float | None:
    """Of a weighted sum of independent means."""
    errors = [each.error for each in means]
    return None if None in errors else weight * math.sqrt(math.fsum(error**2 for error in errors))  # type: ignore


def _mean_of_categories(rows: Scored) -> Totals:
    means = _means(rows)
    error = _combined_error(list(means.values()), 1 / len(means)) if means else None
    return Totals(mean_of_means(means), error, "mean of the categories", _categories(rows), {"all": _mean(rows).score})


def _sum_of_categories(rows: Scored) -> Totals:
    means = _means(rows)
    total = math.fsum(each.value for each in means.values()) if means else math.nan
    return Totals(total, _combined_error(list(means.values()), 1.0), "sum of the categories", _categories(rows))


def _groups(rows: Scored) -> Totals:
    total = all_right([mark.score >= 1 for _, mark in rows], [str(q.fields["group"]) for q, _ in rows])
    return Totals(total.value, total.error, "groups answered all right", _categories(rows), {"all": _mean(rows).score})


def _pope(rows: Scored) -> Totals:
    gold = [read_yes_no(question.answers[0]) or "" for question, _ in rows]
    table, score = pope([mark.label for _, mark in rows], gold, [question.category or "" for question, _ in rows])
    return Totals(score, None, "mean F1", {name: each.report() for name, each in table.items()})


def _mme(rows: Scored) -> Totals:
    images = ["".join(map(str, question.images)) or question.key for question, _ in rows]
    tasks = [question.category or "" for question, _ in rows]
    table, sums = mme_tasks(tasks, images, [mark.score >= 1 for _, mark in rows])
    points = math.fsum(each.points for each in table.values()) if table else math.nan
    return Totals(points, None, "points", {name: asdict(each) for name, each in table.items()}, sums)


TOTALS: dict[str, Callable[[Scored], Totals]] = {
    "mean": _mean,
    "mean_of_categories": _mean_of_categories,
    "sum_of_categories": _sum_of_categories,
    "groups": _groups,
    "pope": _pope,
    "mme": _mme,
}
