"""The report of a preference optimisation of InternVL-tiny: accuracy by task before and after, over seeds.

Before and after are compared question by question. The standard error of a difference is that of the mean over all
questions of (mean over seeds after - before): it covers the choice of questions; the spread over seeds stands beside
it. Nothing is measured here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

Scores = dict[str, list[float]]


@dataclass(frozen=True)
class Change:
    """What happened to a task.

    Attributes:
        task: Its name.
        questions: How many.
        before: Accuracy, 0 to 1.
        after: Accuracy of each seed.
        error: Standard error of the mean difference, over questions.
    """

    task: str
    questions: int
    before: float
    after: tuple[float, ...]
    error: float

    @property
    def difference(self) -> float:
        """Mean over seeds, minus before."""
        return mean(self.after) - self.before

    @property
    def spread(self) -> float:
        """Standard deviation over seeds; 0 for one seed."""
        return stdev(self.after) if len(self.after) > 1 else 0.0

    @property
    def verdict(self) -> str:
        """`rises` or `falls` by more than two standard errors, else empty."""
        if abs(self.difference) <= 2 * self.error:
            return ""
        return "rises" if self.difference > 0 else "falls"


def compare(before: Mapping[str, Sequence[float]], after: Sequence[Mapping[str, Sequence[float]]]) -> list[Change]:
    """The change of every task and of `all` questions.

    Args:
        before: Scores of the questions of each task.
        after: The same questions' scores for each seed.

    Raises:
        ValueError: other tasks, or another number of questions.
    """
    for scores in after:
        if {task: len(hits) for task, hits in scores.items()} != {task: len(hits) for task, hits in before.items()}:
            raise ValueError("the scores are of other questions; delete the scores folder and score again")
    together = [{**scores, "all": [hit for hits in scores.values() for hit in hits]} for scores in (before, *after)]
    return [_change(task, [scores[task] for scores in together]) for task in ("all", *sorted(before))]


def _change(task: str, rows: Sequence[Sequence[float]]) -> Change:
    first, *seeds = rows
    differences = [mean(after) - before for before, *after in zip(first, *seeds, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return Change(task, len(first), mean(first), tuple(map(mean, seeds)), error)


def format_changes(changes: Sequence[Change]) -> str:
    """A Markdown table in per cent; differences in points."""
    lines = [
        "| task | n | before % | after %, mean over seeds (standard deviation) | difference (standard error) | |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for change in changes:
        after = f"{100 * mean(change.after):.1f} ({100 * change.spread:.1f})"
        difference = f"{100 * change.difference:+.1f} ({100 * change.error:.1f})"
        cells = (change.task, change.questions, f"{100 * change.before:.1f}", after, difference, change.verdict)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write_report(folder: Path, split: str, before: Scores, after: Mapping[int, Scores]) -> Path:
    """Writes `report.md` and `report.png` from scores and from what the pipelines counted; returns the first."""
    changes = compare(before, list(after.values()))
    lines = [
        f"# Preference optimisation of InternVL-tiny, seeds {', '.join(map(str, after))}",
        "",
        f"{split.capitalize()} split, single questions, greedy answers; pointing counts boxes with an IoU of at least "
        "0.5. A task rises or falls if the difference exceeds two standard errors.",
        "",
        format_changes(changes),
        "![Accuracy before and after](report.png)",
        "",
        "## Pairs",
        "",
        _format_pairs(folder / "pairs"),
    ]
    path = folder / "report.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    _draw(folder / "report.png", changes)
    return path


def _format_pairs(folder: Path) -> str:
    lines = ["| data | pairs |", "|---|---:|"]
    for name, entry in json.loads((folder / "meta.json").read_text(encoding="utf-8")).items():
        lines.append(f"| {name} | {entry['length']:,} |")
    return "\n".join(lines) + "\n"


def _draw(path: Path, changes: Sequence[Change]) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.32 * len(changes) + 1.2), layout="constrained")
    rows = range(len(changes))
    axes.barh(rows, [100 * change.before for change in changes], height=0.72, color="#c8d3df", label="before")
    for row, change in zip(rows, changes, strict=True):
        label = "after, each seed" if row == 0 else None
        axes.plot(
            [100 * value for value in change.after], [row] * len(change.after), "o", color="#c2410c", label=label
        )
    axes.set_yticks(rows, [change.task for change in changes])
    axes.invert_yaxis()
    axes.set_xlim(0, 103)
    axes.set_xlabel("held-out accuracy (%)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.0 + 1.6 / len(changes)), ncols=2, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)
