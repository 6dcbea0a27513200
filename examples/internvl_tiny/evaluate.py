"""Held-out scores of InternVL-tiny: greedy answers to single questions, marked by `metrics`.

Run: python -m internvl_hub.examples.internvl_tiny.evaluate CHECKPOINT [--split test] [--samples 400]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from ...conversation import IMAGE_PLACEHOLDER
from ...image_processing_internvl import InternVLImageProcessor
from ...modeling_internvl_chat import InternVLChatModel
from ...processing_internvl import InternVLProcessor
from .metrics import Row, aggregate, format_table, make_row
from .tasks import TASKS, Sample, Split, TaskMixture

# A box takes about 35 tokens, nothing else more than 10.
GENERATION = {"do_sample": False, "max_new_tokens": 48}
# Their six lengths make six rows of the table.
NUMBERS_FACTOR = 3


def answer(
    model: InternVLChatModel, processor: InternVLProcessor, samples: Sequence[Sample], batch_size: int = 64
) -> list[str]:
    """Greedy answers to the first question of each sample, in order; pictures of like size share a batch."""
    was_training = model.training
    model.eval()
    order = sorted(range(len(samples)), key=lambda i: _tiles(processor, samples[i]))
    answers = [""] * len(samples)
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        for place, text in zip(places, _answer_batch(model, processor, [samples[i] for i in places]), strict=True):
            answers[place] = text
    model.train(was_training)
    return answers


def _tiles(processor: InternVLProcessor, sample: Sample) -> int:
    return 0 if sample.image is None else processor.image_processor.num_tiles(*sample.image.size)


def _answer_batch(model: InternVLChatModel, processor: InternVLProcessor, samples: Sequence[Sample]) -> list[str]:
    images = [sample.image for sample in samples if sample.image is not None]
    pixel_values = processor.image_processor(images)["pixel_values"] if images else None
    marks = ["" if sample.image is None else f"{IMAGE_PLACEHOLDER}\n" for sample in samples]
    questions = [mark + sample.turns[0].question for mark, sample in zip(marks, samples, strict=True)]
    patches = [[] if sample.image is None else [_tiles(processor, sample)] for sample in samples]
    return model.batch_chat(processor.tokenizer, pixel_values, questions, GENERATION, num_patches_list=patches)


def mark(model: InternVLChatModel, processor: InternVLProcessor, samples: Sequence[Sample]) -> list[Row]:
    """Marks of the answers to each sample's first question."""
    answers = answer(model, processor, samples)
    return [make_row(sample.turns[0], text) for sample, text in zip(samples, answers, strict=True)]


def held_out(split: Split, per_task: int) -> Iterator[Sample]:
    """`per_task` single-question samples of every task, `NUMBERS_FACTOR` times as many numbers; always the same."""
    for task in TASKS:
        mixture = TaskMixture(split, seed=1, weights={task: 1.0}, turns=(1, 1))
        yield from (mixture[i] for i in range(per_task * (NUMBERS_FACTOR if task == "numbers" else 1)))


def load(folder: str | Path) -> tuple[InternVLChatModel, InternVLProcessor]:
    """Model and processor of a checkpoint folder without code; the auto classes would look for code in it."""
    model = InternVLChatModel.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = InternVLProcessor.from_model_config(model.config, tokenizer)
    processor.image_processor = InternVLImageProcessor.from_pretrained(folder)
    return model, processor


def evaluate(folder: str | Path, split: Split = "test", per_task: int = 400) -> dict[str, dict[str, Any]]:
    """The table of `metrics.aggregate` for the checkpoint in `folder`."""
    model, processor = load(folder)
    return aggregate(mark(model, processor, list(held_out(split, per_task))))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--split", default="test", choices=("val", "test"))
    parser.add_argument("--samples", type=int, default=400, help="questions per task")
    arguments = parser.parse_args()
    print(format_table(evaluate(arguments.checkpoint, arguments.split, arguments.samples)))


if __name__ == "__main__":
    main()
