"""One training step of a model of any size, measured without its weights: the real code on fake tensors.

`measure_step` builds the whole model on fake tensors, applies freezing and LoRA as training does (`tuning.py`), drops
layers that equal their neighbours, and runs forward and backward under `MemoryTrace`. How the result is divided among
devices, and what optimisers add, is in `estimate.py`. Nothing is loaded or computed.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..configuration_internvl_chat import InternVLChatConfig
from ..modeling_internvl_chat import InternVLChatModel
from .memory_fakes import QuantizedLinear
from .memory_layers import decoder_layers, shorten_language, shorten_vision, vision_layers
from .memory_settings import DTYPES, MIXED, RunSettings
from .memory_step import LANGUAGE, PROJECTOR, VISION, gradient_scale, trace_step
from .parts import part_of
from .tuning import prepare_for_tuning

ADAPTERS = "adapters"
PARTS = {"vision_model": VISION, "mlp1": PROJECTOR, "language_model": LANGUAGE}
_UNMASKED = "estimate_unmasked"


class ParameterKind(NamedTuple):
    """What parameters have in common that are counted together.

    Attributes:
        part: `vision encoder`, `projector`, `language model` or `adapters`.
        trained: Whether they are.
        itemsize: Bytes of an element as stored without sharding.
        floating: False for quantized weights.
        wide_states: Whether 8-bit optimisers keep their states in 32 bits (embeddings, fewer than 4096 elements).
    """

    part: str
    trained: bool
    itemsize: int
    floating: bool
    wide_states: bool


@dataclass
class StepMemory:
    """What one step takes.

    Attributes:
        parameters: Elements by kind.
        buffers: Bytes by part, quantization constants among them.
        layer: Elements of the largest layer.
        root: Elements that belong to no layer: embeddings, output head, projector.
        trained_layer, trained_root: The trained ones among them.
        peak: Bytes by purpose at the highest point of forward and backward, weights and optimiser states left out:
            gradients, what each part keeps for the backward pass, temporary.
    """

    parameters: Counter[ParameterKind] = field(default_factory=Counter)
    buffers: Counter[str] = field(default_factory=Counter)
    layer: int = 0
    root: int = 0
    trained_layer: int = 0
    trained_root: int = 0
    peak: Counter[str] = field(default_factory=Counter)


def measure_step(config: InternVLChatConfig, settings: RunSettings, cuda: bool = True) -> StepMemory:
    """Measures a step on one device.

    Args:
        config: Of the whole model; not changed.
        settings: The run.
        cuda: Follow CUDA's rules for casts and dropout instead of the CPU's.

    Raises:
        ValueError: the visual tokens do not fit into `tokens`, or settings that training would refuse.
    """
    _check_length(config, settings)
    with torch.device("meta"):
        model = _build(config, settings)
        tuned = prepare_for_tuning(model, settings)  # type: ignore[arg-type]  # reads the fields of the same names
    memory = _count(tuned, model)
    stacks = {VISION: shorten_vision(model), LANGUAGE: shorten_language(model)}
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Both engines that shard compute in 16 bits and keep 32 for the update.
        _materialise(tuned, MIXED[settings.mixed_precision] if settings.sharded else None)
        memory.peak = trace_step(model, tuned.train(), settings, stacks, _present_gradients(memory, settings), cuda)
    return memory


def _check_length(config: InternVLChatConfig, settings: RunSettings) -> None:
    visual = sum(config.tokens_per_tile(settings.places))
    if visual >= settings.tokens:
        raise ValueError(
            f"tokens={settings.tokens} cannot hold the {visual} visual tokens of tiles={settings.tiles} and any text"
            f"{' (in a pack of pairs each tile stands twice)' if settings.places > settings.tiles else ''}: "
            "raise tokens or take fewer tiles"
        )


# ------------------------------------------------------------------------------------------------------------ building


def _build(config: InternVLChatConfig, settings: RunSettings) -> InternVLChatModel:
    config = copy.deepcopy(config)  # building one writes into its configuration
    if config.img_context_token_id is None:
        config.img_context_token_id = 0
    flash = settings.attn_implementation == "flash_attention_2"
    attention = None if flash else settings.attn_implementation  # flash attention cannot be built everywhere
    model = InternVLChatModel._from_config(config, attn_implementation=attention, dtype=DTYPES[settings.dtype])
    text = model.config.get_text_config()
    if flash or (text._attn_implementation == "sdpa" and not settings.padded):
        _register_unmasked()
        text._attn_implementation = _UNMASKED
    if settings.quantization is not None:
        _quantize(model, settings.quantization)
    return model


def _register_unmasked() -> None:
    """An attention without a mask, as flash attention is, and sdpa for rows without padding.

    Under plain sdpa, transformers makes a mask for fake tensors in any case, since it cannot look at their values.
    """
    ALL_ATTENTION_FUNCTIONS.register(_UNMASKED, ALL_ATTENTION_FUNCTIONS["sdpa"])
    ALL_MASK_ATTENTION_FUNCTIONS.register(_UNMASKED, lambda *args, **kwargs: None)


def _quantize(model: InternVLChatModel, kind: str) -> None:
    """All linear layers of the language model but its head, as transformers' bitsandbytes integration does."""
    head = model.get_output_embeddings()
    for module in list(model.language_model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child is not head:
                setattr(module, name, QuantizedLinear(child, kind, torch.bfloat16))


def _count(tuned: nn.Module, model: InternVLChatModel) -> StepMemory:
    memory = StepMemory()
    embeddings = {id(module.weight) for module in tuned.modules() if isinstance(module, nn.Embedding)}
    for name, value in tuned.named_parameters():
        part = ADAPTERS if "lora_" in name else _part(name)
        wide = id(value) in embeddings or value.numel() < 4096
        kind = ParameterKind(part, value.requires_grad, value.element_size(), value.is_floating_point(), wide)
        memory.parameters[kind] += value.numel()
    for name, buffer in tuned.named_buffers():
        memory.buffers[_part(name)] += buffer.numel() * buffer.element_size()
    sizes = [_sizes(layer) for layer in (*vision_layers(model), *decoder_layers(model))]
    total = _sizes(tuned)
    memory.layer, memory.trained_layer = (max(column) for column in zip(*sizes, strict=True))
    memory.root, memory.trained_root = (t - sum(c) for t, c in zip(total, zip(*sizes, strict=True), strict=True))
    return memory


def _part(name: str) -> str:
    return PARTS[str(part_of(name))]


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Elements of a module's parameters: all, and the trained ones."""
    values = list(module.parameters())
    return sum(v.numel() for v in values), sum(v.numel() for v in values if v.requires_grad)


def _materialise(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Replaces tensors on the meta device by those of the mode that is active, floating ones in `dtype` if given."""
    made: dict[int, Any] = {}

    def fresh(value: torch.Tensor) -> Any:
        if id(value) not in made:  # tied weights stay tied
            wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
            empty = torch.empty_like(value, dtype=wanted, device="cpu")
            is_parameter = isinstance(value, nn.Parameter)
            made[id(value)] = nn.Parameter(empty, value.requires_grad) if is_parameter else empty
        return made[id(value)]

    for child in module.modules():
        for tensors in (child._parameters, child._buffers):
            tensors.update({name: fresh(value) for name, value in tensors.items() if value is not None})


def _present_gradients(memory: StepMemory, settings: RunSettings) -> int:
    """Bytes of gradients that are there before the step, also of the layers that are not run."""
    if not settings.keeps_gradients:
        return 0
    scale, dtype = gradient_scale(settings), MIXED[settings.mixed_precision] if settings.sharded else None
    trained = ((kind, number) for kind, number in memory.parameters.items() if kind.trained)
    return round(scale * sum(number * (dtype.itemsize if dtype else kind.itemsize) for kind, number in trained))
