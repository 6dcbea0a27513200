"""DropoutNTP pairs from end to end: questions about pictures to files of pairs. The rules are in `dropout_ntp`.

Two collections follow one another: answers with the picture (unless the data has them), and continuations of their
first halves without it. Batches of the second are those of the first, so that a shard needs none of the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..evaluation.collecting import Requests
from ..evaluation.engines import Answer, Failure, Request
from .dropout_ntp import HalfAnswers, blind_request, first_half, why_not_chosen, why_not_rejected
from .pairing import PairingResult, answered, begin_statistics, count_missing, finish, pair_file, write_pair
from .question_sources import QuestionSource
from .sampling import SamplingPlan, ask
from .statistics import PairStatistics
from .stored_answers import StoredAnswers

DROPOUT_NTP = "pairs_dropout_ntp"

Answers = dict[str, list[Answer] | Failure]


def make_dropout_pairs(
    sources: Sequence[QuestionSource], plan: SamplingPlan, from_answers: bool = False, keep_cut: bool = False
) -> PairingResult:
    """Pairs answers with what the model makes of their first halves without picture and video.

    Args:
        sources: The questions; those without picture or video are counted and left out.
        plan: How they are asked, one answer each.
        from_answers: Take the first answer of the data as the chosen one; questions without are left out.
        keep_cut: Accept continuations that were cut at the token limit.

    Raises:
        ValueError: several answers are to be sampled, or see `sampling.ask`.
    """
    if plan.sampling.n != 1:
        raise ValueError(f"one answer is sampled for each question, got n={plan.sampling.n}")
    asked = [_requests(source, plan, from_answers) for source in sources]
    folders = [plan.output / "answers" / "dropout_ntp" / source.name for source in sources]
    chosen: list[Answers] = []
    for source, folder, requests in zip(sources, folders, asked, strict=True):
        if not from_answers:
            ask(plan, folder / "chosen", requests)
        chosen.append(_answers_of(source) if from_answers else _read(folder / "chosen", requests))
        _continue(plan, folder / "continued", requests, chosen[-1], from_answers)
    unknown = sum(key not in known for requests, known in zip(asked, chosen, strict=True) for key, _ in requests)
    missing = sum(count_missing(folder / "continued", items) for folder, items in zip(folders, asked, strict=True))
    result = PairingResult(missing=max(unknown, missing))
    if result.missing:
        return result
    origin = "data" if from_answers else "sampled"
    for source, folder, requests, known in zip(sources, folders, asked, chosen, strict=True):
        statistics = _pair_source(source, plan, folder / "continued", requests, known, origin, keep_cut)
        result.statistics[source.source.name] = statistics
    return finish(plan, sources, (DROPOUT_NTP,), "dropout_ntp", result)


def _requests(source: QuestionSource, plan: SamplingPlan, from_answers: bool) -> Requests:
    keys = {q.key for q in source.questions if (q.images or q.videos) and (q.answers or not from_answers)}
    return plan.requests_of(source, keys)


def _answers_of(source: QuestionSource) -> Answers:
    return {question.key: [Answer(question.answers[0])] for question in source.questions if question.answers}


def _read(folder: Path, requests: Requests) -> Answers:
    with StoredAnswers(folder) as stored:
        return {key: stored[key] for key, _ in requests if key in stored}


def _continue(plan: SamplingPlan, folder: Path, requests: Requests, chosen: Answers, from_answers: bool) -> None:
    """Asks for the continuations of the plan's shard."""
    blind = [(key, _blind(request, chosen.get(key), plan.style)) for key, request in requests]
    given = repr([chosen.get(key) for key, _ in requests]).encode("utf-8", "backslashreplace")
    digest = hashlib.blake2b(given, digest_size=16).hexdigest() if from_answers else None
    # Another seed than that of the answers, whose random numbers would come again.
    sampling = replace(plan.sampling, seed=plan.sampling.seed + 1)
    again = replace(plan, engine=HalfAnswers(plan.engine), sampling=sampling)
    ask(again, folder, blind, requests, answers_digest=digest)


def _blind(request: Request, chosen: list[Answer] | Failure | None, style: str) -> Request:
    """What `HalfAnswers` asks; of other shards there may be no answer yet."""
    if not isinstance(chosen, list):
        return blind_request(request, "")
    return (
        blind_request(request, first_half(chosen[0].text) or "")
        if not why_not_chosen(chosen[0], style)
        else Request("")
    )


def _pair_source(
    source: QuestionSource,
    plan: SamplingPlan,
    folder: Path,
    requests: Requests,
    chosen: Answers,
    origin: str,
    keep_cut: bool,
) -> PairStatistics:
    statistics = begin_statistics(source, requests, "no picture, video or answer")
    kept, counted = [], 0
    for key, request in requests:
        answers = chosen[key]
        if isinstance(answers, Failure):
            statistics.add_failure(answers.reason)
        elif reason := why_not_chosen(answers[0], plan.style):
            statistics.left_out[reason] += 1
            counted += 1
        else:
            kept.append((key, request))
    with pair_file(plan, source, DROPOUT_NTP) as file, StoredAnswers(folder) as stored:
        for question, request, (continuation,) in answered(source, kept, stored, statistics, plan.progress):
            answer = chosen[question.key][0]
            prefix = first_half(answer.text) or ""
            if reason := why_not_rejected(continuation, answer.text, prefix, keep_cut):
                statistics.left_out[reason] += 1
                continue
            rejected = prefix + continuation.text
            statistics.paired += 1
            statistics.add_pair(DROPOUT_NTP, answer.text, rejected)
            metas = {
                "chosen_meta": {"method": origin},
                "rejected_meta": {"method": "dropout_ntp", "prefix": prefix},
            }
            write_pair(file, source, question, request, "0", chosen=answer.text, rejected=rejected, **metas)
    statistics.answered += counted
    return statistics
