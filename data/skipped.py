"""What a data set returns in place of a row that cannot be used.

A row is left out, never replaced by another one: the collator drops the marker from its batch and hands it on, so that
whoever trains can count it. Nothing here decides when a run has lost too much.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Skipped:
    """A row that was left out.

    Attributes:
        source: Name of the data set.
        where: Position of the row, such as `train.jsonl:12`.
        reason: What is wrong with it.
    """

    source: str
    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.source}: skipped {self.where}: {self.reason}"
