"""What both pipelines share: going through stored answers, and putting files, meta file and statistics in place.

Pairs are written once all questions have an entry, by whichever process finds that, in the order of the questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..evaluation.collecting import Requests
from ..evaluation.engines import Answer, Failure, Request
from ..evaluation.questions import Question
from .pair_files import PairFile, meta_entry, update_meta, write_json
from .question_sources import QuestionSource, training_row
from .sampling import SamplingPlan
from .statistics import PairStatistics
from .stored_answers import StoredAnswers


@dataclass
class PairingResult:
    """What a pipeline did.

    Attributes:
        missing: Questions without an entry, which other shards have still to ask; while there are any, no pair is
            written.
        statistics: By name of the data set.
        files: The pair files of this run, by their names in the meta file.
        entries: Their meta entries.
        meta: The meta file of the output folder; None if it has no pairs.
    """

    missing: int = 0
    statistics: dict[str, PairStatistics] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    meta: Path | None = None


def count_missing(folder: Path, requests: Requests) -> int:
    """Requests that have no entry in the store of a folder."""
    with StoredAnswers(folder) as stored:
        return sum(key not in stored for key, _ in requests)


def begin_statistics(source: QuestionSource, requests: Requests, why_skipped: str) -> PairStatistics:
    """Statistics of a data set before its answers are looked at."""
    statistics = PairStatistics(len(source.questions))
    if skipped := len(source.questions) - len(requests):
        statistics.skipped[why_skipped] = skipped
    return statistics


def answered(
    source: QuestionSource, requests: Requests, stored: StoredAnswers, statistics: PairStatistics, progress: bool
) -> Iterator[tuple[Question, Request, list[Answer]]]:
    """The questions that were answered, with their answers; those that failed are counted."""
    questions = {question.key: question for question in source.questions}
    for key, request in tqdm(requests, f"Pairing {source.name}", unit=" questions", disable=not progress):
        answers = stored[key]
        if isinstance(answers, Failure):
            statistics.add_failure(answers.reason)
        else:
            statistics.answered += 1
            statistics.samples += len(answers)
            yield questions[key], request, answers


def pair_file(plan: SamplingPlan, source: QuestionSource, kind: str) -> PairFile:
    """The file of one kind of pairs of a data set, named as the original names its own."""
    return PairFile(plan.output / f"{source.name}_{kind}.jsonl")


def write_pair(
    file: PairFile, source: QuestionSource, question: Question, request: Request, number: str, **answers: Any
) -> None:
    """Writes one row.

    Args:
        file: Where to.
        source: The question's data set.
        question: What was read.
        request: What the model was asked.
        number: Tells the pairs of a question apart.
        **answers: `chosen`, `rejected`, `chosen_meta` and `rejected_meta`.
    """
    file.write({"id": f"{question.key}/{number}", **training_row(question, request, source.source.root), **answers})


def finish(
    plan: SamplingPlan, sources: Sequence[QuestionSource], kinds: Sequence[str], method: str, result: PairingResult
) -> PairingResult:
    """Enters what was written into the folder's meta file, and writes the statistics."""
    for source in sources:
        for kind in kinds:
            path = pair_file(plan, source, kind).path
            if path.exists():
                name = path.stem
                rows = result.statistics[source.source.name].pairs[kind]
                result.files[name] = path
                result.entries[name] = meta_entry(path, rows, source.source, plan.tiles_of(source))
    written = {f"{source.name}_{kind}" for source in sources for kind in kinds}
    result.meta = update_meta(plan.output, result.entries, written)
    statistics = {name: one.to_dict() for name, one in result.statistics.items()}
    write_json(plan.output / f"statistics_{method}.json", statistics)
    return result
