"""Answers instead of losses: greedy generation on evaluation rows, compared with what the rows say.

Exact match compares whole answers after stripping white space at both ends. Boxes are read from any text that holds
four numbers in brackets, with or without the `<box>` tags, which decoding may have removed. Whatever a model writes
gets a mark, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.dataset import ConversationDataset
from ..data.skipped import Skipped
from ..evaluation.boxes import Box as Box
from ..evaluation.boxes import box_iou, parse_boxes
from ..losses_internvl import IGNORE_INDEX


@dataclass(frozen=True)
class Question:
    """The last answer of a row and all that comes before it.

    Attributes:
        input_ids: (L,) the prompt, as at inference.
        pixel_values: (tiles, 3, S, S), or None.
        reference: The answer, special tokens left out.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    reference: str


def question_of(features: dict[str, Any], tokenizer: Any) -> Question | None:
    """The last supervised part of a row as a question, None for a row without any.

    Training ids are the ids of inference, the answer and its end, so that the prompt is what stands before it.
    """
    supervised = torch.nonzero(features["labels"] != IGNORE_INDEX).flatten()
    if not len(supervised):
        return None
    breaks = torch.nonzero(supervised.diff() > 1).flatten()
    start = int(supervised[breaks[-1] + 1] if len(breaks) else supervised[0])
    answer = features["input_ids"][start : int(supervised[-1]) + 1]
    reference = tokenizer.decode(answer, skip_special_tokens=True).strip()
    return Question(features["input_ids"][:start], features["pixel_values"], reference)


@torch.no_grad()
def answer_question(model: Any, tokenizer: Any, question: Question, max_new_tokens: int) -> str:
    """The greedy answer of a model in evaluation mode."""
    ids = question.input_ids[None].to(model.device)
    pixels = question.pixel_values
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=None if pixels is None else pixels.to(model.device, model.dtype),
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True).strip()


def mark_answers(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Marks of answers: `exact_match` of each; `box_iou` of those whose reference has boxes.

    Boxes are compared in order; missing ones score 0, and surplus ones lower the mean as if each missed.
    """
    marks: dict[str, list[float]] = {"exact_match": [], "box_iou": []}
    for answer, reference in zip(answers, references, strict=True):
        marks["exact_match"].append(float(answer.strip() == reference.strip()))
        wanted, found = parse_boxes(reference), parse_boxes(answer)
        if wanted:
            overlaps = [box_iou(first, second) for first, second in zip(found, wanted, strict=False)]
            marks["box_iou"].append(sum(overlaps) / max(len(wanted), len(found)))
    return marks


def evaluate_generation(
    trainer: Any, dataset: ConversationDataset, count: int, max_new_tokens: int
) -> dict[str, float]:
    """Mean marks of `count` rows spread evenly over a data set, shared among ranks.

    Args:
        trainer: Whose model answers.
        dataset: Its rows; those that cannot be used are left out.
        count: At most so many rows.
        max_new_tokens: Of an answer.

    Returns:
        `exact_match`, `box_iou` where references have boxes, and `generated`, the number of answers.
    """
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    own = rows[rank::ranks]
    padding = -(-len(rows) // ranks) - len(own)  # every rank generates as often: sharded weights are gathered by all
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), dataset.tokenizer
    was_training = model.training
    model.eval()
    answers, references = [], []
    for place, row in enumerate([*own, *rows[:padding]]):
        features = dataset[row]
        question = None if isinstance(features, Skipped) else question_of(features, tokenizer)
        text = answer_question(model, tokenizer, question or _PLAIN, max_new_tokens)
        if question is not None and place < len(own):
            answers.append(text)
            references.append(question.reference)
    model.train(was_training)
    marks = mark_answers(answers, references)
    sums = torch.tensor([[sum(values), len(values)] for values in marks.values()], dtype=torch.float64)
    if ranks > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.args.device), reduction="sum").cpu()
    totals = dict(zip(marks, sums.tolist(), strict=True))
    means = {name: total / number for name, (total, number) in totals.items() if number}
    return {**means, "generated": totals["exact_match"][1]}


# In place of a row that cannot be used, so that all ranks stay in step.
_PLAIN = Question(torch.zeros(1, dtype=torch.long), None, "")
