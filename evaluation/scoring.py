"""Marks of single answers: what an answer was read as, and what that is worth.

One scorer per benchmark rule, by name in `SCORERS`, over the readers of `choice_metrics` and the metrics of
`text_metrics`; `auto` and the names of `verifiers.VERIFIERS` judge as those do. Sums over many answers are `totals`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from .answers import parse_response
from .boxes import GROUNDING_HIT, box_iou, read_boxes, relative_box
from .choice_metrics import (
    first_letter,
    mmbench_letter,
    mme_label,
    mmmu_choice,
    mmmu_open_match,
    mvbench_match,
    pope_label,
)
from .choices import read_choice, read_yes_no
from .latex_text import normalize_latex
from .presets import lettered
from .questions import Question
from .text_metrics import anls, contains_word, exact_match, read_number, relaxed_accuracy
from .verifiers import VERIFIERS, verify
from .vqa_score import normalize_answer, vqa_score


@dataclass(frozen=True)
class Mark:
    """What an answer is worth.

    Attributes:
        score: 0 to 1.
        label: What it was read as; answers with equal labels are the same to the metric, for voting.
        problem: Why it could not be read, which makes it wrong; None if it could.
    """

    score: float
    label: str
    problem: str | None = None


Scorer = Callable[[str, Question], Mark]


def mark_text(text: str, question: Question, metric: str, style: str = "direct") -> Mark:
    """The mark of a whole response.

    Args:
        text: What the model wrote.
        question: With its gold answers.
        metric: Of `SCORERS`.
        style: How the answer is read from the response, of `answers.STYLES`.
    """
    parsed = parse_response(text, style, strict=False)
    if parsed.answer is None:
        return Mark(0.0, "", parsed.problem)
    return SCORERS[metric](parsed.answer, question)


def _short(metric: Callable[..., float]) -> Scorer:
    """A scorer of short answers, equal where VQA's normal form is."""
    return lambda text, question: Mark(metric(text, question.answers), normalize_answer(text) or text.strip().lower())


def _relaxed(text: str, question: Question) -> Mark:
    number = read_number(text)
    label = text.strip().lower() if number is None else repr(number)
    return Mark(relaxed_accuracy(text, question.answers), label)


def _gold_letters(question: Question) -> set[str]:
    return {read_choice(gold, question.options) or gold.strip() for gold in question.answers}


def _letter(text: str, question: Question) -> Mark:
    """MMBench's reader; without options, whose texts it looks for, the strict reader of letters."""
    options = dict(lettered(question.options))
    found = mmbench_letter(text, options) if options else read_choice(text) or text.strip()
    problem = None if len(found) == 1 else "no_choice"
    return Mark(float(found in _gold_letters(question)), found, problem)


def _first_letter(text: str, question: Question) -> Mark:
    found = first_letter(text)
    return Mark(float(found in _gold_letters(question)), found)


def _mvbench(text: str, question: Question) -> Mark:
    options = dict(lettered(question.options))
    wanted = [f"({letter}) {options[letter]}" if letter in options else letter for letter in _gold_letters(question)]
    return Mark(
        float(any(mvbench_match(text, gold) for gold in wanted)), (text.lower().split() or [""])[0].strip("().:")
    )


def _mmmu(text: str, question: Question) -> Mark:
    if not question.options:
        return Mark(float(mmmu_open_match(text, question.answers)), normalize_answer(text))
    found = mmmu_choice(text, dict(lettered(question.options)))
    return Mark(float(found in _gold_letters(question)), found or "", None if found else "no_choice")


def _mmmu_pro(text: str, question: Question) -> Mark:
    """The letter after the last "Answer:"; where there is none, MMMU's reader."""
    letters = re.findall(r"Answer:\**\s*\(?([A-Z])\b", text)
    if letters and letters[-1] in dict(lettered(question.options)):
        return Mark(float(letters[-1] in _gold_letters(question)), letters[-1])
    return _mmmu(text, question)


def _yes_no(reader: Callable[[str], str]) -> Scorer:
    def score(text: str, question: Question) -> Mark:
        found, wanted = reader(text), {read_yes_no(gold) for gold in question.answers}
        return Mark(float(found in wanted), found, None if found in ("yes", "no") else "no_yes_no")

    return score


def _grounding(text: str, question: Question) -> Mark:
    """RefCOCO: the first box overlaps the gold box by at least a half."""
    found = read_boxes(text)
    if not found:
        return Mark(0.0, "", "no_box")
    box = relative_box(found[0])
    gold = [relative_box(each) for answer in question.answers for each in read_boxes(answer)]
    return Mark(float(any(box_iou(box, each) >= GROUNDING_HIT for each in gold)), repr(box))


def _mathvista(text: str, question: Question) -> Mark:
    """MathVista's quick way: `The answer is "..."`, else the whole answer, in the form that the row asks for."""
    quoted = re.search(r'The answer is "(.*)"\.', text)
    answer = quoted[1] if quoted else text
    if question.options:
        found = read_choice(answer, question.options)
        return Mark(float(found in _gold_letters(question)), found or "", None if found else "no_choice")
    kind, digits = question.fields.get("answer_type"), question.fields.get("precision")
    found = _as_number(answer, kind, digits)
    if found is None:
        return Mark(0.0, "", "no_number")
    return Mark(float(any(_as_number(gold, kind, digits) == found for gold in question.answers)), found)


def _as_number(text: str, kind: object, digits: object) -> str | None:
    """A text in the form of MathVista's `answer_type`: integer, float with `precision` digits, else as it is."""
    if kind not in ("integer", "float"):
        return text.strip()
    number = read_number(text.strip().rstrip("."))
    if number is None:
        return None
    return (
        str(int(number))
        if kind == "integer"
        else f"{number:.{int(digits) if isinstance(digits, (int, float)) else 2}f}"
    )


def _verified(task: str) -> Scorer:
    def score(text: str, question: Question) -> Mark:
        verdict = verify(text, question.answers, task, question.options)
        return Mark(verdict.score, _label(text, question), verdict.problem)

    return score


def _auto(text: str, question: Question) -> Mark:
    """As the row's `task` says; without one, boxes as boxes and all else as `verify` does by default."""
    boxes = [box for gold in question.answers for box in read_boxes(gold)]  # decimals: pixels become thousandths
    has_box = any(box[2] > box[0] and box[3] > box[1] for box in boxes)
    return _verified(question.task or ("box" if has_box else "auto"))(text, question)


def _label(text: str, question: Question) -> str:
    letter = read_choice(text, question.options) if question.options else None
    return letter or read_yes_no(text) or normalize_answer(normalize_latex(text)) or text.strip()


SCORERS: dict[str, Scorer] = {
    **{name: _verified(name) for name in VERIFIERS},
    "auto": _auto,
    "exact": _short(exact_match),
    "anls": _short(anls),
    "vqa": _short(vqa_score),
    "contains": _short(contains_word),
    "relaxed": _relaxed,
    "letter": _letter,
    "first_letter": _first_letter,
    "mvbench": _mvbench,
    "mmmu": _mmmu,
    "mmmu_pro": _mmmu_pro,
    "pope": _yes_no(pope_label),
    "mme": _yes_no(mme_label),
    "grounding": _grounding,
    "mathvista": _mathvista,
}
