"""Configuration of InternVL-Chat: vision encoder, projector, language model and how images become tokens.

Reads every released `config.json` of the original layout (1.5 to 3.5), including its dead keys; the language model's
configuration is always one of transformers' own classes (InternLM2 excepted, which is a Llama subclass).
"""

from __future__ import annotations

import copy
import os
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_intern_vit import InternVisionConfig, drop_dead_vision_keys
from .configuration_internlm2 import InternLM2Config
from .native_internvl import config_from_native, is_native

# Saved by the original code; each would either make a load fail where flash-attn is absent, or mislead the reader.
_DEAD_LLM_KEYS = (
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_name_or_path",
    "auto_map",
)
# Fields that transformers 4 wrote into every configuration, at the values that mean nothing; 5 knows them no more.
_DEAD_DEFAULTS: dict[str, Any] = {
    "torchscript": False,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    **dict.fromkeys(
        "cross_attention_hidden_size finetuning_task task_specific_params prefix sep_token_id decoder_start_token_id "
        "tokenizer_class _commit_hash transformers_version image_fold bos_token_id eos_token_id pad_token_id".split()
    ),
}
# What every saved checkpoint offers. A released file names fewer classes, and code of its own repository.
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
    "AutoModel": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    "AutoModelForImageTextToText": "modeling_internvl_chat.InternVLChatModel",
}
# transformers 5 reads both names and writes the first; released files and transformers 4 have the second.
_NAMES_IN_4 = {"qwen3_moe": {"num_local_experts": "num_experts"}}
_DEFAULT_LLM = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
_FLAGS = ("pad2square", "dynamic_image_size", "use_thumbnail")
_TEXTS = ("template", "system_message")
# Integers with their least value; None where any will do.
_INTEGERS = {"select_layer": None, "min_dynamic_patch": 1, "max_dynamic_patch": 1}
_OPTIONAL_INTEGERS = {"force_image_size": 0, "img_context_token_id": 0}


def drop_dead_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Returns `values` without fields that transformers 4 left behind and that say nothing."""
    return {k: v for k, v in values.items() if k not in _DEAD_DEFAULTS or v != _DEAD_DEFAULTS[k]}


def language_model_type(llm_config: dict[str, Any]) -> str:
    """Returns the transformers model type of an `llm_config` dictionary.

    `architectures[0]` decides, as in the original; `model_type` settles which of several types share a class, and
    stands in when no architecture is named.

    Raises:
        ValueError: neither names a causal language model that transformers knows.
    """
    architecture = (llm_config.get("architectures") or [""])[0]
    model_type = llm_config.get("model_type", "")
    if InternLM2Config.model_type in (architecture.removesuffix("ForCausalLM").lower(), model_type):
        return InternLM2Config.model_type
    if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and (
        not architecture or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] == architecture
    ):
        return model_type
    matches = [t for t, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name == architecture]
    if matches:
        stem = architecture.lower()
        return max(matches, key=lambda t: (stem.startswith(t.replace("_", "")), len(t)))
    if not architecture and model_type in CONFIG_MAPPING:
        raise ValueError(f"llm_config.model_type {model_type!r} has no causal language model in transformers.")
    raise ValueError(
        f"llm_config names architecture {architecture!r} and model_type {model_type!r}, neither of which is a causal "
        "language model of the installed transformers. Set llm_config['architectures'] to e.g. ['Qwen2ForCausalLM']."
    )


def modernise_llm_dict(values: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of a released `llm_config` that transformers 5 accepts.

    Drops dead keys, renames the rope type `"su"` (Phi-3) to `"longrope"`, and reads `rope_parameters` before the
    copies of it that are saved for transformers 4.
    """
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")  # None differs from the class's own default
    kept = drop_dead_defaults(values) | {name: values[name] for name in ids if name in values}
    values = {k: copy.deepcopy(v) for k, v in kept.items() if k not in _DEAD_LLM_KEYS}
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key)
        if isinstance(rope, dict) and "su" in (rope.get("type"), rope.get("rope_type")):
            rope.update({name: "longrope" for name in ("type", "rope_type") if name in rope})
    # The copies that are saved for transformers 4 hold less, and 5 would prefer them; edited ones stay.
    legacy = _legacy_rope(values.get("rope_parameters"))
    if legacy and all(values.get(key) == legacy.get(key) for key in ("rope_theta", "rope_scaling")):
        values = {k: v for k, v in values.items() if k not in legacy}
    return values


def build_llm_config(values: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    """Makes a configuration object of an `llm_config` (dictionary, configuration object, None for a default Qwen2)."""
    if isinstance(values, PretrainedConfig):
        return values
    values = modernise_llm_dict(values or _DEFAULT_LLM)
    model_type = language_model_type(values)
    values.pop("model_type", None)
    if model_type == InternLM2Config.model_type:
        return InternLM2Config(**{**values, "architectures": ["InternLM2ForCausalLM"]})
    values["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    return CONFIG_MAPPING[model_type](**values)


def _check_fields(config: PretrainedConfig) -> None:
    """Raises `ValueError` for a field of `InternVLChatConfig` itself whose value no code can use, and names both."""
    wrong = dict.fromkeys((name for name in _FLAGS if not isinstance(getattr(config, name), bool)), "true or false")
    wrong |= dict.fromkeys(
        (name for name in _TEXTS if not isinstance(getattr(config, name), str | None)), "a text or null"
    )
    for name, least in (_INTEGERS | _OPTIONAL_INTEGERS).items():
        value, bound = getattr(config, name), "" if least is None else f" of at least {least}"
        if value is None and name in _OPTIONAL_INTEGERS:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            wrong[name] = f"an integer{bound}{' or null' if name in _OPTIONAL_INTEGERS else ''}"
    ratio = config.downsample_ratio
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 < ratio <= 1:
        wrong["downsample_ratio"] = "a number above 0 and up to 1"
    for name, wanted in wrong.items():
        raise ValueError(f"{name} must be {wanted}, got {getattr(config, name)!r}.")
    if config.min_dynamic_patch > config.max_dynamic_patch:
        raise ValueError(
            f"min_dynamic_patch {config.min_dynamic_patch} exceeds max_dynamic_patch {config.max_dynamic_patch}."
        )


_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def build_vision_config(values: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    """Makes a configuration object of a `vision_config` (dictionary, configuration object, None for defaults)."""
    if isinstance(values, PretrainedConfig):
        return values
    values = drop_dead_defaults(drop_dead_vision_keys(values or {}))
    values.pop("model_type", None)
    if values.get("tie_word_embeddings"):  # the default of transformers 4; an encoder has no words
        values.pop("tie_word_embeddings")
    return InternVisionConfig(**{"architectures": ["InternVisionModel"], **values})


def _legacy_rope(rope: dict[str, Any] | None) -> dict[str, Any]:
    """The fields that transformers 4 reads instead of `rope_parameters`; without them it falls back to theta 10000."""
    if not isinstance(rope, dict) or "rope_theta" not in rope:
        return {}
    legacy: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", "default") != "default":
        dead = ["rope_theta", "rope_type", "type", "partial_rotary_factor"]
        if rope["rope_type"] == "longrope":  # Phi-3 has it beside rope_scaling and allows three fields in it
            dead.append("original_max_position_embeddings")
        legacy["rope_scaling"] = {"type": rope["rope_type"], **{k: v for k, v in rope.items() if k not in dead}}
    return legacy


class InternVLChatConfig(PretrainedConfig):
    """Configuration of `InternVLChatModel`.

    Fields keep the names of the original `configuration_internvl_chat.py`.

    Args:
        vision_config: Fields of `InternVisionConfig`.
        llm_config: Fields of the language model's configuration; its class follows `architectures[0]` or `model_type`.
        use_backbone_lora, use_llm_lora: LoRA rank of adapters stored inside the vision and language weights on disk;
            0 in merged checkpoints and in every model in memory, since loading merges them.
        pad2square: Pad each tile to a square instead of stretching it.
        select_layer: -1 for the encoder's last hidden state, else an index into its hidden states (0 = embeddings).
        force_image_size: Tile side in pixels; overrides `vision_config.image_size` unless None or 0.
        downsample_ratio: Pixel-shuffle factor per axis; 0.5 turns 32x32 patches into 16x16 tokens.
        template: Name of the conversation template in `conversation.py`.
        dynamic_image_size, use_thumbnail, min_dynamic_patch, max_dynamic_patch: Tiling, see `InternVLImageProcessor`.
        ps_version: Pixel-shuffle version: `"v2"` (releases) or `"v1"` (transposed output, early checkpoints).
        img_context_token_id: Id of `<IMG_CONTEXT>`; saved so that a model works without asking a tokenizer.
        system_message: Replaces the template's system text unless None (some released files say `null`).

    Raises:
        ValueError: a field has a value that no code can use, or no language model is known by the name given.
    """

    model_type = "internvl_chat"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": AutoConfig}
    attribute_map = {"image_token_id": "img_context_token_id"}  # the name that transformers and TRL look for

    def __init__(
        self,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        use_backbone_lora: int = 0,
        use_llm_lora: int = 0,
        pad2square: bool = False,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        template: str | None = None,
        dynamic_image_size: bool = False,
        use_thumbnail: bool = False,
        ps_version: str = "v1",
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        img_context_token_id: int | None = None,
        system_message: str | None = None,
        **kwargs: Any,
    ) -> None:
        if ps_version not in ("v1", "v2"):
            raise ValueError(f"ps_version must be 'v1' or 'v2', got {ps_version!r}.")
        self.vision_config = build_vision_config(vision_config)
        self.llm_config = build_llm_config(llm_config)
        self.use_backbone_lora = use_backbone_lora
        self.use_llm_lora = use_llm_lora
        self.pad2square = pad2square
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.template = template
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.ps_version = ps_version
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.img_context_token_id = img_context_token_id
        self.system_message = system_message
        _check_fields(self)
        # Copies of the language model's fields (DeepSpeed reads hidden_size; heads are tied by llm_config alone).
        kwargs = drop_dead_defaults(kwargs)
        kwargs.pop("hidden_size", None)
        kwargs.pop("_name_or_path", None)
        kwargs["tie_word_embeddings"] = bool(getattr(self.llm_config, "tie_word_embeddings", False))
        kwargs["auto_map"] = dict(AUTO_MAP)
        self.hidden_size = self.llm_config.hidden_size
        # The base class passes its own choice on, None by default: a model that shares one of these objects and runs
        # already would silently lose its causal mask.
        chosen = [(part, name, getattr(part, name, None)) for part in (self.vision_config, self.llm_config)
                  for name in _IMPLEMENTATIONS if name.removeprefix("_") not in kwargs]  # fmt: skip
        super().__init__(**kwargs)
        for part, name, value in chosen:
            if value is not None:
                setattr(part, name, value)

    @property
    def image_size(self) -> int:
        """Tile side in pixels."""
        return self.force_image_size or self.vision_config.image_size

    def tokens_per_tile(self, num_tiles: int) -> list[int]:
        """Visual tokens of each of `num_tiles` tiles: the one owner of this count (256 each for 448/14/0.5)."""
        patches = (self.image_size // self.vision_config.patch_size) ** 2
        return [int(patches * self.downsample_ratio**2)] * num_tiles

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PretrainedConfig:
        """Returns `llm_config`, which caches, context checks and trainers read."""
        return self.llm_config

    def to_dict(self) -> dict[str, Any]:
        """As the base class, plus what transformers 4 and other tools need to read the nested files correctly."""
        output = super().to_dict()
        if output.get("system_message") is None:  # the original code would put the word "None" into the prompt
            output.pop("system_message", None)
        llm = output["llm_config"]
        if isinstance(llm, dict):
            llm.update({k: v for k, v in _legacy_rope(llm.get("rope_parameters")).items() if k not in llm})
            for name, older in _NAMES_IN_4.get(llm.get("model_type"), {}).items():
                if name in llm:
                    llm[older] = llm.pop(name)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What `save_pretrained` writes: as the base class, plus the name that transformers 4 has for `dtype`."""
        output = super().to_diff_dict()
        for part in (output, output["vision_config"], output["llm_config"]):
            if part.get("dtype") is not None:
                part["torch_dtype"] = part["dtype"]
        return output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the base class; a caller's `attn_implementation` reaches both towers."""
        config_dict = dict(config_dict)
        for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_autoset"):
            config_dict.pop(key, None)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """Reads `config.json`, of the original layout or of transformers' own InternVL.

        Raises:
            ValueError: the folder holds another kind of checkpoint.
            NativeLayoutError: a native checkpoint that this model cannot represent.
        """
        config_dict, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        found = config_dict.get("model_type", cls.model_type)
        if is_native(config_dict):
            config_dict = config_from_native(config_dict)
        elif found != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} holds a {found!r} checkpoint, not {cls.model_type!r}. Load it with "
                "the class of its own format, or point to the original-layout repository."
            )
        return cls.from_dict(config_dict, **kwargs)


InternVLChatConfig.register_for_auto_class()
