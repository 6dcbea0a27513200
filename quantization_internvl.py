"""Which parts of InternVL stay as they are when `from_pretrained` quantizes, where the caller does not say.

transformers' own default keeps the output head alone. The vision encoder and the projector are a small share of the
weights and lose most: a common cause of nonsense about images from quantized checkpoints. What a caller lists, down
to an empty list, is left alone, and so is a checkpoint that was saved quantized.
"""

from __future__ import annotations

import copy
from typing import Any

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
