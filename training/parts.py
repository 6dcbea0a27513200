"""The three parts of a model by name, which freezing, LoRA, learning rates and summaries all go by.

Only names are read off a model here; nothing is changed.
"""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling_internvl_chat import InternVLChatModel

PARTS = ("vision_model", "mlp1", "language_model")


def part_of(name: str) -> str | None:
    """The part of the model that a parameter belongs to, by its name, also inside a `PeftModel`; None for others."""
    first = name.removeprefix("base_model.model.").partition(".")[0]
    return first if first in PARTS else None


def named_decoder_layers(model: InternVLChatModel) -> dict[str, nn.Module]:
    """The decoder layers of the language model by full name, first to last.

    Raises:
        ValueError: none of its modules is a layer that transformers could checkpoint.
    """
    modules = model.language_model.named_modules()
    found: dict[str, nn.Module] = {
        f"language_model.{name}": m for name, m in modules if isinstance(m, GradientCheckpointingLayer)
    }
    if not found:
        raise ValueError(f"{type(model.language_model).__name__} has no layers that transformers could checkpoint")
    return found
