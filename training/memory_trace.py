"""Peak memory of a training step that runs on fake tensors, with repeated layers run once and counted often.

`MemoryTrace` follows every storage that operations make: bytes, purpose, life. It needs no layer formulas, because the
model's own code runs, and no memory, because fake tensors hold none (`memory_fakes.py` has what they need).
Weights and optimiser states are not followed here: they do not change during a step.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRADIENTS, TEMPORARY, _IGNORED = "gradients", "temporary", "ignored"


@dataclass
class Segment:
    """A stretch of a step: one layer forward or backward, or what lies between layers.

    Attributes:
        part: Purpose of what is allocated in it.
        stack: Name of the stack that its layer belongs to; None between layers.
        repeats: How many layers of the whole model this one stands for.
        start: Bytes by purpose when it begins.
        peak: Bytes by purpose at its highest point.
    """

    part: str
    stack: str | None = None
    repeats: int = 1
    start: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)


class _Storage:
    """What is known of one live storage; holds it weakly."""

    __slots__ = ("bytes", "made_in", "part", "reference")

    def __init__(self, part: str, size: int, made_in: Segment) -> None:
        self.part, self.bytes, self.made_in = part, size, made_in
        self.reference: Any = None


class MemoryTrace(TorchDispatchMode):
    """Bytes in use by purpose, at the highest point of what runs inside.

    The caller cuts the step into segments with `begin`. A segment with `repeats` k is one of k equal layers in a row:
    what it leaves behind is counted k times when it ends, and its peak is that of the first or of the last of the k,
    whichever is higher; between them memory changes by the same amount from layer to layer. This is exact as long as
    the segment's neighbours are layers of the same kind, so the first and the last layer of a kind must run too.

    Storages that such a layer leaves behind are freed by the layers' backward segments, one layer at a time, or all k
    at once by something outside the layers (casts that autocast keeps until its end).

    Args:
        gradient_scale: Share of a finished gradient that stays on this device, relative to its size here.
    """

    def __init__(self, gradient_scale: float = 1.0) -> None:
        super().__init__()
        self.gradient_scale = gradient_scale
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._total = self._peak_total = 0
        self._segment_peak = 0
        self._live: dict[int, _Storage] = {}
        self._segment = Segment("start")

    # ------------------------------------------------------------------------------------------------------- the step

    def begin(self, part: str, stack: str | None = None, repeats: int = 1) -> None:
        """Ends the current segment and begins another."""
        self._close()
        self._segment = Segment(part, stack, repeats, Counter(self.now), Counter(self.now))
        self._segment_peak = self._total

    def finish(self) -> Counter[str]:
        """Ends the last segment and returns the highest point, in bytes by purpose."""
        self._close()
        return self.peak

    def _close(self) -> None:
        segment, more = self._segment, self._segment.repeats - 1
        peak = segment.peak
        if more:
            change = Counter(self.now)
            change.subtract(segment.start)
            if change.total() > 0:  # the last one is the highest
                peak = Counter({part: peak[part] + more * change[part] for part in {*peak, *change}})
            for part, size in change.items():
                self._add(part, more * size)
        if peak.total() > self._peak_total:
            self.peak, self._peak_total = peak, peak.total()

    def _add(self, part: str, size: int) -> None:
        self.now[part] += size
        self._total += size

    # ------------------------------------------------------------------------------------------------------- storages

    def ignore(self, tensor: torch.Tensor) -> None:
        """Takes a tensor for one that is counted elsewhere: it and its views add nothing."""
        self._follow(tensor.untyped_storage(), _IGNORED, 0)

    def add(self, part: str, size: int) -> None:
        """Counts bytes that are there during the whole step."""
        self._add(part, size)

    def track(self, tensor: torch.Tensor, part: str) -> None:
        """Counts a tensor that was made before."""
        storage = tensor.untyped_storage()
        self._follow(storage, part, storage.nbytes())

    def gradient(self, parameter: torch.Tensor) -> None:
        """Notes that a parameter's gradient is complete (a post-accumulate-grad hook)."""
        if parameter.grad is None:
            return
        storage = parameter.grad.untyped_storage()
        known = self._live.get(storage._cdata)
        size = round(storage.nbytes() * self.gradient_scale)
        if known is None:
            self._follow(storage, GRADIENTS, size)
        elif known.part not in (GRADIENTS, _IGNORED):
            self._add(known.part, -known.bytes)
            self._add(GRADIENTS, size)
            known.part, known.bytes = GRADIENTS, size

    def _follow(self, storage: torch.UntypedStorage, part: str, size: int) -> None:
        key = storage._cdata
        if key in self._live:
            return
        entry = self._live[key] = _Storage(part, size, self._segment)
        entry.reference = weakref.ref(storage, lambda _: self._free(key))
        self._add(part, size)
        if self._total > self._segment_peak:
            self._segment_peak, self._segment.peak = self._total, Counter(self.now)

    def _free(self, key: int) -> None:
        entry = self._live.pop(key)
        outside = self._segment.stack is None or self._segment.stack != entry.made_in.stack
        self._add(entry.part, -entry.bytes * (entry.made_in.repeats if outside else 1))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._follow(storage, self._segment.part, storage.nbytes())
        return result
