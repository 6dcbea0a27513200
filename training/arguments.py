"""Settings of a training run: transformers' own and what InternVL adds."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from ..losses_internvl import LOSS_REDUCTIONS


@dataclass
class InternVLTrainingArguments(TrainingArguments):
    """Arguments of `InternVLTrainer`.

    Defaults that differ from the parent class: `remove_unused_columns=False` (the collator needs every column) and,
    from the original's recipes, `weight_decay=0.05`, `warmup_steps=0.03` (below 1: a share of all steps) and a cosine
    schedule.

    Args:
        loss_reduction: Weight of a label in a sample with x labels: `"token"` 1, `"sample"` 1/x, `"square"` x**-0.5
            (InternVL 2.5, arXiv 2412.05271).
        max_seq_length: Most tokens of a row, visual ones included; None for no limit.
        freeze_backbone: Do not train the vision encoder.
        freeze_llm: Do not train the language model.
        freeze_mlp: Do not train the projector.
        vision_lr: Learning rate of the vision encoder; None for `learning_rate`.
        mlp_lr: Learning rate of the projector; None for `learning_rate`.

    Raises:
        ValueError: a value that would make the loss inexact, or an unknown reduction.
    """

    loss_reduction: str = field(default="square", metadata={"help": "Label weights: token, sample or square."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Most tokens of a row."})
    freeze_backbone: bool = field(default=False, metadata={"help": "Do not train the vision encoder."})
    freeze_llm: bool = field(default=False, metadata={"help": "Do not train the language model."})
    freeze_mlp: bool = field(default=False, metadata={"help": "Do not train the projector."})
    vision_lr: float | None = field(default=None, metadata={"help": "Learning rate of the vision encoder."})
    mlp_lr: float | None = field(default=None, metadata={"help": "Learning rate of the projector."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay off: rows are not columns."})
    weight_decay: float = field(default=0.05, metadata={"help": "Weight decay."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps, or their share if below 1."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_reduction not in LOSS_REDUCTIONS:
            raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {self.loss_reduction!r}")
        if not self.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False would average over ranks instead of labels; leave it at True"
            )
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not supported: the model computes its own weighted loss")
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns=True would drop what the collator needs; leave it at False")
