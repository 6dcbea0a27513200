"""Engines without a model: what they answer is a function of the question, the seed and the number of the sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from internvl_hub.evaluation.engines import Answer, Failure, Request, Sampling
from internvl_hub.preference.sampling import SamplingPlan
from internvl_hub.tests.training import tiny_models


class Stop(Exception):
    """Raised in the middle of a collection, as an interruption is."""


class FakeEngine:
    """Answers by a function of (request, seed, sample number); counts requests and may stop after some batches."""

    def __init__(self, reply: Callable[[Request, int, int], Any], stop_after: int | None = None) -> None:
        self.name = "fake"
        self.reply = reply
        self.stop_after = stop_after
        self.batches: list[list[Request]] = []

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        if self.stop_after is not None and len(self.batches) >= self.stop_after:
            raise Stop
        self.batches.append(list(requests))
        return [self._answers(request, sampling) for request in requests]

    def _answers(self, request: Request, sampling: Sampling) -> list[Answer] | Failure:
        replies = [self.reply(request, sampling.seed, number) for number in range(sampling.n)]
        if any(isinstance(reply, Failure) for reply in replies):
            return next(reply for reply in replies if isinstance(reply, Failure))
        return [reply if isinstance(reply, Answer) else Answer(reply) for reply in replies]

    @property
    def requests(self) -> list[Request]:
        return [request for batch in self.batches for request in batch]


def plan(output: Path, engine: Any, n: int = 8, **options: Any) -> SamplingPlan:
    """A plan with small numbers."""
    sampling = Sampling(n=n, temperature=0.7, top_k=50, max_new_tokens=64, seed=options.pop("seed", 0))
    return SamplingPlan(output, engine, sampling, **{"batch_size": 2, "progress": False, **options})


def pictures(folder: Path, count: int) -> list[str]:
    """Names of small pictures in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        tiny_models.picture(index, (28, 28)).save(folder / f"{index}.png")
    return [f"{index}.png" for index in range(count)]
