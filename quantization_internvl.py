"""Which parts of InternVL stay as they are when `from_pretrained` quantizes, and 4-bit weights that went bad.

transformers' own default keeps the output head alone. The vision encoder and the projector are a small share of the
weights and lose most: a common cause of nonsense about images from quantized checkpoints. What a caller lists, down
to an empty list, is left alone, and so is a checkpoint that was saved quantized.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers.quantizers.auto import AutoQuantizationConfig

# Encoder, projector and the output head, whole from the root: torchao compares names of parameters, not of modules.
KEPT_MODULES = ("vision_model", "mlp1", "language_model.lm_head")
# How the quantization configurations of transformers name their list of modules to leave out.
_FIELDS = ("llm_int8_skip_modules", "modules_to_not_convert")
# Some configurations put the head into the list themselves.
_UNSAID = (None, ["lm_head"])


def keep_vision_unquantized(quantization_config: Any) -> Any:
    """The configuration with `KEPT_MODULES` as its list of modules to leave out, if it has no such list yet.

    Args:
        quantization_config: For `from_pretrained`: an object such as `BitsAndBytesConfig` or `TorchAoConfig`, the
            dictionary of one, or None. It is not changed.

    Returns:
        The same object where nothing is to be added: None, a list given by the caller, or a method without one.
    """
    if isinstance(quantization_config, dict):
        quantization_config = AutoQuantizationConfig.from_dict(quantization_config)
    field = next((name for name in _FIELDS if hasattr(quantization_config, name)), None)
    if field is None or getattr(quantization_config, field) not in _UNSAID:
        return quantization_config
    quantization_config = copy.deepcopy(quantization_config)
    setattr(quantization_config, field, list(KEPT_MODULES))
    return quantization_config


def refuse_repacked(model: nn.Module) -> None:
    """Keeps 4-bit weights of bitsandbytes that would be written with wrong scales from being saved.

    On CPUs with AVX512-BF16, bitsandbytes (0.50.2) packs weights anew at their first use, scales transposed and in
    bfloat16. Saving unpacks the weights but not the scales: file and model then compute something else.

    Raises:
        ValueError: the model has such weights.
    """
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"bitsandbytes has repacked the 4-bit weights of {name} for this CPU and would save wrong scales: "
                "load the model again and call save_pretrained before anything is computed"
            )


def misread_layers(model: nn.Module) -> list[str]:
    """Names of 4-bit layers whose weights bitsandbytes (0.50.2) unpacks wrongly on a CPU.

    Its blocks of weights (64 by default) run over the ends of rows; its CPU kernel takes every row to begin a block.
    Layers on other devices, and those whose width is a multiple of the block, are right.
    """
    names = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        block = getattr(getattr(weight, "quant_state", None), "blocksize", None)
        if block is not None and weight.device.type == "cpu" and module.in_features % block:
            names.append(name)
    return names
