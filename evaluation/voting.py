"""Several answers to one question: the majority, and how often one or any of them is right.

Answers are compared by labels, which whoever reads them chooses (`scoring.Mark.label`): two spellings of one answer
should have the same. Answers that could not be read do not vote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Vote:
    """The result of a vote.

    Attributes:
        winner: Place of the first answer with the most frequent label; None if none could be read.
        votes: For it.
        voters: Answers that could be read.
    """

    winner: int | None
    votes: int
    voters: int


def majority(labels: Sequence[str | None]) -> Vote:
    """The most frequent label; of several, the one seen first.

    Args:
        labels: Of the answers in order, None for one that could not be read.
    """
    counts = Counter(label for label in labels if label is not None)
    if not counts:
        return Vote(None, 0, 0)
    label, votes = max(counts.items(), key=lambda item: item[1])  # the first of equals: a Counter keeps the order
    return Vote(labels.index(label), votes, counts.total())


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that at least one of `k` answers, drawn from `samples` without putting back, is right.

    1 - C(samples - right, k) / C(samples, k), the unbiased estimate of Chen et al. 2021 (Evaluating Large Language
    Models Trained on Code, equation 1).

    Raises:
        ValueError: not 0 <= right <= samples, or not 1 <= k <= samples.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"need 0 <= right <= samples and 1 <= k <= samples, got {right}, {samples} and k={k}")
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
