"""llm-compressor at work on a model in memory, and what it leaves as the tensors of a checkpoint.

What is compressed and kept is `plan`'s to decide, which rows calibrate `data`'s; both packages
are imported when they are used. Nothing is written here.

llm-compressor runs on the language model alone, with embeddings as its input. Its sequential pipeline, in which each
layer is calibrated on what the compressed layers before it give, traces a model down to its decoder layers. In the
whole InternVL it finds none: the call of the language model is one opaque step. The basic pipeline would be left; it
calibrates every layer on activations of the uncompressed model and holds all of their statistics at once.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig
from transformers.core_model_loading import revert_weight_conversion

from ...checkpoint_internvl import LazyTensor
from ...configuration_internlm2 import InternLM2Config
from ...modeling_internvl_chat import InternVLChatModel
from ...processing_internvl import InternVLProcessor
from ..source import Source
from .data import CalibrationRows, EmbeddedRows
from .plan import FOUR_BITS, PER_CHANNEL, CompressionPlan

_SMOOTHING = 0.8  # of SmoothQuant (arXiv 2211.10438), as in llm-compressor's own W8A8 recipe
# Where llm-compressor's pairs of norm and layers are those of the model; elsewhere int8 goes without SmoothQuant. Its
# pairs for Gemma 2 name the norm behind the attention, which the MLP does not read.
_SMOOTHED = ("Qwen2", "Qwen3", "Llama", "InternLM2", "Mistral", "Phi3")

_UNTOUCHED = ("vision_model.", "mlp1.")


def run_compressor(
    model: InternVLChatModel,
    processor: InternVLProcessor,
    method: str,
    group_size: int,
    plan: CompressionPlan,
    chosen: CalibrationRows | None,
) -> None:
    """Compresses the language model in place; its layers then carry their scheme, scales and rounded weights."""
    os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "WARNING")  # read when it is imported; it logs to stdout
    from llmcompressor import oneshot

    language_model = model.language_model
    prefix = "language_model."
    layers = [n for n, module in language_model.named_modules() if isinstance(module, nn.Linear)]
    kept = [name for name in layers if prefix + name not in plan.compressed]
    options: dict[str, Any] = {"pipeline": "datafree"}
    if chosen is not None:
        _encode_on_accelerator(model)
        rows = DataLoader(EmbeddedRows(model, chosen), batch_size=None)
        layer = type(language_model.get_decoder().layers[0]).__name__
        options = {"pipeline": "sequential", "dataset": rows, "sequential_targets": [layer]}
    recipe = _recipe(method, group_size, kept, type(language_model).__name__)
    with _named(language_model), _unpinned():
        oneshot(model=language_model, processor=processor, recipe=recipe, **options)


def _encode_on_accelerator(model: InternVLChatModel) -> None:
    """Moves encoder and projector to an accelerator, if there is one; llm-compressor moves layers of the decoder."""
    device = torch.accelerator.current_accelerator()
    if device is not None:
        model.vision_model.to(device)
        model.mlp1.to(device)


def _recipe(method: str, group_size: int, kept: list[str], architecture: str) -> list[Any]:
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    shared = {"ignore": kept, "config_groups": {"group_0": _scheme(method, group_size)}}
    if method == "fp8":
        return [QuantizationModifier(**shared)]
    if method == "awq":
        return [AWQModifier(), QuantizationModifier(**shared)]
    smoothed = method == "int8" and architecture.removesuffix("ForCausalLM") in _SMOOTHED
    return [*[SmoothQuantModifier(smoothing_strength=_SMOOTHING)] * smoothed, GPTQModifier(**shared)]


def _scheme(method: str, group_size: int) -> Any:
    """Of llm-compressor's presets FP8_DYNAMIC, W8A8 and W4A16, the last with this group size.

    Zero points, which AWQ can have (W4A16_ASYM), are left out: transformers 5.23 with compressed-tensors 0.20 expects
    another shape of them than is stored, and SGLang has refused them.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, preset_name_to_scheme

    if method not in FOUR_BITS:
        return preset_name_to_scheme({"fp8": "FP8_DYNAMIC", "int8": "W8A8"}[method], ["Linear"])
    grouped = {"strategy": "group", "group_size": group_size}
    strategy = {"strategy": "channel"} if group_size == PER_CHANNEL else grouped
    weights = QuantizationArgs(num_bits=4, type="int", symmetric=True, dynamic=False, **strategy)
    return QuantizationScheme(targets=["Linear"], weights=weights)


@contextmanager
def _named(language_model: nn.Module) -> Iterator[None]:
    """Gives a language model a folder, in which llm-compressor looks whether it is quantized already."""
    config, known = language_model.config, language_model.config._name_or_path
    AutoConfig.register(InternLM2Config.model_type, InternLM2Config, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        config._name_or_path = folder
        try:
            yield
        finally:
            config._name_or_path = known


@contextmanager
def _unpinned() -> Iterator[None]:
    """Lets AWQ run without an accelerator, where its pinning of memory (llm-compressor 0.14) is an error."""
    from compressed_tensors.utils import patch_attr
    from llmcompressor.pipelines.cache import IntermediatesCache

    if torch.accelerator.is_available():
        yield
        return
    with patch_attr(IntermediatesCache, "pin_memory", lambda *args: None):
        yield


# ------------------------------------------------------------------------------------------------------------- writing


def compressed_source(model: InternVLChatModel, source: Source, plan: CompressionPlan) -> Source:
    """The checkpoint with packed weights under their names on disk and a `quantization_config`."""
    from compressed_tensors import ModelCompressor
    from compressed_tensors.offload import disable_onloading

    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    source.config.quantization_config = {**_settings(compressor), "ignore": list(plan.patterns)}
    _check_patterns(model, plan)
    with disable_onloading():
        state = revert_weight_conversion(model, model.state_dict())
    stored = {name: tensor for name, tensor in state.items() if _stored(name, source)}
    # Encoder and projector as they are on disk, where they may have another dtype than the model was loaded in.
    tensors = {
        name: source.tensors[name] if name.startswith(_UNTOUCHED) else LazyTensor.of(tensor.cpu(), name)
        for name, tensor in stored.items()
    }
    layers = {name.rpartition(".")[0] for name in tensors}
    lost = [name for name in source.tensors if name not in tensors and name.removesuffix(".weight") not in layers]
    if lost:
        raise RuntimeError(f"compressing lost {len(lost)} tensors, the first is {lost[0]}")
    return Source(source.folder, source.config, source.weights, tensors, source.values)


def _stored(name: str, source: Source) -> bool:
    """Whether a tensor is one of the source's, or part of one; a tied head is not."""
    return name in source.tensors or f"{name.rpartition('.')[0]}.weight" in source.tensors


def _settings(compressor: Any) -> dict[str, Any]:
    """The `quantization_config` that compressed-tensors writes."""
    with tempfile.TemporaryDirectory() as folder:
        compressor.update_config(folder)
        return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["quantization_config"]


def _check_patterns(model: nn.Module, plan: CompressionPlan) -> None:
    """The patterns must name exactly the layers that were kept, or the folder would not load."""
    from compressed_tensors.utils import match_named_modules

    found = {name for name, _ in match_named_modules(model, ["Linear"], plan.patterns)}
    carrying = {name for name, module in model.named_modules() if hasattr(module, "quantization_scheme")}
    if not found == carrying == set(plan.compressed):
        odd = sorted((found ^ carrying) | (carrying ^ set(plan.compressed)))
        raise RuntimeError(f"{len(odd)} layers are compressed and not named so, or the reverse; the first is {odd[0]}")
