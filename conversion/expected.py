"""What the tensors of a checkpoint should be: names and shapes from the configuration, without weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ..checkpoint_internvl import LazyTensor
from ..configuration_internvl_chat import InternVLChatConfig
from ..modeling_internvl_chat import InternVLChatModel
from ..native_internvl import config_to_native

# Buffers that old transformers versions saved and no version reads.
_DEAD_SUFFIXES = (".rotary_emb.inv_freq", ".position_ids")


@dataclass(frozen=True)
class KeyReport:
    """How the tensors of a checkpoint compare with what its configuration asks for; each list is sorted.

    Attributes:
        missing: Names that should be there.
        unexpected: Names that no model reads.
        misshapen: (name, shape found, shape wanted).
        dead: Names that may be left out without loss.
    """

    missing: list[str]
    unexpected: list[str]
    misshapen: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    dead: list[str]

    @property
    def sound(self) -> bool:
        """Nothing missing, unexpected or misshapen."""
        return not (self.missing or self.unexpected or self.misshapen)

    def summary(self) -> str:
        """One line: how many of each and examples."""
        parts = []
        for kind in ("missing", "unexpected", "misshapen"):
            found = getattr(self, kind)
            if found:
                shown = ", ".join(
                    f"{item[0]} {item[1]} instead of {item[2]}" if isinstance(item, tuple) else item
                    for item in found[:3]
                )
                parts.append(f"{len(found)} {kind} ({shown}{', ...' if len(found) > 3 else ''})")
        return "; ".join(parts) or "all tensors are as they should be"


def expected_shapes(config: InternVLChatConfig, native: bool = False) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Names on disk and shapes for a configuration, and those of them that tied weights make optional.

    Args:
        config: Of the checkpoint.
        native: In transformers' own layout instead of the original one.
    """
    with torch.device("meta"):
        model: PreTrainedModel = (
            InternVLForConditionalGeneration(InternVLConfig.from_dict(config_to_native(config)))
            if native
            else InternVLChatModel(config)
        )
    state, shared = model.state_dict(), _tied(model)
    on_disk = revert_weight_conversion(model, state)
    tied = set(revert_weight_conversion(model, {name: state[name] for name in shared if name in state}))
    return {name: tuple(tensor.shape) for name, tensor in on_disk.items()}, tied


def _tied(model: PreTrainedModel) -> set[str]:
    found = set(getattr(model, "all_tied_weights_keys", {}))
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and name:
            found |= {f"{name}.{key}" for key in getattr(module, "all_tied_weights_keys", {})}
    return found


def compare(tensors: Mapping[str, LazyTensor], config: InternVLChatConfig, native: bool = False) -> KeyReport:
    """Compares tensors of a checkpoint (adapters merged) with its configuration."""
    return compare_shapes(tensors, *expected_shapes(config, native))


def quantization_of(values: Mapping[str, Any]) -> str:
    """The method of the `quantization_config` that a `config.json` declares, or ""."""
    for part in (values, *(values.get(name) for name in ("llm_config", "text_config"))):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if settings:
            return str(settings.get("quant_method", "")) or "unnamed" if isinstance(settings, Mapping) else "unnamed"
    return ""


def without_quantized(report: KeyReport, tensors: Mapping[str, LazyTensor]) -> tuple[KeyReport, list[str]]:
    """A report without what quantized layers explain, and the names of these layers.

    A layer is quantized if it has tensors of its own beside the weight (scales, packed weights): what they are called
    and shaped is the method's affair.

    Args:
        report: Of `compare` or `compare_shapes`.
        tensors: That were compared.
    """
    weights = {name.removesuffix(".weight") for name in (*tensors, *report.missing) if name.endswith(".weight")}
    found = {name: layer for name in report.unexpected for layer in _above(name) if layer in weights}
    layers = sorted(set(found.values()))
    explained = {f"{layer}.weight" for layer in layers}
    kept = KeyReport(
        missing=[name for name in report.missing if name not in explained],
        unexpected=[name for name in report.unexpected if name not in found],
        misshapen=[item for item in report.misshapen if item[0] not in explained],
        dead=report.dead,
    )
    return kept, layers


def _above(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def not_numbers(tensors: Mapping[str, LazyTensor], values: Mapping[str, Any]) -> str:
    """A sentence about weights that are integers or booleans though `config.json` declares no quantization, or "".

    Args:
        tensors: Of a checkpoint.
        values: Its `config.json`.
    """
    if quantization_of(values):
        return ""
    wrong = {name: tensor.dtype for name, tensor in tensors.items() if not tensor.dtype.is_floating_point}
    names = [name for name in wrong if not name.endswith(_DEAD_SUFFIXES)]
    if not names:
        return ""
    example = f"{names[0]} ({str(wrong[names[0]]).removeprefix('torch.')})"
    return f"{len(names)} tensors hold no floating-point numbers, such as {example}, without a quantization_config"


def compare_shapes(
    tensors: Mapping[str, LazyTensor], wanted: Mapping[str, tuple[int, ...]], optional: Collection[str] = ()
) -> KeyReport:
    """Compares tensors with the names and shapes that are `wanted`; those in `optional` may be missing."""
    extra = sorted(set(tensors) - set(wanted))
    dead = [name for name in extra if name.endswith(_DEAD_SUFFIXES)]
    shapes = {name: tuple(tensors[name].shape) for name in wanted if name in tensors}
    return KeyReport(
        missing=sorted(set(wanted) - set(tensors) - set(optional)),
        unexpected=[name for name in extra if name not in dead],
        misshapen=[(name, shape, wanted[name]) for name, shape in sorted(shapes.items()) if shape != wanted[name]],
        dead=dead,
    )
