"""Parameters of a prepared model: their groups for an optimiser, and how many of each part are trained.

Which of them are trained is decided by `tuning`; the optimiser itself is the Trainer's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn
from transformers import Trainer

from ..modeling_intern_vit import InternRMSNorm
from .arguments import InternVLTrainingArguments
from .parts import PARTS, part_of


class TrainableRow(NamedTuple):
    """Parameters of one part of a model: those that are trained, and all that its forward uses."""

    module: str
    trainable: int
    total: int


def parameter_groups(model: nn.Module, args: InternVLTrainingArguments) -> list[dict[str, Any]]:
    """Trained parameters in groups of one learning rate and one weight decay, each in exactly one.

    `vision_lr` and `mlp_lr` fall back to `learning_rate`. Decay is the Trainer's choice (no biases, no norms), and
    none either for the RMS norms of the 6B encoder, whose names (`norm1`) its patterns do not know.

    Args:
        model: From `prepare_for_tuning`.
        args: Learning rates and `weight_decay`.

    Returns:
        Groups for a torch optimiser, in the order in which their first parameter comes in the model.
    """
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # needs no trainer
    norms = {id(p) for module in model.modules() if isinstance(module, InternRMSNorm) for p in module.parameters()}
    rates = {"vision_model": args.vision_lr, "mlp1": args.mlp_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(part_of(name) or "")
            rate = args.learning_rate if rate is None else rate
            decay = args.weight_decay if name in decayed and id(parameter) not in norms else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def trainable_summary(model: nn.Module) -> list[TrainableRow]:
    """Parameters by part and in all, for a table.

    Tied weights count once, 4-bit weights by their real number, and of a part that is trained whole beside LoRA only
    the trained copy.
    """
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is None or ".original_module." in name:
            continue
        number = getattr(parameter, "ds_numel", 0) or parameter.numel()  # empty here under ZeRO-3
        if type(parameter).__name__ == "Params4bit":  # two to a byte
            number = parameter.numel() * 2 * parameter.element_size()
        counts[part][0] += number * parameter.requires_grad
        counts[part][1] += number
    rows = [TrainableRow(part, *counts[part]) for part in PARTS]
    return [*rows, TrainableRow("all", sum(row.trainable for row in rows), sum(row.total for row in rows))]
