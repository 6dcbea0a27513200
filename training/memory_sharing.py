"""What each device holds of weights, gradients and optimiser states, and the buffers of those who divide them.

These are formulas, unlike the rest of the estimate. ZeRO's follow DeepSpeed's code (`deepspeed/runtime/zero`:
`stage_1_and_2.py`, `stage3.py`) with the sizes of the configurations in `recipes/deepspeed`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from .memory_model import ADAPTERS, LANGUAGE, PROJECTOR, VISION, ParameterKind, StepMemory
from .memory_settings import DEEPSPEED, DTYPES, RunSettings
from .recipes import RECIPES

REFERENCE = "reference"
_STATES_PER_PARAMETER = {"sgd": 0}  # all others: two, Adam's moments
_FOREACH = ("adamw_torch", "sgd")  # on CUDA their update makes a tensor as large as all weights that it updates
_SINGLE, _OPTIMIZER_BLOCK = 4, 256


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


def weights(step: StepMemory, settings: RunSettings) -> dict[str, int]:
    """Bytes by part, buffers included."""
    share = settings.devices if settings.shards_weights else 1
    sizes: Counter[str] = Counter(step.buffers)
    for kind, number in step.parameters.items():
        sizes[kind.part] += -(-number * _stored(kind, settings) // share)
    sizes[REFERENCE] = reference(step, settings)
    return {part: sizes[part] for part in (VISION, PROJECTOR, LANGUAGE, ADAPTERS, REFERENCE) if sizes[part]}


def reference(step: StepMemory, settings: RunSettings) -> int:
    """Bytes of the reference model's own weights; it has no gradients and no states.

    A copy shares what is not trained with the model. Where DeepSpeed or FSDP wrap it nothing can be shared: ZeRO-3 and
    FSDP divide it as they do the model, ZeRO-1 and 2 leave it whole (TRL's `prepare_deepspeed` and `prepare_fsdp`).
    """
    if settings.reference is None:
        return 0
    shared = settings.reference == "copy" and not settings.sharded
    kinds = (pair for pair in step.parameters.items() if pair[0].part != ADAPTERS)
    size = sum(number * _frozen(kind, settings) for kind, number in kinds if kind.trained or not shared)
    share = settings.devices if settings.shards_weights else 1
    return -(-size // share) + sum(step.buffers.values())


def _frozen(kind: ParameterKind, settings: RunSettings) -> int:
    """Bytes of an element of a model that is only run."""
    return 2 if settings.kind in DEEPSPEED and settings.mixed_precision is not None else kind.itemsize


def gradients(step: StepMemory, settings: RunSettings) -> int:
    """All of them, at the end of the backward pass."""
    share = settings.devices if settings.kind in ("zero2", "zero3", "fsdp") else 1
    return -(-sum(number * _stored(kind, settings) for kind, number in _trained(step)) // share)


def states(step: StepMemory, settings: RunSettings) -> int:
    """Of the optimiser; under DeepSpeed with the float32 copy of the weights."""
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


def update(step: StepMemory, settings: RunSettings, cuda: bool) -> int:
    """What the optimiser makes and drops while it updates."""
    share = settings.devices if settings.sharded else 1
    if settings.kind in DEEPSPEED:  # the gradients of its share in float32; in stage 3 a group at a time
        number = -(-sum(number for _, number in _trained(step)) // share)
        return _SINGLE * (min(number, _deepspeed("zero3")["sub_group_size"]) if settings.kind == "zero3" else number)
    if not cuda or settings.optim not in _FOREACH:
        return 0
    return -(-sum(number * _stored(kind, settings) for kind, number in _trained(step)) // share)


def held_buffers(step: StepMemory, settings: RunSettings) -> int:
    """Communication buffers that are there during the whole step."""
    if settings.kind == "ddp":  # buckets are a copy of all gradients (gradient_as_bucket_view is off by default)
        return sum(number * kind.itemsize for kind, number in _trained(step))
    return _computed(settings) * _deepspeed("zero3")["reduce_bucket_size"] if settings.kind == "zero3" else 0


def passing_buffers(step: StepMemory, settings: RunSettings) -> int:
    """Communication buffers and gathered weights of forward and backward alone; see docs/memory.md for each."""
    size, trained = _computed(settings), sum(number for _, number in _trained(step))
    if settings.kind == "fsdp":  # two layers and all that is in none, gathered; their gradients before they are cut
        gathered = step.root + 2 * step.layer
        return size * (gathered + step.trained_root + 2 * step.trained_layer)
    if settings.kind == "zero1":  # made when gradients are reduced; no overlap, whatever overlap_comm says
        return size * min(_deepspeed("zero1")["reduce_bucket_size"], trained)
    if settings.kind == "zero2":  # made whole, two of them to overlap
        options = _deepspeed("zero2")
        return size * options["reduce_bucket_size"] * (2 if options["overlap_comm"] else 1)
    if settings.kind == "zero3":
        total = sum(number for kind, number in step.parameters.items() if kind.floating)
        return size * max(min(_deepspeed("zero3")["stage3_max_live_parameters"], total), step.layer)
    return 0


@cache
def _deepspeed(kind: str) -> dict[str, Any]:
    """The settings of the bundled configuration."""
    return json.loads((RECIPES / "deepspeed" / f"{kind}.json").read_text(encoding="utf-8"))["zero_optimization"]
