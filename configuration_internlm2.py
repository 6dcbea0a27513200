"""Configuration of the InternLM2 / InternLM2.5 language models, which are Llamas with differently stored weights."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class InternLM2Config(LlamaConfig):
    """Configuration of `InternLM2ForCausalLM`.

    Args:
        bias: Name that InternLM2 files give to Llama's `attention_bias` (false in every release).
        **kwargs: Fields of `transformers.LlamaConfig`; a legacy `rope_scaling` of type `"dynamic"` or `"linear"` with
            its `rope_theta` is understood (original `configuration_internlm2.py`).
    """

    model_type = "internlm2"

    def __init__(self, bias: bool = False, **kwargs: Any) -> None:
        kwargs.setdefault("attention_bias", bias)
        super().__init__(**kwargs)
        self.bias = self.attention_bias


InternLM2Config.register_for_auto_class()
