"""What a validation found: counts per data set and check, and a few examples. Nothing is checked here."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .checks import CHECKS, Finding

_MAX_MESSAGE = 300
_NUMBERS = (1, 4, 5)  # columns of the table


@dataclass
class ValidationReport:
    """Counts of a validation; made by `validate`.

    Attributes:
        sizes: Rows of each data set.
        max_skip_share: Share of left-out rows of a data set past which training stops.
        examples: Findings to keep for each data set and check.
        counts: Rows with a problem, by data set and check.
        kept: The first findings, by data set and check.
        left_out: Rows of each data set that training would leave out.
        notes: What was not checked.
    """

    sizes: Mapping[str, int]
    max_skip_share: float = 0.01
    examples: int = 3
    counts: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    kept: dict[tuple[str, str], list[Finding]] = field(default_factory=lambda: defaultdict(list))
    left_out: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    notes: list[str] = field(default_factory=list)
    _last: dict[tuple[str, str], int] = field(default_factory=dict)
    _last_left_out: int = -1

    def add(self, row: int, finding: Finding) -> None:
        """Counts a finding of `row`; findings of one row come one after the other."""
        key = (finding.source, finding.check)
        if self._last.get(key) != row:
            self._last[key] = row
            self.counts[key] += 1
            if len(self.kept[key]) < self.examples:
                self.kept[key].append(finding)
        if CHECKS[finding.check].is_left_out and self._last_left_out != row:
            self._last_left_out = row
            self.left_out[finding.source] += 1

    @property
    def errors(self) -> int:
        """Rows with a problem that is an error, counted once for each check."""
        return self._total("error")

    @property
    def warnings(self) -> int:
        """Rows with a problem that is a warning, counted once for each check."""
        return self._total("warning")

    @property
    def is_ok(self) -> bool:
        """Whether there is no error; warnings may be there."""
        return not self.errors

    def _total(self, severity: str) -> int:
        return sum(count for (_, check), count in self.counts.items() if CHECKS[check].severity == severity)

    def table(self) -> str:
        """Counts and shares by data set and check, in the order of `CHECKS`."""
        rows = [("data set", "rows", "check", "severity", "found", "share")]
        for source, size in self.sizes.items():
            found = [check for check in CHECKS if (source, check) in self.counts]
            name, total = source, f"{size:,}"
            for check in found or [""]:
                count = self.counts[source, check] if check else 0
                cells = (CHECKS[check].severity, f"{count:,}", f"{count / size:.2%}") if check else ("", "", "")
                rows.append((name, total, check or "(nothing found)", *cells))
                name = total = ""
        return _align(rows)

    def summary(self) -> str:
        """Table, examples, what training would leave out, and notes."""
        parts = [self.table()]
        for source in self.sizes:
            for check in CHECKS:
                if self.kept.get((source, check)):
                    parts.append(self._shown(source, check))
        parts += [self._skipping(source) for source in self.sizes if self.left_out.get(source)]
        parts += [f"note: {note}" for note in self.notes]
        parts.append(f"{self.errors:,} errors, {self.warnings:,} warnings in {sum(self.sizes.values()):,} rows")
        return "\n\n".join(parts)

    def _shown(self, source: str, check: str) -> str:
        lines = [f"{source}, {check} ({CHECKS[check].severity}): {CHECKS[check].meaning}"]
        for finding in self.kept[source, check]:
            text = " ".join(str(finding).split())
            lines.append(f"  {text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + '...'}")
        if (more := self.counts[source, check] - len(self.kept[source, check])) > 0:
            lines.append(f"  and {more:,} more")
        return "\n".join(lines)

    def _skipping(self, source: str) -> str:
        count, size = self.left_out[source], self.sizes[source]
        text = f"{source}: training would leave out {count:,} of {size:,} rows ({count / size:.2%})"
        if not source.startswith("eval:") and count > self.max_skip_share * size:
            text += f", more than max_skip_share={self.max_skip_share:g}: the run would stop"
        return text


def _align(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column in _NUMBERS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)
