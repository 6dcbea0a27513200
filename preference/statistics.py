"""What came of the questions of each data set: counts, shares and lengths, as json and as a table.

Nothing is judged here; `pipelines` counts while it pairs.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

_COLUMNS = ("data set", "questions", "answered", "failed", "correct", "all", "none", "format", "pairs", "per question")


@dataclass
class PairStatistics:
    """Of one data set.

    Attributes:
        questions: That the file has.
        skipped: Those that were not asked, by reason.
        answered, failed: Those that were asked.
        failures: Reasons of failures, the first 20 that differ, each with its number.
        tasks: Questions that were judged, by how.
        samples: Answers.
        kinds: Answers by kind: correct, incorrect, format, unusable.
        format_failures: Answers that break their format, by problem.
        left_out: Answers and pairs that were left out, by reason.
        all_correct, none_correct: Questions of whose answers all, or none, are correct: these teach nothing.
        paired: Questions with at least one pair.
        pairs: By kind.
        lengths: Characters of the chosen and rejected answers of all pairs.
    """

    questions: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    failed: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    samples: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    format_failures: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    all_correct: int = 0
    none_correct: int = 0
    paired: int = 0
    pairs: Counter[str] = field(default_factory=Counter)
    lengths: dict[str, array] = field(default_factory=lambda: {"chosen": array("Q"), "rejected": array("Q")})

    def add_failure(self, reason: str) -> None:
        """Counts a question that got no answer."""
        self.failed += 1
        reason = " ".join(reason.split())[:200]
        if reason in self.failures or len(self.failures) < 20:
            self.failures[reason] += 1

    def add_pair(self, kind: str, chosen: str, rejected: str) -> None:
        """Counts a pair."""
        self.pairs[kind] += 1
        self.lengths["chosen"].append(len(chosen))
        self.lengths["rejected"].append(len(rejected))

    def __add__(self, other: PairStatistics) -> PairStatistics:
        total = {name: value + getattr(other, name) for name, value in vars(self).items() if name != "lengths"}
        lengths = {side: values + other.lengths[side] for side, values in self.lengths.items()}
        return PairStatistics(**total, lengths=lengths)

    def to_dict(self) -> dict[str, Any]:
        """Everything as json values, with shares; a share of nothing is None."""
        numbers = {
            name: dict(value.most_common()) if isinstance(value, Counter) else value
            for name, value in vars(self).items()
            if name != "lengths"
        }
        return numbers | {
            "correct_share": _share(self.kinds["correct"], self.samples),
            "format_failure_share": _share(self.kinds["format"], self.samples),
            "pairs_per_question": _share(self.pairs.total(), self.answered),
            "lengths": {side: _spread(values) for side, values in self.lengths.items()},
        }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _spread(values: Sequence[int]) -> dict[str, float] | None:
    if not values:
        return None
    return {"mean": fmean(values), "median": median(values), "min": min(values), "max": max(values)}


def render_statistics(statistics: Mapping[str, PairStatistics]) -> str:
    """A table with a row for each data set, and below it what each one's pairs, format failures and losses are."""
    total = {"all": sum(statistics.values(), PairStatistics())} if len(statistics) > 1 else {}
    rows = [_COLUMNS, *(_row(name, one) for name, one in {**statistics, **total}.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*lines, *(line for name, one in statistics.items() for line in _details(name, one))])


def _row(name: str, one: PairStatistics) -> tuple[str, ...]:
    judged = bool(one.kinds)
    return (
        name,
        *(f"{number:,}" for number in (one.questions, one.answered, one.failed)),
        _percent(one.kinds["correct"], one.samples) if judged else "",
        *(_percent(number, one.answered) if judged else "" for number in (one.all_correct, one.none_correct)),
        _percent(one.kinds["format"], one.samples) if judged else "",
        f"{one.pairs.total():,}",
        f"{one.pairs.total() / one.answered:.2f}" if one.answered else "",
    )


def _details(name: str, one: PairStatistics) -> list[str]:
    lists = {
        "pairs": one.pairs,
        "judged as": one.tasks,
        "not asked": one.skipped,
        "failed": one.failures,
        "format failures": one.format_failures,
        "left out": one.left_out,
    }
    lines = [
        f"  {title}: " + ", ".join(f"{kind} {number:,}" for kind, number in counter.most_common())
        for title, counter in lists.items()
        if counter
    ]
    if one.lengths["chosen"]:
        words = [f"{side} {fmean(v):,.0f} (median {median(v):,.0f})" for side, v in one.lengths.items()]
        lines.append(f"  characters: {', '.join(words)}")
    return ["", name, *lines] if lines else []


def _percent(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""
