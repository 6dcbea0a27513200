"""Correctness pairs from end to end: questions with gold answers to files of pairs. The rules are in `correctness`.

It may be stopped and run again, and shared out over several processes. Which pairs come out depends on nothing but the
stored answers, the gold answers, the caps and the seed.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ..evaluation.collecting import Requests
from ..evaluation.engines import Answer, Request
from ..evaluation.questions import Question
from ..evaluation.verifiers import VERIFIERS, task_of_dataset
from .correctness import Caps, JudgedAnswer, PairedAnswers, judge, pair
from .pairing import PairingResult, answered, begin_statistics, count_missing, finish, pair_file, write_pair
from .question_sources import QuestionSource
from .sampling import SamplingPlan, ask
from .statistics import PairStatistics
from .stored_answers import StoredAnswers

CORRECTNESS = "pairs_vqa_correctness_rules"
FORMAT = "pairs_vqa_format_rules"
_AUTO = "auto"
_WINDOW = 64  # questions for each worker whose answers are in memory at a time

Answered = tuple[Question, Request, list[Answer]]


def make_correctness_pairs(
    sources: Sequence[QuestionSource],
    plan: SamplingPlan,
    task: str | None = None,
    caps: Caps = Caps(),  # noqa: B008 - frozen
    workers: int = 0,
) -> PairingResult:
    """Samples answers to questions with gold answers and pairs right with wrong ones.

    Args:
        sources: The questions; those without a gold answer are counted and left out.
        plan: How they are asked.
        task: Of `verify`, or a data set that has one, for all questions; None for what a row names, or else what the
            original does for data sets of this name (`task_of_dataset`).
        caps: Most pairs of a question.
        workers: Processes that judge the answers; 0 for this one.

    Raises:
        ValueError: an unknown task, or see `sampling.ask`.
    """
    tasks = [_tasks(source, task) for source in sources]
    folders = [plan.output / "answers" / "correctness" / source.name for source in sources]
    asked = [plan.requests_of(source, set(names)) for source, names in zip(sources, tasks, strict=True)]
    for folder, requests in zip(folders, asked, strict=True):
        ask(plan, folder, requests)
    result = PairingResult(missing=sum(map(count_missing, folders, asked)))
    if result.missing:
        return result
    for source, folder, requests, names in zip(sources, folders, asked, tasks, strict=True):
        result.statistics[source.source.name] = _pair_source(source, plan, folder, requests, names, caps, workers)
    return finish(plan, sources, (CORRECTNESS, FORMAT), "correctness", result)


def _tasks(source: QuestionSource, task: str | None) -> dict[str, str]:
    """The task of each question with a gold answer."""
    tasks = {}
    for question in source.questions:
        if not any(answer.strip() for answer in question.answers):
            continue
        name = task or question.task
        found = task_of_dataset(source.source.name) if name is None else _verifier_of(name)
        if found is None:
            known = f"known are {', '.join(VERIFIERS)} and data sets such as chartqa"
            where, advice = ("", known) if task else (f"{question.where}: ", f"--task overrides it; {known}")
            raise ValueError(f"{where}unknown task {name!r}; {advice}")
        tasks[question.key] = found
    return tasks


def _verifier_of(name: str) -> str | None:
    """The key of `VERIFIERS` that a name of one, or of a data set, stands for."""
    if name in VERIFIERS:
        return name
    found = task_of_dataset(name)
    return None if found == _AUTO else found


def _pair_source(
    source: QuestionSource,
    plan: SamplingPlan,
    folder: Path,
    requests: Requests,
    tasks: Mapping[str, str],
    caps: Caps,
    workers: int,
) -> PairStatistics:
    statistics = begin_statistics(source, requests, "no gold answer")
    most, seed = caps.of_file(len(source.questions)), plan.sampling.seed
    with (
        pair_file(plan, source, CORRECTNESS) as right,
        pair_file(plan, source, FORMAT) as form,
        StoredAnswers(folder) as stored,
    ):
        files = {CORRECTNESS: right, FORMAT: form}
        found = answered(source, requests, stored, statistics, plan.progress)
        for question, request, judged in _judge_all(found, plan.style, tasks, workers):
            statistics.tasks[tasks[question.key]] += 1
            paired = pair(judged, question, most, seed)
            _count(statistics, judged, paired)
            for kind, pairs in ((CORRECTNESS, paired.correctness), (FORMAT, paired.format)):
                for chosen, rejected in pairs:
                    statistics.add_pair(kind, chosen.text, rejected.text)
                    number = f"{chosen.sample}-{rejected.sample}"
                    texts = {"chosen": chosen.text, "rejected": rejected.text}
                    metas = {"chosen_meta": chosen.meta(), "rejected_meta": rejected.meta()}
                    write_pair(files[kind], source, question, request, number, **texts, **metas)
    return statistics


def _judge_all(
    items: Iterable[Answered], style: str, tasks: Mapping[str, str], workers: int
) -> Iterator[tuple[Question, Request, list[JudgedAnswer]]]:
    """The answers judged, in order; comparing formulas takes milliseconds each, so that workers pay."""
    if not workers:
        for question, request, answers in items:
            yield question, request, judge(question, answers, style, tasks[question.key])
        return
    items = iter(items)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:  # a device forbids forks
        while window := list(islice(items, workers * _WINDOW)):
            # The other fields of a row are not needed, and cannot be pickled.
            questions = [replace(question, fields={}) for question, _, _ in window]
            columns = ([answers for _, _, answers in window], [style] * len(window), [tasks[q.key] for q in questions])
            judged = pool.map(judge, questions, *columns, chunksize=8)
            yield from (
                (question, request, found) for (question, request, _), found in zip(window, judged, strict=True)
            )


def _count(statistics: PairStatistics, judged: Sequence[JudgedAnswer], paired: PairedAnswers) -> None:
    kinds = [answer.kind for answer in judged]
    statistics.kinds.update(kinds)
    statistics.all_correct += bool(kinds) and set(kinds) == {"correct"}
    statistics.none_correct += "correct" not in kinds
    statistics.paired += bool(paired.correctness or paired.format)
    for answer in judged:
        if answer.kind == "format":
            statistics.format_failures[str(answer.problem)] += 1
        elif answer.kind == "unusable":
            statistics.left_out[str(answer.problem)] += 1
    statistics.left_out += {"same answer again": paired.duplicates, "contains the right answer": paired.contained}
