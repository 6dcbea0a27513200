"""`internvl estimate`: the memory that a training run will need on each device, before it runs.

`memory_model.py` measures one step of the real code on fake tensors; here that is divided among devices, optimiser
states and communication buffers are added, and what would help is estimated too. Not counted: fragmentation of the
allocator (PyTorch says "reserved" for it), and anything that other programs hold.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args, get_type_hints

from ..configuration_internvl_chat import InternVLChatConfig
from .memory_model import ADAPTERS, LANGUAGE, PROJECTOR, VISION, ParameterKind, StepMemory, measure_step
from .memory_settings import ATTENTION, DEEPSPEED, DTYPES, OPTIMIZERS, SHARDING, RunSettings
from .memory_trace import GRADIENTS

GIB = 2**30
# CUDA context, cuBLAS and NCCL: an assumption, it depends on GPU and driver.
OVERHEAD = 1 * GIB
# Above this share of the device, fragmentation decides whether a run fits.
TIGHT = 0.9
STATES, COMMUNICATION = "optimizer states", "communication"
# DeepSpeed's defaults, in elements: reduce_bucket_size, stage3_max_live_parameters, sub_group_size.
_BUCKET, _LIVE, _GROUP = 500_000_000, 1_000_000_000, 1_000_000_000
_STATES_PER_PARAMETER = {"sgd": 0}  # all others: two, Adam's moments
_FOREACH = ("adamw_torch", "sgd")  # on CUDA their update makes a tensor as large as all weights that it updates
_SINGLE, _OPTIMIZER_BLOCK = 4, 256


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the highest point of a step.

    Attributes:
        settings: The run.
        weights: By part of the model; `adapters` for LoRA.
        states: Optimiser states, in DeepSpeed with the float32 copy of the weights.
        gradients: At that point; those still to come are not there yet.
        activations: By part: what is kept for the backward pass, and the inputs.
        temporary: Of the layer at work, or of the optimiser.
        communication: Buckets, gathered weights.
        moment: `forward or backward`, or `optimizer step`.
        overhead: CUDA context and libraries, assumed.
    """

    settings: RunSettings
    weights: dict[str, int]
    states: int
    gradients: int
    activations: dict[str, int]
    temporary: int
    communication: int
    moment: str
    overhead: int = OVERHEAD

    @property
    def peak(self) -> int:
        """All tensors."""
        parts = (*self.weights.values(), self.states, self.gradients, *self.activations.values())
        return sum(parts) + self.temporary + self.communication

    @property
    def total(self) -> int:
        """All tensors and the overhead."""
        return self.peak + self.overhead

    def verdict(self, memory: int) -> str:
        """`fits`, `tight` (more than 90 %) or `does not fit` into `memory` bytes."""
        if self.total > memory:
            return "does not fit"
        return "tight" if self.total > TIGHT * memory else "fits"

    def rows(self) -> list[tuple[str, int]]:
        """The parts by name, those of no bytes left out."""
        named = [(f"weights, {part}", size) for part, size in self.weights.items()]
        named += [("gradients", self.gradients), (STATES, self.states)]
        named += [(f"activations, {part}", size) for part, size in self.activations.items()]
        named += [("temporary", self.temporary), (COMMUNICATION, self.communication)]
        return [row for row in named if row[1]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON, in bytes."""
        return {
            "parts": dict(self.rows()),
            "moment": self.moment,
            "peak": self.peak,
            "overhead": self.overhead,
            "total": self.total,
            "settings": dataclasses.asdict(self.settings),
        }


# ---------------------------------------------------------------------------------------------------------- estimating


def estimate(
    config: InternVLChatConfig, settings: RunSettings | None = None, overhead: int = OVERHEAD, cuda: bool = True
) -> MemoryEstimate:
    """The memory of a training step on each of `settings.devices` devices, from the second step on.

    Args:
        config: Of the whole model, for example `conversion.families.find("InternVL3-8B").config()`.
        settings: The run; None for the defaults of `RunSettings`.
        overhead: Bytes to add for what is no tensor.
        cuda: False for a step on the CPU, whose autocast and dropout keep other tensors.

    Raises:
        ValueError: settings that contradict each other or the model.
    """
    settings = RunSettings() if settings is None else settings
    step = measure_step(config, settings, cuda)
    weights, states = _weights(step, settings), _states(step, settings)
    gradients, temporary = _gradients(step, settings), _update(step, settings)
    common: dict[str, Any] = {
        "settings": settings, "weights": weights, "states": states, "overhead": overhead,
        "communication": _communication(step, settings),
    }  # fmt: skip
    if gradients + temporary > step.peak.total():
        parts: dict[str, Any] = {
            "gradients": gradients,
            "activations": {},
            "temporary": temporary,
            "moment": "optimizer step",
        }
    else:
        rest = dict(step.peak)
        parts = {
            "gradients": rest.pop(GRADIENTS, 0),
            "temporary": rest.pop("temporary", 0),
            "moment": "forward or backward",
        }
        parts["activations"] = {part: size for part, size in rest.items() if size}
    return MemoryEstimate(**common, **parts)


def _stored(kind: ParameterKind, settings: RunSettings) -> int:
    """Bytes of an element of the weights between steps."""
    if settings.mixed_precision is None or not kind.floating or not settings.sharded:
        return kind.itemsize
    if settings.kind in DEEPSPEED:
        return 2
    return _SINGLE if kind.trained else kind.itemsize  # accelerate makes trained weights float32 for FSDP


def _computed(settings: RunSettings) -> int:
    """Bytes of an element of gathered weights and of gradients on their way."""
    return 2 if settings.mixed_precision is not None else DTYPES[settings.dtype].itemsize


def _trained(step: StepMemory) -> Iterator[tuple[ParameterKind, int]]:
    return ((kind, number) for kind, number in step.parameters.items() if kind.trained)


def _weights(step: StepMemory, settings: RunSettings) -> dict[str, int]:
    share = settings.devices if settings.shards_weights else 1
    sizes: Counter[str] = Counter(step.buffers)
    for kind, number in step.parameters.items():
        sizes[kind.part] += -(-number * _stored(kind, settings) // share)
    return {part: sizes[part] for part in (VISION, PROJECTOR, LANGUAGE, ADAPTERS) if sizes[part]}


def _gradients(step: StepMemory, settings: RunSettings) -> int:
    """All of them, at the end of the backward pass."""
    share = settings.devices if settings.kind in ("zero2", "zero3", "fsdp") else 1
    return -(-sum(number * _stored(kind, settings) for kind, number in _trained(step)) // share)


def _states(step: StepMemory, settings: RunSettings) -> int:
    moments = _STATES_PER_PARAMETER.get(settings.optim, 2)
    if settings.kind in DEEPSPEED:  # a float32 copy and float32 moments (ZeRO, arXiv 1910.02054, section 3.1)
        number = sum(number for _, number in _trained(step))
        return -(-number * _SINGLE * (1 + moments) // settings.devices)
    if "8bit" in settings.optim:
        return sum(_eight_bit(kind, number) for kind, number in _trained(step))
    share = settings.devices if settings.sharded else 1
    return -(-sum(moments * number * _stored(kind, settings) for kind, number in _trained(step)) // share)


def _eight_bit(kind: ParameterKind, number: int) -> int:
    """Two moments of a byte each, and for every 256 of them a float32 scale; small tensors and embeddings float32."""
    return 2 * _SINGLE * number if kind.wide_states else 2 * (number + _SINGLE * -(-number // _OPTIMIZER_BLOCK))


def _update(step: StepMemory, settings: RunSettings) -> int:
    """What the optimiser makes and drops while it updates."""
    share = settings.devices if settings.sharded else 1
    if settings.kind in DEEPSPEED:  # the gradients of its share in float32; in stage 3 a group at a time
        number = -(-sum(number for _, number in _trained(step)) // share)
        return _SINGLE * (min(number, _GROUP) if settings.kind == "zero3" else number)
    if settings.optim not in _FOREACH:
        return 0
    return -(-sum(number * _stored(kind, settings) for kind, number in _trained(step)) // share)


def _communication(step: StepMemory, settings: RunSettings) -> int:
    """Buffers that engines hold while a step runs; see docs/memory.md for what each stands for."""
    size, trained = _computed(settings), sum(number for _, number in _trained(step))
    total = sum(number for kind, number in step.parameters.items() if kind.floating)
    if settings.kind == "ddp":  # buckets are a copy of all gradients (gradient_as_bucket_view is off by default)
        return sum(number * kind.itemsize for kind, number in _trained(step))
    if settings.kind == "fsdp":  # two layers and all that is in none, gathered; their gradients before they are cut
        gathered = step.root + 2 * step.layer
        return size * (gathered + step.trained_root + 2 * step.trained_layer)
    buckets = 2 * min(_BUCKET, trained) * size if settings.kind in DEEPSPEED else 0
    gathered = max(min(_LIVE, total), step.layer) * size if settings.kind == "zero3" else 0
    return buckets + gathered


# --------------------------------------------------------------------------------------------------------- suggestions


def suggestions(
    config: InternVLChatConfig, settings: RunSettings, overhead: int = OVERHEAD
) -> list[tuple[str, MemoryEstimate]]:
    """Changes that take less memory, those that change the least about the run first, each with its estimate."""
    before = estimate(config, settings, overhead).total
    found, seen = [], {settings}
    for label, changes in _changes(config, settings):
        try:
            changed = replace(settings, **changes)
            if changed in seen:
                continue
            seen.add(changed)
            result = estimate(config, changed, overhead)
        except ValueError:  # this model or these settings do not allow it
            continue
        if result.total < before:
            found.append((label, result))
    return found


def _changes(config: InternVLChatConfig, settings: RunSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    lora = _lora(config, settings)
    small: dict[str, Any] = {"gradient_checkpointing": True, "attn_implementation": settings.attn_implementation}
    if not settings.gradient_checkpointing:
        yield "gradient checkpointing", {"gradient_checkpointing": True}
    if settings.packing or settings.rows > 1:
        small["attn_implementation"] = "flash_attention_2"
        yield "flash attention, which needs no mask", {"attn_implementation": "flash_attention_2"}
    if settings.rows > 1:
        small |= {"per_device_train_batch_size": 1}
        steps = settings.gradient_accumulation_steps * settings.rows
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield f"one row at a time, {steps} accumulation steps", changes
    yield from _sharded(settings)
    if not settings.sharded and settings.optim.startswith("adamw_torch"):
        yield "optim adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}
    if settings.tiles > 1:
        tiles = settings.tiles // 2
        tokens = settings.tokens - sum(config.tokens_per_tile(settings.tiles - tiles))
        yield f"{tiles} tiles, {tokens} tokens", {"tiles": tiles, "tokens": tokens, "supervised": None}
    frozen = {"freeze_backbone": True, "unfreeze_vit_layers": None, "use_backbone_lora": 0}
    yield "frozen vision encoder", frozen
    rank = lora["use_llm_lora"]
    yield f"LoRA of rank {rank} on the language model alone", lora
    if not settings.shards_weights:
        yield f"QLoRA: the same, rank {rank}, over nf4 weights", {**lora, "quantization": "nf4"}
        yield "QLoRA, checkpointing, one row at a time", {**small, **lora, "quantization": "nf4"}


def _sharded(settings: RunSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    devices = settings.devices if settings.devices > 1 else 8
    more = "" if settings.devices > 1 else f" on {devices} devices"
    if settings.quantization is None and "8bit" not in settings.optim:
        for kind in ("zero1", "zero2", "zero3"):
            yield f"{kind}{more}", {"sharding": kind, "devices": devices}


def _lora(config: InternVLChatConfig, settings: RunSettings) -> dict[str, Any]:
    """As in the recipes of the second fine-tune."""
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    changes = {
        "freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True, "unfreeze_vit_layers": None,
        "use_backbone_lora": 0, "use_mlp_lora": 0, "use_llm_lora": settings.use_llm_lora or 16,
    }  # fmt: skip
    return {**changes, "lora_dropout": 0.0} if experts else changes


# -------------------------------------------------------------------------------------------------------- command line

_CHOICES: dict[str, Sequence[Any]] = {
    "dtype": tuple(DTYPES), "mixed_precision": ("bf16", "fp16", "none"), "optim": OPTIMIZERS, "sharding": SHARDING,
    "attn_implementation": ATTENTION[1:], "quantization": ("nf4", "int8", "none"),
}  # fmt: skip
_HELP = {
    "tokens": "tokens of a row or pack, visual ones included",
    "tiles": "tiles of a row or pack; 0 for text alone",
    "per_device_train_batch_size": "rows of a micro-batch",
    "packing": "the row is a pack of several",
    "supervised": "tokens of a row that have a label (default: all that are not visual)",
    "dtype": "of the weights in memory",
    "mixed_precision": "as bf16 and fp16 of a recipe",
    "gradient_checkpointing": "keep only the inputs of layers for the backward pass",
    "gradient_accumulation_steps": "above 1, gradients are there all the time",
    "attn_implementation": "as in a recipe (default: the model's own choice)",
    "quantization": "of the frozen language model",
    "optim": "as in a recipe",
    "devices": "data-parallel devices",
    "sharding": "DeepSpeed's stages or FSDP 2 (default on several devices: ddp)",
    "freeze_backbone": "do not train the vision encoder",
    "freeze_llm": "do not train the language model",
    "freeze_mlp": "do not train the projector",
    "unfreeze_vit_layers": "of a frozen vision encoder, train the layers from this one on; -8: the last 8",
    "unfreeze_lm_head": "train the output head of a frozen language model",
    "use_backbone_lora": "rank of LoRA on the vision encoder",
    "use_llm_lora": "rank of LoRA on the language model",
    "use_mlp_lora": "rank of LoRA on the projector",
    "lora_alpha": "has no influence on memory",
    "lora_dropout": "0 saves the masks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `internvl estimate`: what to estimate, and every field of `RunSettings`."""
    parser.add_argument("source", help="release, checkpoint folder, Hub repository or recipe")
    parser.add_argument("--model", help="for a recipe: the release or folder to take instead of the recipe's model")
    parser.add_argument("--memory", type=float, metavar="GIB", help="memory of a device: says whether the run fits")
    parser.add_argument(
        "--overhead", type=float, metavar="GIB", default=OVERHEAD / GIB,
        help="CUDA context and libraries, an assumption (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    hints = get_type_hints(RunSettings)
    for setting in dataclasses.fields(RunSettings):
        _add_setting(parser, setting.name, hints[setting.name])


def _add_setting(parser: argparse.ArgumentParser, name: str, hint: Any) -> None:
    flags = [f"--{name.replace('_', '-')}"] + ["--batch-size"] * (name == "per_device_train_batch_size")
    options: dict[str, Any] = {"dest": name, "default": None, "help": _HELP[name]}
    kind = next(k for k in (get_args(hint) or (hint,)) if k is not types.NoneType)
    if kind is bool:
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
    elif name in _CHOICES:
        parser.add_argument(*flags, choices=_CHOICES[name], **options)
    else:
        parser.add_argument(*flags, type=kind, metavar=kind.__name__.upper(), **options)


def run(options: argparse.Namespace) -> int:
    """Prints the estimate that `options` ask for; 0, or 1 if it does not fit into `--memory`.

    Raises:
        ValueError: unknown names, or settings that contradict each other.
    """
    if options.memory is not None and not options.memory > 0:
        raise ValueError(f"--memory must be above 0 GiB, got {options.memory:g}")
    if options.overhead < 0:
        raise ValueError(f"--overhead must not be negative, got {options.overhead:g}")
    from .memory_sources import resolve

    names = [field.name for field in dataclasses.fields(RunSettings)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    for name in ("mixed_precision", "quantization"):
        if given.get(name) == "none":
            given[name] = None
    config, settings = resolve(options.source, options.model, **given)
    memory = None if options.memory is None else round(options.memory * GIB)
    result = estimate(config, settings, round(options.overhead * GIB))
    fits = memory is None or result.total <= memory
    found = [] if fits else suggestions(config, settings, result.overhead)
    if options.json:
        print(json.dumps(_as_json(result, memory, found), indent=2))
    else:
        print(_table(options.source, result, memory))
        if found and memory is not None:
            print(_suggestions_table(found, memory))
    return 0 if fits else 1


def _as_json(result: MemoryEstimate, memory: int | None, found: list[tuple[str, MemoryEstimate]]) -> dict[str, Any]:
    content = result.to_dict()
    if memory is not None:
        content |= {"memory": memory, "verdict": result.verdict(memory)}
        content["suggestions"] = [{"change": label, **other.to_dict()} for label, other in found]
    return content


def _table(source: str, result: MemoryEstimate, memory: int | None) -> str:
    settings = result.settings
    place = f"each of {settings.devices} devices, {settings.kind}" if settings.devices > 1 else "one device"
    rows = f"{settings.rows} x " if settings.rows > 1 else ""
    lines = [
        f"{source} on {place}: {rows}{settings.tokens} tokens, {settings.tiles} tiles, {settings.dtype} weights, "
        f"mixed precision {settings.mixed_precision or 'off'}, checkpointing "
        f"{'on' if settings.gradient_checkpointing else 'off'}, {settings.optim}",
        "",
    ]
    lines += [_line(label, size) for label, size in result.rows()]
    lines += ["", _line(f"tensors, at most (in the {result.moment})", result.peak)]
    lines += [_line("overhead (assumed)", result.overhead), _line("total", result.total)]
    if memory is not None:
        lines += ["", f"{result.verdict(memory)}: {memory / GIB:g} GiB a device"]
    return "\n".join(lines)


def _line(label: str, size: int, more: str = "") -> str:
    return f"{label:<44}{size / GIB:>10.2f} GiB{more}"


def _suggestions_table(found: list[tuple[str, MemoryEstimate]], memory: int) -> str:
    lines = ["", "What would help, each by itself:"]
    lines += [_line(label, result.total, f"  {result.verdict(memory)}") for label, result in found]
    return "\n".join(lines)
