"""The memory that a training run will need on each device, before it runs.

`memory_model.py` measures one step of the real code on fake tensors, `memory_sharing.py` divides that among devices
and adds optimiser states and buffers. Not counted: fragmentation of the allocator (PyTorch says "reserved" for it),
and anything that other programs hold. `memory_advice.py` says what would help, `memory_sources.py` reads recipes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ..configuration_internvl_chat import InternVLChatConfig
from . import memory_sharing as sharing
from .memory_model import measure_step
from .memory_settings import RunSettings
from .memory_trace import GRADIENTS, TEMPORARY

GIB = 2**30
# CUDA context, cuBLAS and NCCL: an assumption, it depends on GPU and driver.
OVERHEAD = 1 * GIB
# Above this share of the device, fragmentation decides whether a run fits.
TIGHT = 0.9
STATES, COMMUNICATION = "optimizer states", "communication"


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
        named += [(GRADIENTS, self.gradients), (STATES, self.states)]
        named += [(f"activations, {part}", size) for part, size in self.activations.items()]
        named += [(TEMPORARY, self.temporary), (COMMUNICATION, self.communication)]
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
    common: dict[str, Any] = {
        "settings": settings,
        "weights": sharing.weights(step, settings),
        "states": sharing.states(step, settings),
        "overhead": overhead,
    }
    held, passing = sharing.held_buffers(step, settings), sharing.passing_buffers(step, settings)
    gradients, temporary = sharing.gradients(step, settings), sharing.update(step, settings, cuda)
    if gradients + temporary > step.peak.total() + passing:
        now: dict[str, Any] = {"gradients": gradients, "temporary": temporary, "communication": held}
        return MemoryEstimate(**common, **now, activations={}, moment="optimizer step")
    kept = {part: size for part, size in step.peak.items() if size and part not in (GRADIENTS, TEMPORARY)}
    now = {"gradients": step.peak[GRADIENTS], "temporary": step.peak[TEMPORARY], "communication": held + passing}
    return MemoryEstimate(**common, **now, activations=kept, moment="forward or backward")
