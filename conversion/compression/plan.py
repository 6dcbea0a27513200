"""What `compression` would do to a checkpoint, and why it would not: layers, group sizes, kinds that it refuses.

Only `config.json` and the headers of weights are needed, and neither llm-compressor nor compressed-tensors is
imported; patterns mean what they mean there (`re:` and an expression that matches from the start, or a whole name).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ...configuration_internvl_chat import InternVLChatConfig
from ...modeling_internvl_chat import InternVLChatModel
from ...weights_internvl import holds_lora
from ..expected import quantization_of
from ..source import Source

# In front of a whole layer name in the original layout, which vLLM, LMDeploy and SGLang use too.
KEPT_PATTERNS = (r"re:vision_model\..*", r"re:mlp1\..*", r"re:.*lm_head$")
METHODS = {
    "fp8": "FP8 weights by channel, activations by token as they come",
    "int8": "W8A8: int8 weights by channel (SmoothQuant, GPTQ), activations by token as they come",
    "gptq": "W4A16: int4 weights by group, symmetric (GPTQ)",
    "awq": "W4A16: int4 weights by group, symmetric (AWQ)",
}
NEEDS_ROWS = ("int8", "gptq", "awq")
FOUR_BITS = ("gptq", "awq")
PER_CHANNEL = -1  # as a group size: one scale for each output channel
_GROUP_SIZES = (128, 64, 32, 16)
_LLM = "language_model."


@dataclass(frozen=True)
class CompressionPlan:
    """Linear layers by name in the model.

    Attributes:
        compressed: The number of inputs of each layer that is compressed.
        kept: Layers that stay as they are.
        patterns: What names the kept ones.
    """

    compressed: Mapping[str, int]
    kept: tuple[str, ...]
    patterns: tuple[str, ...]

    def kept_by_part(self) -> dict[str, int]:
        """Numbers of kept layers: of the vision encoder, the projector, the output head, and others."""
        parts = {"vision_model": 0, "mlp1": 0, "lm_head": 0, "ignored": 0}
        for name in self.kept:
            first, last = name.split(".")[0], name.rpartition(".")[2]
            parts[first if first in parts else last if last in parts else "ignored"] += 1
        return parts


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer is named by one of the patterns, by the rule of compressed-tensors."""
    return any(re.match(p[3:], name) is not None if p.startswith("re:") else p == name for p in patterns)


def plan_compression(
    config: InternVLChatConfig, method: str, group_size: int, ignore: Sequence[str]
) -> CompressionPlan:
    """Which layers are compressed.

    Args:
        config: Of the checkpoint.
        method: Of `METHODS`.
        group_size: Inputs that share a scale, for the methods of four bits; `PER_CHANNEL` for all of a channel.
        ignore: Further patterns of layers to keep.

    Raises:
        ValueError: experts, InternLM2 in four bits, a pattern that names nothing, nothing left, or a group size that
            does not divide the inputs of a layer.
    """
    with torch.device("meta"):
        model = InternVLChatModel(copy.deepcopy(config))
    _refuse_model(model, method)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in ignore:
        if not any(matches(name, [pattern]) for name in linear):
            raise ValueError(
                f"ignore: {pattern!r} names no linear layer; layers are called {_example(linear)}, and a pattern is a "
                "whole name, or re: and a regular expression that matches from its start"
            )
    patterns = tuple(dict.fromkeys([*KEPT_PATTERNS, *ignore]))
    compressed = {name: module.in_features for name, module in linear.items() if not matches(name, patterns)}
    if not compressed:
        raise ValueError(f"ignore: {', '.join(ignore)} names every layer of the decoder, so nothing is left")
    if method in FOUR_BITS:
        _check_groups(compressed, group_size)
    return CompressionPlan(compressed, tuple(name for name in linear if name not in compressed), patterns)


def _example(names: Iterable[str]) -> str:
    return next(name for name in names if name.startswith(_LLM) and not name.endswith("lm_head"))


def _refuse_model(model: InternVLChatModel, method: str) -> None:
    architecture = type(model.language_model).__name__
    experts = [n for n, p in model.language_model.named_parameters() if p.ndim == 3 and "expert" in n]
    if experts:
        raise ValueError(
            f"{architecture} holds its experts, most of its weights, as three-dimensional parameters ({experts[0]}), "
            "which are no linear layers and would stay as they are: compress a model without experts"
        )
    if architecture == "InternLM2ForCausalLM" and method in FOUR_BITS:
        raise ValueError(
            f"method {method!r}: InternLM2 stores query, key and value as one tensor, and packed four-bit weights of "
            "the three cannot be joined: take fp8 or int8"
        )


def _check_groups(widths: Mapping[str, int], group_size: int) -> None:
    if group_size == PER_CHANNEL:
        return
    for name, width in widths.items():
        if width % group_size:
            fitting = [size for size in _GROUP_SIZES if all(w % size == 0 for w in widths.values())]
            sizes = "".join(f"{size}, " for size in fitting)
            raise ValueError(
                f"group_size {group_size} does not divide the {width} inputs of {name}; these would do: "
                f"{sizes}{PER_CHANNEL} (one scale per output channel)"
            )


def refuse_source(source: Source) -> None:
    """Raises `ValueError` for adapters in the weights."""
    ranks = [name for name in ("use_backbone_lora", "use_llm_lora") if source.values.get(name)]
    if ranks or holds_lora(source.weights.tensors):
        raise ValueError(
            f"{source.folder} has LoRA adapters in its weights: merge them first (internvl merge SOURCE TARGET)"
        )


def refuse_quantized(folder: object, values: Mapping[str, object]) -> None:
    """Raises `ValueError` if `values`, a `config.json`, is of a quantized checkpoint."""
    if kind := quantization_of(values):
        raise ValueError(f"{folder} is quantized already ({kind}): start from the full weights")


def check_arguments(method: str, rows: object, samples: int, max_length: int, group_size: int) -> None:
    """Raises `ValueError` for arguments that no checkpoint could be compressed with."""
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; choose one of {', '.join(METHODS)}")
    if method in NEEDS_ROWS and rows is None:
        raise ValueError(
            f"method {method!r} calibrates on data: pass rows (--data), a file of conversations with images as for "
            "training; fp8 needs none"
        )
    if method not in NEEDS_ROWS and rows is not None:
        raise ValueError(f"method {method!r} uses no data: leave rows (--data) out")
    for name, value in (("samples", samples), ("max_length", max_length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if group_size != PER_CHANNEL and group_size < 1:
        raise ValueError(
            f"group_size must be positive, or {PER_CHANNEL} for one scale per output channel; got {group_size}"
        )
