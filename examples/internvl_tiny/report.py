"""What a run of InternVL-tiny leaves for readers: the curve and the model card, from measured numbers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...training import report
from .metrics import format_table

_CURVES = {
    "numbers": "numbers", "words": "words", "color": "colour", "shape": "shape", "count": "count",
    "pointing": "pointing (IoU at least 0.5)",
}  # fmt: skip


def write_curve(path: Path, history: list[dict[str, Any]]) -> None:
    """Training loss and held-out accuracies over the steps, as a picture; see `training.report.write_curve`."""
    metrics = {f"held_out_{task}": label for task, label in _CURVES.items()}
    report.write_curve(path, history, metrics, title="Held-out (val) accuracy", limits=(0, 1.02))


_CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
language: [en, zh]
tags: [internvl, tiny]
---

# InternVL-tiny

An InternVL-Chat model of {parameters:.2f} million parameters ({megabytes:.1f} MB), trained from nothing on CPUs.
It reads strings of handwritten digits and printed words, names and counts coloured shapes and points at them, in
English and Chinese. It exists to run the whole of InternVL (dynamic tiling, thumbnail, pixel shuffle, chat template,
boxes) in seconds; it knows nothing beyond these tasks.

## Training

Recipe: `recipes/internvl_tiny.yaml`. {steps} steps of {batch_size} conversations, {samples:,} in all, each drawn
once; {hours} on {ranks} process(es) of {threads} CPU thread(s). Digits are scans of the UCI handwritten digits
(scikit-learn), words are set in typefaces of matplotlib, shapes are drawn. Train, val and test share no digit scan and
no word.

![Loss and held-out accuracy](loss_curve.png)

## Results

Test split, single questions, greedy answers, exact match; pointing counts boxes with an IoU of at least 0.5. Wilson
intervals of 95 %.

{table}
## Limits

Pictures of 64-192 px like those it was trained on, questions in the phrasings of `examples/internvl_tiny/tasks.py`.
Boxes are rounded to 1 % of the picture.
"""


def write_card(path: Path, recipe: dict[str, Any], trainer: Any, table: dict[str, dict[str, Any]]) -> None:
    """Model card with the measured `table` of `metrics.aggregate`."""
    import torch

    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    seconds = next((e["train_runtime"] for e in reversed(trainer.state.log_history) if "train_runtime" in e), 0.0)
    text = _CARD.format(
        parameters=parameters / 1e6,
        megabytes=(path.parent / "model.safetensors").stat().st_size / 1e6,
        steps=trainer.state.global_step,
        batch_size=recipe["batch_size"],
        samples=trainer.state.global_step * recipe["batch_size"],
        hours=f"{seconds / 60:.0f} minutes",
        ranks=trainer.args.world_size,
        threads=torch.get_num_threads(),
        table=format_table(table),
    )
    path.write_text(text, encoding="utf-8")
