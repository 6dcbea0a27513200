"""InternLM2 and InternLM2.5: Llama with other weight names and one fused projection per layer.

The class adds nothing to Llama's computation; a reversible conversion, registered under the class name, translates the
weights when loading and back when saving. Packing, attention backends, caches and quantisation come from Llama.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlamaForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration_internlm2 import InternLM2Config
from .weights_internvl import internlm2_conversions, internlm2_to_llama


class InternLM2ForCausalLM(LlamaForCausalLM):
    """InternLM2 language model (original `modeling_internlm2.py`), held in memory as a Llama."""

    config_class = InternLM2Config
    config: InternLM2Config

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        # `load_state_dict` with weights as they are on disk is what Trainer does when it resumes.
        self.register_load_state_dict_pre_hook(_translate_disk_names)


def _translate_disk_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    own = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
    if not any(".wqkv." in key for key in own):
        return
    config = module.config
    values = {short: state_dict.pop(key) for short, key in own.items()}
    for short, tensor in internlm2_to_llama(values, config.num_attention_heads, config.num_key_value_heads).items():
        state_dict[prefix + short] = tensor


# Every model folder executes this file anew, hence `overwrite`.
register_checkpoint_conversion_mapping(InternLM2ForCausalLM.__name__, internlm2_conversions(), overwrite=True)
InternLM2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
