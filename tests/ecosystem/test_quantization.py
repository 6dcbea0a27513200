"""What stays unquantized by default, by transformers' own rule of what it replaces; the arithmetic needs a backend.

Accuracy before and after is `benchmarks/quantization_accuracy.py`.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import CHAT, CHECKPOINTS, chat_config
from torch import nn
from transformers import BitsAndBytesConfig, FineGrainedFP8Config, PreTrainedModel, QuantoConfig
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.quantization_internvl import KEPT_MODULES, keep_vision_unquantized

TYPES = ("qwen2", "qwen3", "llama", "phi3", "gpt_oss", "internlm2", "mistral", "gemma2")


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("suffix", ["", ".weight"], ids=["modules", "parameters"])
def test_only_decoder_layers_are_left_to_quantize(model_type: str, suffix: str) -> None:
    """bitsandbytes asks by names of modules, torchao by names of parameters."""
    with torch.device("meta"):
        model = InternVLChatModel(chat_config(model_type))
    kept = HfQuantizer.get_modules_to_not_convert(model, list(KEPT_MODULES), None)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    replaced = {name for name in linear if should_convert_module(name + suffix, kept)}
    assert replaced == {name for name in linear if name.startswith("language_model.model.layers.")} != set()
    assert {name.split(".")[0] for name in linear - replaced} == {"vision_model", "mlp1", "language_model"}


def _passed(monkeypatch: pytest.MonkeyPatch, *, config: Any = None, **options: Any) -> Any:
    """The quantization configuration that transformers' `from_pretrained` is given."""
    seen: dict[str, Any] = {}
    replacement = classmethod(lambda cls, *args, **kwargs: seen.update(kwargs) or nn.Module())
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", replacement)
    extra = {} if config is None else {"config": config}
    InternVLChatModel.from_pretrained(CHAT / CHECKPOINTS[0], **extra, **options)
    return seen.get("quantization_config")


@pytest.mark.parametrize("form", ["4bit", "8bit", "dictionary", "quanto", "fp8"])
def test_from_pretrained_fills_the_list(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.0.0")
    monkeypatch.setattr(
        "transformers.utils.quantization_config.is_optimum_quanto_available", lambda: True, raising=False
    )
    given = {
        "4bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
        "8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
        "dictionary": lambda: {"load_in_4bit": True},
        "quanto": lambda: QuantoConfig(weights="int8"),
        "fp8": lambda: FineGrainedFP8Config(),
    }[form]()
    before = str(given)
    passed = _passed(monkeypatch, quantization_config=given)
    field = "llm_int8_skip_modules" if form in ("4bit", "8bit", "dictionary") else "modules_to_not_convert"
    assert getattr(passed, field) == list(KEPT_MODULES)
    assert str(given) == before, "the caller's object is as it was"


@pytest.mark.parametrize("listed", [[], ["vision_model"], ["language_model.lm_head"]], ids=["none", "vision", "head"])
def test_a_list_of_the_caller_stands(listed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = QuantoConfig(weights="int8", modules_to_not_convert=listed)
    assert _passed(monkeypatch, quantization_config=given) is given


def test_what_has_no_list_or_is_saved_quantized_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert keep_vision_unquantized(None) is None
    assert keep_vision_unquantized(given := SimpleNamespace(bits=4)) is given
    saved = SimpleNamespace(quantization_config={"quant_method": "fp8"})
    given = FineGrainedFP8Config()
    assert _passed(monkeypatch, config=saved, quantization_config=given) is given
