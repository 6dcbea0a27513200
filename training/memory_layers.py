"""Fewer layers to run: equal ones are run three times and counted as often as the model has them.

Layers are equal if their weights, modes and drop path take equal memory. What is dropped here is counted again by
`MemoryTrace`, to which every kept layer's number of repeats is told.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from ..modeling_intern_vit import InternDropPath
from ..modeling_internvl_chat import InternVLChatModel


def vision_layers(model: InternVLChatModel) -> nn.ModuleList:
    """The encoder's layers, first to last."""
    encoder: Any = model.vision_model.encoder
    return encoder.layers


def decoder_layers(model: InternVLChatModel) -> nn.ModuleList:
    """The language model's layers, first to last."""
    return model.language_model.get_decoder().layers


def shorten_vision(model: InternVLChatModel) -> list[int]:
    """Drops repeated encoder layers; the layer whose output is selected stays the same one."""
    layers, selected = vision_layers(model), model.select_layer
    used = selected if selected >= 0 else len(layers) + 1 + selected
    kinds = [(_signature(layer), i < used) for i, layer in enumerate(layers)]
    kept, repeats = _representatives(kinds)
    if selected != -1:
        model.select_layer = sum(i < used for i in kept)
    _keep(layers, kept)
    return repeats


def shorten_language(model: InternVLChatModel) -> list[int]:
    """Drops repeated decoder layers and their entries in the configuration."""
    layers, config = decoder_layers(model), model.config.get_text_config()
    types = getattr(config, "layer_types", None)
    kinds = [(_signature(layer), types[i] if types else None) for i, layer in enumerate(layers)]
    kept, repeats = _representatives(kinds)
    _keep(layers, kept)
    config.num_hidden_layers = len(kept)
    if types:
        config.layer_types = [types[i] for i in kept]
    return repeats


def _signature(layer: nn.Module) -> Any:
    """Equal for layers that take equal memory."""
    values = tuple((n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in layer.named_parameters())
    modes = tuple(module.training for module in layer.modules())
    drops = tuple(module.rate > 0 for module in layer.modules() if isinstance(module, InternDropPath))
    return type(layer), values, modes, drops


def _representatives(kinds: list[Any]) -> tuple[list[int], list[int]]:
    """Which layers to run, and for how many each stands: the first, one inner and the last one of a run of equals."""
    kept: list[int] = []
    repeats: list[int] = []
    first = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[first]:
            count = i - first
            chosen = range(first, i) if count <= 3 else (first, first + 1, i - 1)
            kept += chosen
            repeats += [1] * count if count <= 3 else [1, count - 2, 1]
            first = i
    return kept, repeats


def _keep(layers: nn.ModuleList, kept: list[int]) -> None:
    for i in reversed(range(len(layers))):
        if i not in kept:
            del layers[i]
