"""Forward and backward of one micro-batch on fake tensors, as `MemoryTrace` sees them.

The batch has the shapes that the collator gives it, and values are assumed (`AssumedData`). The optimiser's part of a
step is in `estimate.py`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..configuration_internvl_chat import InternVLChatConfig
from ..modeling_internvl_chat import InternVLChatModel
from .memory_fakes import AssumedData, CudaRules
from .memory_layers import decoder_layers, vision_layers
from .memory_settings import DEEPSPEED, MIXED, RunSettings
from .memory_trace import GRADIENTS, TEMPORARY, MemoryTrace

VISION, PROJECTOR, LANGUAGE, LOSS, INPUTS = "vision encoder", "projector", "language model", "loss", "inputs"


def trace_step(
    model: InternVLChatModel,
    tuned: nn.Module,
    settings: RunSettings,
    stacks: dict[str, list[int]],
    present: int,
    cuda: bool,
) -> Counter[str]:
    """Runs forward and backward once, inside a `FakeTensorMode`.

    Args:
        model: With repeated layers dropped.
        tuned: The model, or the `PeftModel` around it.
        settings: The run.
        stacks: For each part that has layers, how many of the whole model's every layer left stands for.
        present: Bytes of gradients that are there before.
        cuda: Follow CUDA's rules for casts and dropout instead of the CPU's.

    Returns:
        The highest point, in bytes by purpose.
    """
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    trace = MemoryTrace(gradient_scale(settings))
    trace.add(GRADIENTS, present)
    for value in (*tuned.parameters(), *tuned.buffers()):
        trace.ignore(value)
    for parameter in trained:
        if settings.keeps_gradients:
            parameter.grad = torch.empty_like(parameter)
            trace.ignore(parameter.grad)
        parameter.register_post_accumulate_grad_hook(trace.gradient)
    _mark_segments(model, trace, stacks)
    batch, rows = _batch(model.config, settings)
    for value in batch.values():
        trace.track(value, INPUTS)
    inputs = dict(batch)
    if not settings.padded:  # transformers drops a mask of ones, but cannot look into this one
        del inputs["attention_mask"]
    rules = CudaRules() if cuda else contextlib.nullcontext()
    with AssumedData(rows, rows[()]), rules, trace:
        trace.begin(LANGUAGE)
        with _autocast(settings):
            loss = _loss(model, inputs, settings)
        trace.begin(TEMPORARY)
        # Given a tensor, backward would leave the rules behind, which what is computed again must follow too.
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss))
    return trace.finish()


def _loss(model: InternVLChatModel, inputs: dict[str, Any], settings: RunSettings) -> torch.Tensor:
    """Of pairs, a sum of what `MPOTrainer` makes its loss of: nothing in it is larger than a number for a label."""
    if not settings.pairs:
        return model(**inputs, num_items_in_batch=torch.ones(())).loss
    read = {name: value for name, value in inputs.items() if name != "loss_weight"}
    return model(**read, output_log_probs=True).log_probs.sum()


def _mark_segments(model: InternVLChatModel, trace: MemoryTrace, stacks: dict[str, list[int]]) -> None:
    """Hooks that tell the trace which layer is running, forward and backward."""
    for part, layers in ((VISION, vision_layers(model)), (LANGUAGE, decoder_layers(model))):
        for layer, repeats in zip(layers, stacks[part], strict=True):
            _mark_layer(layer, trace, part, repeats)
    model.vision_model.register_forward_pre_hook(lambda *_: trace.begin(VISION))
    model.vision_model.register_forward_hook(lambda *_: trace.begin(PROJECTOR))
    model.mlp1.register_forward_hook(lambda *_: trace.begin(LANGUAGE))
    model.language_model.get_decoder().register_forward_hook(lambda *_: trace.begin(LOSS))


def _mark_layer(layer: nn.Module, trace: MemoryTrace, part: str, repeats: int) -> None:
    def before(*_: Any) -> None:
        trace.begin(part, part, repeats)

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        if states.requires_grad:  # called when the gradient of the output is there, just before the layer's backward
            states.register_hook(lambda _: trace.begin(TEMPORARY, part, repeats))

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def _autocast(settings: RunSettings) -> Any:
    """Autocast as accelerate wraps the model's forward in; DeepSpeed has none."""
    if settings.mixed_precision is None or settings.kind in DEEPSPEED:
        return contextlib.nullcontext()
    return torch.autocast("cpu", dtype=MIXED[settings.mixed_precision])


def gradient_scale(settings: RunSettings) -> float:
    """Bytes of a gradient that a device keeps, per byte that the backward pass makes."""
    if settings.kind in ("zero2", "zero3"):
        return 1 / settings.devices
    if settings.kind == "fsdp":  # in the precision of the stored weights: float32 with mixed precision
        return (2 if settings.mixed_precision is not None else 1) / settings.devices
    return 1.0


def _batch(
    config: InternVLChatConfig, settings: RunSettings
) -> tuple[dict[str, torch.Tensor], dict[tuple[int, ...], int]]:
    """Inputs as the collator makes them, and what `AssumedData` needs to know of them."""
    rows, length, tiles = settings.sequences, settings.tokens, settings.rows * settings.tiles
    encoded, visual = max(tiles, 1), sum(config.tokens_per_tile(settings.places))
    names = ("input_ids", "labels", "position_ids" if settings.packing else "attention_mask")
    batch = {name: torch.empty(rows, length, dtype=torch.long) for name in names}
    batch["loss_weight"] = torch.empty(rows, length)
    batch["pixel_values"] = torch.empty(encoded, 3, config.image_size, config.image_size)
    if settings.pairs:
        batch["tile_index"] = torch.empty(2 * tiles, dtype=torch.long)
    else:
        batch["image_flags"] = torch.empty(encoded, dtype=torch.long)
    labels = min(settings.supervised or length, length - max(visual, 1))
    selected = {(rows, length - 1): rows * labels, (encoded,): tiles, (): rows * visual}
    return batch, selected
