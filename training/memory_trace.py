"""Peak memory of a training step that runs on fake tensors, with repeated layers run once and counted often.

`MemoryTrace` follows every storage that operations make: bytes, purpose, life. It needs no layer formulas, because the
model's own code runs, and no memory, because fake tensors hold none. `AssumedData` answers the few questions that only
real data could (how many labels are there?), `CudaRules` lets fake CPU tensors follow CUDA's casts and dropout.
Weights and optimiser states are not followed here: they do not change during a step.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRADIENTS, TEMPORARY, _IGNORED = "gradients", "temporary", "ignored"
_ITEM, _INDEX = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


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


class AssumedData(TorchDispatchMode):
    """Answers what depends on the values of fake tensors.

    Args:
        rows: Rows that a boolean mask of each shape selects.
        number: Any integer that is read (here only: how many visual tokens the prompt has).
    """

    def __init__(self, rows: Mapping[tuple[int, ...], int], number: int) -> None:
        super().__init__()
        self.rows, self.number = rows, number

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _ITEM:
            return False if args[0].dtype == torch.bool else self.number
        if func is _INDEX and args[1] and args[1][0] is not None and args[1][0].dtype == torch.bool:
            values, mask = args[0], args[1][0]
            return values.new_empty((self.rows[tuple(mask.shape)], *values.shape[mask.ndim :]))
        return func(*args, **(kwargs or {}))


class CudaRules(TorchFunctionMode):
    """CUDA's autocast and dropout on CPU tensors, as far as they decide how much memory these models take.

    CUDA's autocast runs layer norms and softmax in float32, the CPU's does not; CUDA's dropout keeps a mask of bytes,
    the CPU's one in the type of its input.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _cuda_dropout(*args, **kwargs)
        wide = func is F.layer_norm or (func in _SOFTMAX and kwargs.get("dtype") is None)
        if wide and torch.is_autocast_enabled("cpu"):
            args, kwargs = tuple(map(_float32, args)), {key: _float32(value) for key, value in kwargs.items()}
        return func(*args, **kwargs)


def _float32(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _cuda_dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


# ------------------------------------------------------------------------------------------------- quantized weights


class _DequantizedLinear(torch.autograd.Function):
    """Linear layer whose weight exists in full only while it is multiplied, forward and backward."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, packed: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return F.linear(states, packed.new_empty(shape, dtype=states.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (packed,) = ctx.saved_tensors
        return gradients[0] @ packed.new_empty(ctx.shape, dtype=gradients[0].dtype), None, None


class QuantizedLinear(nn.Linear):
    """Takes the memory of bitsandbytes' linear layers; computes nothing useful, so fake tensors only.

    nf4: two weights to a byte, a byte for every 64 of them, and four bytes for every 256 of those (constants quantized
    too; QLoRA, arXiv 2305.14314, section 3). int8: one byte each and four for every row (LLM.int8, arXiv 2208.07339).

    Args:
        linear: The layer to stand in for.
        kind: `"nf4"` or `"int8"`.
        dtype: In which the weight is multiplied.
    """

    def __init__(self, linear: nn.Linear, kind: str, dtype: torch.dtype) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.bias, self.compute_dtype = linear.bias, dtype
        number = linear.weight.numel()
        packed = -(-number // 2) if kind == "nf4" else number
        self.weight = nn.Parameter(torch.empty(packed, dtype=torch.uint8), requires_grad=False)
        blocks = -(-number // 64)
        if kind == "nf4":
            self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8))
        scales = -(-blocks // 256) if kind == "nf4" else linear.out_features
        self.register_buffer("scales", torch.empty(scales, dtype=torch.float32))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        shape = (self.out_features, self.in_features)
        output = _DequantizedLinear.apply(input.to(self.compute_dtype), self.weight, shape)
        return (output if self.bias is None else output + self.bias).to(input.dtype)
