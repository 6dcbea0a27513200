"""Between the original layout and transformers' own InternVL (`model_type` "internvl"): configurations and tensors.

Fields that the native configuration has no place for (template, tiling, the fused InternLM2 layout) travel in it under
`internvl_original`, so that converting there and back loses nothing. Files and folders belong to `conversion/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .weights_internvl import (
    holds_lora,
    internlm2_to_llama,
    llama_to_internlm2,
    merge_lora,
    native_to_original,
    original_to_native,
)

NATIVE_MODEL_TYPE = "internvl"
NATIVE_ARCHITECTURE = "InternVLForConditionalGeneration"
# Key of the native configuration.
RECORD = "internvl_original"
# original field of the vision configuration -> native field
_VISION_FIELDS = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "num_channels": "num_channels",
    "hidden_act": "hidden_act",
    "norm_type": "norm_type",
    "layer_norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_normalization": "use_qk_norm",
    "dropout": "projection_dropout",
    "attention_dropout": "attention_dropout",
    "initializer_range": "initializer_range",
    "initializer_factor": "layer_scale_init_value",
}
# The native configuration does not know these fields of the original.
_RECORDED = (
    "template",
    "system_message",
    "force_image_size",
    "dynamic_image_size",
    "use_thumbnail",
    "min_dynamic_patch",
    "max_dynamic_patch",
)
# The native q and k norms have this epsilon whatever the configuration says.
_NATIVE_QK_EPS = 1e-6
_PROJECTOR_ACT = "gelu"


class NativeLayoutError(ValueError):
    """A checkpoint that one of the two layouts cannot represent; the message names the field."""


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` dictionary is of transformers' own InternVL."""
    return config.get("model_type") == NATIVE_MODEL_TYPE


# ------------------------------------------------------------------------------------------------------ configurations


def config_to_native(config: PretrainedConfig) -> dict[str, Any]:
    """The `config.json` of transformers' `InternVLForConditionalGeneration` for an `InternVLChatConfig`.

    Raises:
        NativeLayoutError: the native classes would compute something else.
    """
    refuse_unrepresentable(config)
    vision, llm = config.vision_config, config.llm_config
    text = {k: v for k, v in config.to_dict()["llm_config"].items() if k not in ("auto_map", "architectures")}
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    record: dict[str, Any] = {name: getattr(config, name) for name in _RECORDED}
    record |= {name: getattr(config, name) for name in ids if getattr(config, name, None) is not None}
    record["vision_config"] = {"drop_path_rate": vision.drop_path_rate}
    record["llm_architecture"] = llm.architectures[0]
    if llm.model_type == "internlm2":
        text.pop("bias", None)
        text["model_type"] = "llama"
    return {
        "architectures": [NATIVE_ARCHITECTURE],
        "model_type": NATIVE_MODEL_TYPE,
        "dtype": _dtype_name(config),
        "vision_config": {
            **{native: getattr(vision, own) for own, native in _VISION_FIELDS.items()},
            "model_type": "internvl_vision",
            "architectures": ["InternVLVisionModel"],
            "dtype": _dtype_name(vision),
            "image_size": [vision.image_size] * 2,
            "patch_size": [vision.patch_size] * 2,
            # Otherwise the native encoder ends in a norm that no checkpoint has.
            "use_mean_pooling": True,
            "use_mask_token": False,
            "use_absolute_position_embeddings": True,
        },
        "text_config": {**text, "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[text["model_type"]]]},
        "image_token_id": config.img_context_token_id,
        "image_seq_length": config.tokens_per_tile(1)[0],
        "downsample_ratio": config.downsample_ratio,
        "projector_hidden_act": _PROJECTOR_ACT,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.tie_word_embeddings,
        RECORD: record,
    }


def _dtype_name(config: PretrainedConfig) -> str | None:
    return None if config.dtype is None else str(config.dtype).removeprefix("torch.")


def refuse_unrepresentable(config: PretrainedConfig) -> None:
    """Raises `NativeLayoutError` for an `InternVLChatConfig` that transformers' own classes compute differently."""
    vision = config.vision_config
    reasons = {
        "ps_version 'v1' (the native pixel shuffle is v2)": config.ps_version != "v2",
        f"layer_norm_eps {vision.layer_norm_eps} with qk_normalization (native q/k norms use {_NATIVE_QK_EPS})": (
            vision.qk_normalization and vision.layer_norm_eps != _NATIVE_QK_EPS
        ),
        "pad2square (native tiles are stretched)": config.pad2square,
        "img_context_token_id unknown (set it from the tokenizer first)": config.img_context_token_id is None,
        "dynamic_image_size without use_thumbnail (the native processor always adds a thumbnail)": (
            config.dynamic_image_size and not config.use_thumbnail and config.max_dynamic_patch > 1
        ),
        "adapters stored in the weights (merge them first)": bool(config.use_backbone_lora or config.use_llm_lora),
    }
    for reason, applies in reasons.items():
        if applies:
            raise NativeLayoutError(f"transformers' own InternVL cannot represent {reason}: keep the original layout.")


def config_from_native(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an `InternVLChatConfig` for a native `config.json`.

    Without a record of the original, the fields that the native file does not hold take the values of every release
    that exists in both layouts: template `internvl2_5` (gpt-oss: its own), up to 12 tiles and a thumbnail.

    Args:
        values: The dictionary, or that of a configuration object.

    Raises:
        NativeLayoutError: the original classes would compute something else.
    """
    vision, text = dict(values.get("vision_config") or {}), dict(values.get("text_config") or {})
    _refuse_foreign_native(values, vision)
    record = dict(values.get(RECORD) or {})
    architecture = record.pop("llm_architecture", None)
    own_vision = {own: vision[native] for own, native in _VISION_FIELDS.items() if native in vision}
    own_vision |= {name: _side(vision.get(name, size)) for name, size in (("image_size", 448), ("patch_size", 14))}
    native_defaults = {"qkv_bias": False, "qk_normalization": False, "norm_type": "layer_norm", "hidden_size": 1024,
                       "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}  # fmt: skip
    if vision.get("dtype") is not None:
        own_vision["dtype"] = vision["dtype"]
    model_type = text.get("model_type", "qwen2")
    text.setdefault("tie_word_embeddings", values.get("tie_word_embeddings", False))
    if architecture == "InternLM2ForCausalLM" and model_type == "llama":
        text["model_type"] = "internlm2"
    else:
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "dtype": values.get("dtype", values.get("torch_dtype")),
        "vision_config": {**native_defaults, **own_vision, **record.pop("vision_config", {})},
        "llm_config": {**text, "architectures": [architecture] if architecture else []},
        "downsample_ratio": values.get("downsample_ratio", 0.5),
        "select_layer": values.get("vision_feature_layer", -1),
        "img_context_token_id": values.get("image_token_id"),
        "ps_version": "v2",
        "force_image_size": own_vision["image_size"],
        "template": "internvl3_5_gpt_oss" if model_type == "gpt_oss" else "internvl2_5",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "min_dynamic_patch": 1,
        "max_dynamic_patch": 12,
        **record,
    }


def _side(size: Any) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise NativeLayoutError(f"image_size or patch_size {size} is not square: the original layout has one side.")
    return sides.pop()


def _refuse_foreign_native(values: Mapping[str, Any], vision: Mapping[str, Any]) -> None:
    layer = values.get("vision_feature_layer", -1)
    reasons = {
        "several vision_feature_layers": not isinstance(layer, int),
        "vision_feature_select_strategy 'full'": values.get("vision_feature_select_strategy", "default") != "default",
        "projector_hidden_act other than 'gelu'": values.get("projector_hidden_act", _PROJECTOR_ACT) != _PROJECTOR_ACT,
        "use_mean_pooling false (a final norm in the encoder)": vision.get("use_mean_pooling", True) is False,
        "use_mask_token": bool(vision.get("use_mask_token")),
        "use_absolute_position_embeddings false": vision.get("use_absolute_position_embeddings", True) is False,
    }
    for reason, applies in reasons.items():
        if applies:
            raise NativeLayoutError(f"the original layout cannot represent {reason}: use transformers' own classes.")


# ------------------------------------------------------------------------------------------------------------- tensors

_LLM = "language_model."


def tensors_to_native(tensors: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Tensors of an original checkpoint under native names; InternLM2's fused projections become Llama's.

    Args:
        tensors: By name on disk, lazy or in memory.
        config: `InternVLChatConfig` of the checkpoint.
    """
    return original_to_native(_with_language_model(tensors, config, internlm2_to_llama))


def tensors_to_original(tensors: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """The inverse of `tensors_to_native`; `config` is that of the result."""
    return _with_language_model(native_to_original(tensors), config, llama_to_internlm2)


def holds_native(names: Any) -> bool:
    """Whether these are tensor names of the native layout, as saved or as in memory."""
    return any(name.startswith(("model.vision_tower.", "vision_tower.")) for name in names)


def foreign_tensors(tensors: Mapping[str, Any], config: PretrainedConfig) -> dict[str, Any] | None:
    """Tensors of a checkpoint in another form under original names, adapters merged; None if it is plain already.

    Args:
        tensors: By name on disk.
        config: `InternVLChatConfig` of the model.

    Raises:
        LayoutError: the names are not those of the layout that they begin like.
    """
    if holds_native(tensors):
        return tensors_to_original(tensors, config)
    return merge_lora(tensors) if holds_lora(tensors) else None


def _with_language_model(tensors: Mapping[str, Any], config: PretrainedConfig, convert: Any) -> dict[str, Any]:
    llm = config.llm_config
    if llm.model_type != "internlm2":
        return dict(tensors)
    own = {key.removeprefix(_LLM): tensor for key, tensor in tensors.items() if key.startswith(_LLM)}
    converted = convert(own, llm.num_attention_heads, llm.num_key_value_heads)
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(_LLM)}
    return {**rest, **{f"{_LLM}{key}": tensor for key, tensor in converted.items()}}
