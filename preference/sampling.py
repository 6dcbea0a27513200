"""Asking all questions of a data set, alone or as one of several shards, into a store that survives interruptions.

Sampled answers stay in the output folder, so that pairs can be made again with other caps without sampling again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.answer_store import AnswerStore, shard_files
from ..evaluation.collecting import Requests, collect, collection_settings
from ..evaluation.engines import Answer, Engine, Failure, Request, Sampling
from .question_sources import QuestionSource, make_request


class LazyEngine:
    """An engine that is built when it is first asked: pairing stored answers again needs no model.

    Args:
        name: Of the model; answers of models with different names are never mixed.
        build: Makes the engine.
    """

    def __init__(self, name: str, build: Callable[[], Engine]) -> None:
        self.name = name
        self._build = build
        self._engine: Engine | None = None

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        """See `Engine.sample`."""
        if self._engine is None:
            self._engine = self._build()
        return self._engine.sample(requests, sampling)


@dataclass(frozen=True)
class SamplingPlan:
    """How the questions are asked.

    Attributes:
        output: Folder; answers are stored below it.
        engine: Answers.
        sampling: How answers are drawn; its seed is also that of the choice of pairs.
        style: Of the prompt, see `cot_prompt`.
        batch_size: Questions that are handed to the engine at once.
        max_tiles: Most tiles of an image; None for what the meta file or else the checkpoint says.
        shard: (number from 0, how many); None for all questions, or, where shards have been asked, to read them.
        retry_failures: Ask questions again whose last attempt failed.
        progress: Show bars.
        details: What else answers depend on, as json values; answers with other details are not mixed.
    """

    output: Path
    engine: Engine
    sampling: Sampling
    style: str = "final_answer"
    batch_size: int = 8
    max_tiles: int | None = None
    shard: tuple[int, int] | None = None
    retry_failures: bool = False
    progress: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)

    def tiles_of(self, source: QuestionSource) -> int | None:
        """Most tiles of an image of a data set."""
        return source.source.max_dynamic_patch if self.max_tiles is None else self.max_tiles

    def requests_of(self, source: QuestionSource, keys: set[str]) -> list[tuple[str, Request]]:
        """Requests for the questions with these keys, in the order of the file."""
        return [
            (question.key, make_request(question, self.style, self.tiles_of(source)))
            for question in source.questions
            if question.key in keys
        ]


def ask(plan: SamplingPlan, folder: Path, requests: Requests, identity: Requests | None = None, **more: Any) -> None:
    """Asks what the store in a folder lacks of a data set, or of the plan's shard of it.

    Where shards have been asked and the plan names none, nothing is asked: they are only read.

    Args:
        plan: How.
        folder: Of the store.
        requests: All of the data set's.
        identity: Requests whose digest identifies the collection; None for `requests`.
        **more: Other settings that must not be mixed in a store.

    Raises:
        ValueError: the folder holds answers to other questions, or that were drawn otherwise.
    """
    if not requests:
        return
    shard, shards = plan.shard or (0, _number_of_shards(folder))
    settings = {"style": plan.style, "max_tiles": plan.max_tiles, **plan.details, **more}
    identity = requests if identity is None else identity
    settings = collection_settings(identity, plan.engine, plan.sampling, plan.batch_size, **settings)
    store = AnswerStore(folder, settings, shard, shards)
    if plan.shard is not None or shards == 1:
        collect(requests, plan.engine, plan.sampling, store, plan.batch_size, plan.progress, plan.retry_failures)


def _number_of_shards(folder: Path) -> int:
    """Of the files in a store's folder (`answers-00000-of-00004.jsonl`); 1 where there are none."""
    return max((int(path.stem.rpartition("-")[2]) for path in shard_files(folder)), default=1)
