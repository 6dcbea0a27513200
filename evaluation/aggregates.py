"""Totals of scores: means with their errors, per category, per group of questions, and the sums of MME and POPE.

All take plain sequences and give dataclasses that `dataclasses.asdict` turns into a report. An empty set has no mean:
its value is NaN and its count 0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

MME_GROUPS = {
    "perception": tuple("existence count position color posters celebrity scene landmark artwork OCR".split()),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}


@dataclass(frozen=True)
class Mean:
    """A mean.

    Attributes:
        value: NaN for no scores.
        count: Number of scores.
        error: Standard error, sample deviation / sqrt(count); None for fewer than two scores.
    """

    value: float
    count: int
    error: float | None


def mean(scores: Sequence[float]) -> Mean:
    """Mean of scores with its standard error."""
    count = len(scores)
    error = stdev(scores) / math.sqrt(count) if count > 1 else None
    return Mean(fmean(scores) if count else math.nan, count, error)


def mean_by(scores: Sequence[float], categories: Sequence[Hashable]) -> dict[Hashable, Mean]:
    """Mean of every category, in order of appearance.

    Raises:
        ValueError: lengths that differ.
    """
    return {name: mean(values) for name, values in _grouped(scores, categories).items()}


def mean_of_means(means: Mapping[Hashable, Mean], weights: Mapping[Hashable, float] | None = None) -> float:
    """Mean of the categories' means: unweighted (MMIU, MVBench's tasks), or by weights.

    Weights equal to the counts give the mean over all questions (MMMU). Categories without a mean are left out.

    Args:
        means: Of the categories.
        weights: For every category, not negative.

    Raises:
        ValueError: a category without a weight, or a negative one.
    """
    names = [name for name, each in means.items() if each.count]
    missing = [name for name in names if weights is not None and name not in weights]
    if missing:
        raise ValueError(f"weights has no entry for {missing}; give one per category")
    shares = [1.0 if weights is None else weights[name] for name in names]
    if any(share < 0 for share in shares):
        raise ValueError(f"weights must not be negative, got {dict(zip(names, shares, strict=True))}")
    total = math.fsum(shares)
    return math.fsum(share * means[name].value for share, name in zip(shares, names, strict=True)) / (
        total or math.nan
    )


def all_right(correct: Sequence[bool], groups: Sequence[Hashable]) -> Mean:
    """Share of groups whose every question is right: pairs of MMVP, the two questions about an image of MME (acc+).

    Groups are named, as nothing says that a file keeps the order or the number of its questions.
    """
    return mean([float(all(values)) for values in _grouped(correct, groups).values()])


def group_sums(values: Mapping[Hashable, float], groups: Mapping[str, Sequence[Hashable]]) -> dict[str, float]:
    """Sum of the values of every group, those of absent members left out; groups without any member present absent."""
    present = {name: [values[member] for member in members if member in values] for name, members in groups.items()}
    return {name: math.fsum(found) for name, found in present.items() if found}


@dataclass(frozen=True)
class MmeTask:
    """One task of MME: shares of right questions and of images with both right, and points, 100 * (both), 0-200."""

    accuracy: float
    accuracy_plus: float
    points: float
    count: int


def mme_tasks(
    tasks: Sequence[str], images: Sequence[Hashable], correct: Sequence[bool]
) -> tuple[dict[str, MmeTask], dict[str, float]]:
    """MME: every task, and the sums of perception (at most 2000) and cognition (at most 800).

    Args:
        tasks: Of every question.
        images: Of every question; the same name in two tasks is two images.
        correct: Whether `choice_metrics.mme_label` equals the gold label.
    """
    rows = _grouped(list(zip(images, correct, strict=True)), tasks)
    table = {}
    for task, pairs in rows.items():
        right = [bool(each) for _, each in pairs]
        plus = all_right(right, [image for image, _ in pairs]).value
        table[task] = MmeTask(fmean(right), plus, 100 * (fmean(right) + plus), len(right))
    return table, group_sums({task: entry.points for task, entry in table.items()}, MME_GROUPS)


@dataclass(frozen=True)
class YesNo:
    """Yes-no answers against gold, "yes" being the positive class; ratios without a denominator are 0."""

    true_positive: int
    false_positive: int
    true_negative: int
    false_negative: int

    @property
    def count(self) -> int:
        return self.true_positive + self.false_positive + self.true_negative + self.false_negative

    @property
    def accuracy(self) -> float:
        return _ratio(self.true_positive + self.true_negative, self.count)

    @property
    def precision(self) -> float:
        return _ratio(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float:
        return _ratio(self.true_positive, self.true_positive + self.false_negative)

    @property
    def f1(self) -> float:
        return _ratio(2 * self.true_positive, 2 * self.true_positive + self.false_positive + self.false_negative)

    @property
    def yes_ratio(self) -> float:
        return _ratio(self.true_positive + self.false_positive, self.count)

    def report(self) -> dict[str, float]:
        """All figures by name."""
        return {name: getattr(self, name) for name in ("count", "accuracy", "precision", "recall", "f1", "yes_ratio")}


def yes_no_counts(answers: Sequence[str], gold: Sequence[str]) -> YesNo:
    """Counts of "yes" and "no" labels; an answer that is neither counts as the wrong one.

    Raises:
        ValueError: a gold label that is neither, or lengths that differ.
    """
    counts = [0, 0, 0, 0]
    for answer, wanted in zip(answers, gold, strict=True):
        if wanted not in ("yes", "no"):
            raise ValueError(f'gold must be "yes" or "no", got {wanted!r}')
        hit = answer == wanted
        counts[(0 if hit else 3) if wanted == "yes" else (2 if hit else 1)] += 1
    return YesNo(*counts)


def pope(answers: Sequence[str], gold: Sequence[str], categories: Sequence[str]) -> tuple[dict[str, YesNo], float]:
    """POPE: counts of every category (adversarial, popular, random) and the unweighted mean of their F1."""
    rows = _grouped(list(zip(answers, gold, strict=True)), categories)
    table = {name: yes_no_counts(*zip(*pairs, strict=True)) for name, pairs in rows.items()}
    return table, fmean(entry.f1 for entry in table.values()) if table else math.nan


def _grouped(values: Sequence, names: Sequence[Hashable]) -> dict:
    groups: dict = {}
    for value, name in zip(values, names, strict=True):
        groups.setdefault(name, []).append(value)
    return groups


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
