"""Values in a configuration with which no model can work: judged by kind and range, without building one.

What a configuration refuses when it is read is not repeated here, nor what shows in the shapes of the tensors. A value
that is merely unlike the releases' is none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..configuration_intern_vit import InternVisionConfig
from ..configuration_internvl_chat import InternVLChatConfig

# What a value has to be, in words -> whether it is.
_Rule = tuple[str, Callable[[Any], bool]]


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_COUNT: _Rule = ("a positive integer", lambda value: _integer(value) and value > 0)
_SHARE: _Rule = ("a number from 0 to 1", lambda value: _number(value) and 0 <= value <= 1)
_NOT_NEGATIVE: _Rule = ("a number of at least 0", lambda value: _number(value) and value >= 0)
_NUMBER: _Rule = ("a number", _number)
# Released: 1e-6 and 1e-5.
_EPSILON: _Rule = ("a number above 0 and up to 0.01", lambda value: _number(value) and 0 < value <= 0.01)
_POSITIVE: _Rule = ("a positive number", lambda value: _number(value) and value > 0)
# Released: 1e4 to 1e8.
_BASE: _Rule = ("a number above 1 and up to 1e12", lambda value: _number(value) and 1 < value <= 1e12)
_FLAG: _Rule = ("true or false", lambda value: isinstance(value, bool))

# transformers' own, in every part.
_SWITCHES = dict.fromkeys(("output_hidden_states", "output_attentions", "use_cache"), _FLAG)
_VISION: dict[str, _Rule] = {
    **dict.fromkeys(("num_channels", "patch_size", "image_size", "hidden_size", "num_attention_heads"), _COUNT),
    **dict.fromkeys(("intermediate_size", "num_hidden_layers"), _COUNT),
    **dict.fromkeys(("qkv_bias", "qk_normalization"), _FLAG),
    **dict.fromkeys(("dropout", "drop_path_rate", "attention_dropout"), _SHARE),
    "layer_norm_eps": _EPSILON,
    "initializer_range": _NOT_NEGATIVE,
    "initializer_factor": _NUMBER,
}
# Not every language model has all of them, and None stands for "not used".
_LLM: dict[str, _Rule] = {
    **dict.fromkeys(("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"), _COUNT),
    **dict.fromkeys(("intermediate_size", "vocab_size", "max_position_embeddings", "head_dim"), _COUNT),
    "sliding_window": _COUNT,
    "rms_norm_eps": _EPSILON,
    "initializer_range": _NOT_NEGATIVE,
    **dict.fromkeys(("attention_dropout", "resid_pdrop", "embd_pdrop"), _SHARE),
}
_ROPE: dict[str, _Rule] = {
    "rope_theta": _BASE,
    "factor": _POSITIVE,
    "partial_rotary_factor": ("a number above 0 and up to 1", lambda value: _number(value) and 0 < value <= 1),
    "original_max_position_embeddings": _COUNT,
}


def impossible_ids(values: Mapping[str, Any], rows: int | None) -> Iterator[tuple[str, str]]:
    """(field, sentence) of every special token in a `generation_config.json` that is no id.

    Args:
        values: The file.
        rows: Of the embedding table; None where unknown. Stop tokens beyond it do no harm.
    """
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = values.get(name)
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(map(_integer, several)):
            yield name, f"{name} is {value!r}, not an id"
        elif name == "pad_token_id" and value is not None and not 0 <= value < (rows or math.inf):
            yield name, f"{name} is {value}, beyond the {rows} embedding rows" if value >= 0 else f"{name} is {value}"


def impossible(config: InternVLChatConfig | InternVisionConfig, native: bool = False) -> Iterator[tuple[str, str]]:
    """(field, sentence) of every value with which no model can work.

    Args:
        config: Of a chat model or of an encoder alone.
        native: Name the fields as `config.json` of transformers' own layout does.
    """
    if isinstance(config, InternVisionConfig):
        yield from _encoder(config, "")
        return
    text = "text_config." if native else "llm_config."
    llm = config.llm_config
    yield from _encoder(config.vision_config, "vision_config.")
    yield from _given(vars(llm), _LLM, text)
    yield from (*_switches(config, ""), *_switches(llm, text))
    yield from _rope(getattr(llm, "rope_parameters", None), f"{text}rope_parameters.")
    yield from (*_dtype(config, ""), *_dtype(llm, text), *_grid(config, text))


def _encoder(config: InternVisionConfig, prefix: str) -> Iterator[tuple[str, str]]:
    yield from _broken({name: getattr(config, name) for name in _VISION}, _VISION, prefix)
    yield from (*_switches(config, prefix), *_dtype(config, prefix))


def _switches(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    yield from _given(vars(config), _SWITCHES, prefix)
    yield from _broken({"return_dict": vars(config).get("return_dict", True)}, {"return_dict": _FLAG}, prefix)


def _given(values: Mapping[str, Any], rules: Mapping[str, _Rule], prefix: str) -> Iterator[tuple[str, str]]:
    """`_broken`, None aside."""
    yield from _broken(values, {name: rule for name, rule in rules.items() if values.get(name) is not None}, prefix)


def _broken(values: Mapping[str, Any], rules: Mapping[str, _Rule], prefix: str) -> Iterator[tuple[str, str]]:
    for name, (wanted, holds) in rules.items():
        if not holds(values[name]):
            yield f"{prefix}{name}", f"{prefix}{name} is {values[name]!r}, not {wanted}"


def _rope(values: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """Rotary positions; some language models have a dictionary for each type of layer."""
    if not isinstance(values, dict):
        return
    yield from _given(values, _ROPE, prefix)
    for name, inner in values.items():
        yield from _rope(inner, f"{prefix}{name}.")


def _dtype(config: Any, prefix: str) -> Iterator[tuple[str, str]]:
    dtype = config.dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        name = str(dtype).removeprefix("torch.")
        yield f"{prefix}dtype", f"{prefix}dtype is {name!r}, not a floating-point type"


def _grid(config: InternVLChatConfig, text: str) -> Iterator[tuple[str, str]]:
    """Whether a tile becomes whole visual tokens, and one image fits into a prompt."""
    size, patch = config.image_size, config.vision_config.patch_size
    if not (_COUNT[1](size) and _COUNT[1](patch)):
        return
    side, ratio = size // patch, config.downsample_ratio
    if side < 1 or (side * ratio) % 1 or not math.isclose(round(1 / ratio) * ratio, 1):
        yield (
            "downsample_ratio",
            f"a tile of {size} pixels has {side}x{side} patches of {patch}, which downsample_ratio {ratio} does not "
            "join to whole visual tokens",
        )
        return
    tokens, most = config.tokens_per_tile(1)[0], getattr(config.llm_config, "max_position_embeddings", None)
    if _COUNT[1](most) and most <= tokens:
        name = f"{text}max_position_embeddings"
        yield name, f"{name} is {most}, but the visual tokens of a single tile are {tokens}"
