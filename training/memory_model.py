"""One training step of a model of any size, measured without its weights: the real code on fake tensors.

`measure_step` builds the whole model on fake tensors, applies freezing and LoRA as training does (`tuning.py`), drops
layers that equal their neighbours, and runs forward and backward under `MemoryTrace`. How the result is divided among
devices, and what optimisers add, is in `estimate.py`. Nothing is loaded or computed.
"""

from __future__ import annotations

import contextlib
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
from ..modeling_intern_vit import InternDropPath
from ..modeling_internvl_chat import InternVLChatModel
from .memory_settings import DEEPSPEED, DTYPES, MIXED, RunSettings
from .memory_trace import GRADIENTS, TEMPORARY, AssumedData, CudaRules, MemoryTrace, QuantizedLinear
from .tuning import part_of, prepare_for_tuning

VISION, PROJECTOR, LANGUAGE, LOSS, INPUTS = "vision encoder", "projector", "language model", "loss", "inputs"
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
    stacks = {VISION: _shorten_vision(model), LANGUAGE: _shorten_language(model)}
    if settings.gradient_checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    with FakeTensorMode(allow_non_fake_inputs=True):
        # Both engines that shard compute in 16 bits and keep 32 for the update.
        _materialise(tuned, MIXED[settings.mixed_precision] if settings.sharded else None)
        memory.peak = _trace(model, tuned.train(), settings, stacks, _present_gradients(memory, settings), cuda)
    return memory


def _check_length(config: InternVLChatConfig, settings: RunSettings) -> None:
    visual = sum(config.tokens_per_tile(settings.tiles))
    if visual >= settings.tokens:
        raise ValueError(
            f"tokens={settings.tokens} cannot hold the {visual} visual tokens of tiles={settings.tiles} and any text: "
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
    sizes = [_sizes(layer) for layer in (*_vision_layers(model), *_decoder_layers(model))]
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


def _vision_layers(model: InternVLChatModel) -> nn.ModuleList:
    return model.vision_model.encoder.layers


def _decoder_layers(model: InternVLChatModel) -> nn.ModuleList:
    return model.language_model.get_decoder().layers


# ------------------------------------------------------------------------------------------------- fewer layers to run


def _shorten_vision(model: InternVLChatModel) -> list[int]:
    """Drops repeated encoder layers; the layer whose output is selected stays the same one."""
    layers, selected = _vision_layers(model), model.select_layer
    used = selected if selected >= 0 else len(layers) + 1 + selected
    kinds = [(_signature(layer), i < used) for i, layer in enumerate(layers)]
    kept, repeats = _representatives(kinds)
    if selected != -1:
        model.select_layer = sum(i < used for i in kept)
    _keep(layers, kept)
    return repeats


def _shorten_language(model: InternVLChatModel) -> list[int]:
    """Drops repeated decoder layers and their entries in the configuration."""
    layers, config = _decoder_layers(model), model.config.get_text_config()
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


# ------------------------------------------------------------------------------------------------------------- tracing


def _trace(
    model: InternVLChatModel,
    tuned: nn.Module,
    settings: RunSettings,
    stacks: dict[str, list[int]],
    present: int,
    cuda: bool,
) -> Counter[str]:
    """Runs forward and backward once; the highest point in bytes by purpose."""
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    trace = MemoryTrace(_gradient_scale(settings))
    trace.add(GRADIENTS, present)
    for value in (*tuned.parameters(), *tuned.buffers()):
        trace.ignore(value)
    for parameter in trained:
        if settings.gradient_accumulation_steps > 1:
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
            loss = model(**inputs, num_items_in_batch=torch.ones(())).loss
        trace.begin(TEMPORARY)
        # Given a tensor, backward would leave the rules behind, which what is computed again must follow too.
        torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss))
    return trace.finish()


def _mark_segments(model: InternVLChatModel, trace: MemoryTrace, stacks: dict[str, list[int]]) -> None:
    """Hooks that tell the trace which layer is running, forward and backward."""
    for part, layers in ((VISION, _vision_layers(model)), (LANGUAGE, _decoder_layers(model))):
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


def _present_gradients(memory: StepMemory, settings: RunSettings) -> int:
    """Bytes of gradients of earlier micro-batches, also of the layers that are not run."""
    if settings.gradient_accumulation_steps == 1:
        return 0
    scale, dtype = _gradient_scale(settings), MIXED[settings.mixed_precision] if settings.sharded else None
    trained = ((kind, number) for kind, number in memory.parameters.items() if kind.trained)
    return round(scale * sum(number * (dtype.itemsize if dtype else kind.itemsize) for kind, number in trained))


def _gradient_scale(settings: RunSettings) -> float:
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
    rows, length, tiles = settings.rows, settings.tokens, settings.rows * settings.tiles
    encoded, visual = max(tiles, 1), sum(config.tokens_per_tile(settings.tiles))
    names = ("input_ids", "labels", "position_ids" if settings.packing else "attention_mask")
    batch = {name: torch.empty(rows, length, dtype=torch.long) for name in names}
    batch["loss_weight"] = torch.empty(rows, length)
    batch["pixel_values"] = torch.empty(encoded, 3, config.image_size, config.image_size)
    batch["image_flags"] = torch.empty(encoded, dtype=torch.long)
    labels = min(settings.supervised or length, length - max(visual, 1))
    selected = {(rows, length - 1): rows * labels, (encoded,): tiles, (): rows * visual}
    return batch, selected
