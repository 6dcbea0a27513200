"""An evaluation from questions to a report: asked through an engine, stored as it goes, scored when all is there.

Answers and scores are apart: `ask` only fills an answer store, `score_folder` only reads one. Nothing is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .answer_store import AnswerStore, read_entries, read_settings
from .collecting import Requests, collect, collection_settings, read_answers, requests_digest
from .engines import Answer, Engine, Failure, Request, Sampling
from .presets import Preset
from .prompts import cot_prompt
from .questions import Question
from .report import FAILED, Report, Row, build_report
from .scoring import SCORERS, Mark, mark_text
from .totals import check_fields
from .voting import majority


def make_requests(questions: Sequence[Question], preset: Preset) -> list[tuple[str, Request]]:
    """The requests of an evaluation, by the keys of the questions.

    The system text is the preset's, else that of its reasoning style, else that of the row.
    """
    requests = []
    for question in questions:
        prompt = cot_prompt(preset.text_for(question), preset.style)
        texts = (preset.system, prompt.system, question.fields.get("system"))
        system = next((text for text in texts if text is not None), None)
        tiles = preset.tiles_for(question)
        request = Request(prompt.question, question.images, question.videos, system, max_tiles=tiles)
        requests.append((question.key, request))
    return requests


def ask(
    questions: Sequence[Question],
    engine: Engine,
    preset: Preset,
    sampling: Sampling,
    folder: str | Path,
    *,
    batch_size: int = 8,
    shard: int = 0,
    shards: int = 1,
    progress: bool = True,
    retry_failures: bool = False,
    **details: Any,
) -> None:
    """Asks what a folder lacks of a shard's questions; calling it again goes on where it stopped.

    Args:
        questions: All of them, whatever the shard.
        engine: Answers them.
        preset: How they are asked.
        sampling: How answers are drawn.
        folder: Of the answer store.
        batch_size, progress, retry_failures: As for `collect`.
        shard, shards: As for `AnswerStore`.
        **details: Of the engine, as json values, that the answers depend on.

    Raises:
        ValueError: the folder holds answers to other questions or with other settings, or a row lacks a field that the
            preset needs.
    """
    check_fields(questions, preset.totals)
    requests = make_requests(questions, preset)
    settings = collection_settings(requests, engine, sampling, batch_size, preset=preset.as_dict(), **details)
    store = AnswerStore(folder, settings, shard, shards)
    collect(requests, engine, sampling, store, batch_size, progress, retry_failures)


def score_folder(questions: Sequence[Question], folder: str | Path, metric: str | None = None, **more: Any) -> Report:
    """The report on the answers in a folder, asked by this process or any other.

    Args:
        questions: The same that were asked.
        folder: Of the answer store.
        metric: Another one than the preset's, of `SCORERS`.
        **more: Goes into the report, such as `seconds`.

    Raises:
        FileNotFoundError: the folder holds no answers.
        ValueError: they are not to these questions, or there is no such metric.
    """
    settings = read_settings(folder)
    preset = Preset(**settings["preset"])
    metric = metric or preset.metric
    if metric not in SCORERS:
        raise ValueError(f"no metric {metric!r}; there are {', '.join(sorted(SCORERS))}")
    _check_same(make_requests(questions, preset), settings, folder)
    answers = read_answers(read_entries(folder))
    rows = [_row(question, answers[question.key], metric, preset) for question in questions if question.key in answers]
    return build_report(rows, settings, metric, preset.totals, len(questions) - len(rows), more)


def _check_same(requests: Requests, settings: dict[str, Any], folder: str | Path) -> None:
    if requests_digest(requests) != settings["requests_digest"]:
        raise ValueError(
            f"{folder} holds answers to {settings['requests']} other questions than these {len(requests)}; give the "
            "same data, --limit and --all-turns, or choose another output folder"
        )


def _row(question: Question, given: list[Answer] | Failure, metric: str, preset: Preset) -> Row:
    """A question with its marks; of several answers, the mark of the majority counts."""
    if isinstance(given, Failure):
        return Row(question, Mark(0.0, "", FAILED), (), (), given.reason)
    if not question.answers:
        return Row(question, None, tuple(given), ())
    marks = tuple(mark_text(answer.text, question, metric, preset.style) for answer in given)
    if len(marks) == 1:
        return Row(question, marks[0], tuple(given), marks)
    vote = majority([mark.label if mark.problem is None else None for mark in marks])
    chosen = marks[0] if vote.winner is None else marks[vote.winner]
    return Row(question, chosen, tuple(given), marks, votes=vote.votes)
