"""Quantized language models under adapters (QLoRA): settings of bitsandbytes, and models that it cannot quantize.

Loading with them is `building`, adding the adapters `lora`; the estimate of their memory is `memory_fakes`.
"""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

from ..configuration_internvl_chat import InternVLChatConfig
from ..quantization_internvl import KEPT_MODULES


def quantization_config(kind: str, dtype: str = "auto") -> BitsAndBytesConfig:
    """Settings of bitsandbytes for the language model; `KEPT_MODULES` of `quantization_internvl` stay as they are.

    Args:
        kind: `"nf4"` (4 bits, constants quantized too: QLoRA, arXiv 2305.14314, section 3) or `"int8"` (LLM.int8).
        dtype: In which nf4 weights are multiplied; `"auto"` for bfloat16.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not is_bitsandbytes_available():
        raise ImportError(f"quantization={kind!r} needs bitsandbytes: pip install bitsandbytes")
    kept = {"llm_int8_skip_modules": list(KEPT_MODULES)}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        **kept,
    )


def refuse_quantized_experts(config: InternVLChatConfig, kind: str) -> None:
    """bitsandbytes replaces linear layers; transformers 5 holds experts as three-dimensional parameters."""
    text = config.get_text_config()
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        raise ValueError(
            f"quantization={kind!r} would leave the experts of {text.architectures[0]}, most of its weights, as they "
            "are: bitsandbytes quantizes linear layers only; leave it out"
        )
