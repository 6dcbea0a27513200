"""InternLM2 and InternLM2.5: Llama with other weight names and one fused projection per layer.

The class adds nothing to Llama's computation; a reversible conversion, registered under the class name, translates the
weights when loading and back when saving. Packing, attention backends, caches and quantisation come from Llama.
"""

from __future__ import annotations

import transformers
from packaging.version import Version
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from .configuration_internlm2 import InternLM2Config
from .resuming_internvl import accept_disk_names
from .weights_internvl import internlm2_conversions

# Before 5.13 transformers notes the longest length that dynamic NTK has seen under a name that it never reads, so that
# short sequences keep the frequencies of the last long one.
_FORGETS_LENGTH = Version(transformers.__version__) < Version("5.13.0")


def _note_length(rotary: nn.Module, args: object, output: object) -> None:
    rotary.max_seq_len_cached = getattr(rotary, "None_max_seq_len_cached", rotary.max_seq_len_cached)


def mend_dynamic_ntk(model: PreTrainedModel) -> None:
    """Gives short sequences their own frequencies again after long ones, where transformers itself does not.

    Args:
        model: A language model; left as it is unless its rotary embedding is of the type "dynamic".
    """
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if _FORGETS_LENGTH and getattr(rotary, "rope_type", None) == "dynamic":
        rotary.register_forward_hook(_note_length)


class InternLM2ForCausalLM(LlamaForCausalLM):
    """InternLM2 language model (original `modeling_internlm2.py`), held in memory as a Llama."""

    config_class = InternLM2Config
    config: InternLM2Config

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.register_load_state_dict_pre_hook(accept_disk_names)  # for use without InternVL around it
        mend_dynamic_ntk(self)


# Every model folder executes this file anew, hence `overwrite`.
register_checkpoint_conversion_mapping(InternLM2ForCausalLM.__name__, internlm2_conversions(), overwrite=True)
InternLM2ForCausalLM.register_for_auto_class("AutoModelForCausalLM")
