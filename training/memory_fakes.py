"""What a model needs to run on fake tensors as it would on a GPU: answers, CUDA's casts, quantized layers.

`AssumedData` answers the few questions that only real data could (how many labels are there?), `CudaRules` lets fake
CPU tensors follow CUDA's casts and dropout, `QuantizedLinear` takes the memory of bitsandbytes' layers without needing
bitsandbytes. None of them computes anything useful.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_ITEM, _INDEX = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.index.Tensor
_BOUNDS = (torch.ops.aten.min.default, torch.ops.aten.max.default)
_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


class AssumedData(TorchDispatchMode):
    """Answers what depends on the values of fake tensors.

    Args:
        rows: Rows that a boolean mask of each shape selects.
        number: Any integer that is read (here only: how many visual tokens the prompt has), but for the smallest or
            largest of a tensor of integers, which is 0 (an index in range).
    """

    def __init__(self, rows: Mapping[tuple[int, ...], int], number: int) -> None:
        super().__init__()
        self.rows, self.number = rows, number

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is _ITEM:
            return False if args[0].dtype == torch.bool else getattr(args[0], "assumed", self.number)
        if func in _BOUNDS and not args[0].is_floating_point():
            bound = func(*args, **(kwargs or {}))
            bound.assumed = 0
            return bound
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
