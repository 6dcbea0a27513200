"""Frozen parts while others train: held in evaluation mode, and without a graph where nothing before them is trained.

Which parameters are frozen is decided by `tuning`; no `requires_grad` of a parameter is changed here.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..modeling_internvl_chat import InternVLChatModel
from .parts import PARTS, named_decoder_layers


def hold_frozen_in_eval(model: InternVLChatModel) -> None:
    """Holds everything that belongs to a frozen weight in evaluation mode.

    The layers of a frozen language model itself follow `train()`, only what is in them is held: gradients go through
    them to the projector, and transformers checkpoints layers in training mode only.
    """
    for part in PARTS:
        _hold_untrained(getattr(model, part), checkpointed=part == "language_model")


def _hold_untrained(module: nn.Module, checkpointed: bool, inside_frozen: bool = False) -> None:
    """Without parameters of its own (dropout), a module goes with the one that it is in."""
    parameters = list(module.parameters())
    frozen = not any(p.requires_grad for p in parameters) if parameters else inside_frozen
    layers = checkpointed and any(isinstance(m, GradientCheckpointingLayer) for m in module.modules())
    if frozen and not layers:
        module.eval()
        module.train = MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
    elif frozen or not _is_one_trained_thing(module):
        for child in module.children():
            _hold_untrained(child, checkpointed, frozen)


def _is_one_trained_thing(module: nn.Module) -> bool:
    """A layer or a projection, with adapters or trained itself: what is in it belongs together."""
    return isinstance(module, GradientCheckpointingLayer) or hasattr(module, "base_layer")


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train` of a frozen module."""
    return module


def cut_graph(model: InternVLChatModel, reentrant: bool) -> None:
    """Detaches the input of a tower's first layer where nothing before it is trained.

    Args:
        model: With its parameters frozen and its adapters added.
        reentrant: Layers are checkpointed in the way that needs an input with a gradient: the first trained one gets
            such an input.
    """
    vision = model.vision_model
    upstream = _trains(vision) or _trains(model.mlp1)
    if not _trains(vision.embeddings):
        _cut(list(vision.encoder.layers), reentrant)
    if not upstream and not _trains(model.get_input_embeddings()):
        _cut(list(named_decoder_layers(model).values()), reentrant)


def _cut(layers: list[nn.Module], reentrant: bool) -> None:
    first = next((i for i, layer in enumerate(layers) if _trains(layer)), None)
    layers[0].register_forward_pre_hook(_detach_input)
    if reentrant and first == 0:
        layers[0].register_forward_pre_hook(_require_input_gradient)
    elif reentrant and first is not None:
        # Not on the input of the trained layer: up to transformers 5.18 at least, its hooks run inside the checkpoint.
        layers[first - 1].register_forward_hook(_require_output_gradient)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _detach_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].detach(), *inputs[1:])


def _require_input_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _require_output_gradient(layer: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or output.requires_grad:
        return output
    return output.detach().requires_grad_()


def release(model: nn.Module) -> None:
    """Undoes what holds modules in evaluation mode and cuts the graph."""
    for module in model.modules():
        if getattr(module.__dict__.get("train"), "__func__", None) is _stay_in_eval:
            del module.train
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if hook in (_detach_input, _require_input_gradient, _require_output_gradient):
                    del hooks[key]
    model.train(model.training)
