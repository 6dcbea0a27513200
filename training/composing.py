"""A model from parts: an encoder and a language model, each of its own or out of a chat checkpoint, and a projector.

Nothing here decides which parts a run has (`building`) or looks at tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..checkpoint_internvl import read_json, scan_files
from ..configuration_intern_vit import InternVisionConfig
from ..configuration_internvl_chat import InternVLChatConfig, build_llm_config, build_vision_config
from ..conversion.folders import resolve
from ..conversion.source import Source, open_checkpoint
from ..modeling_intern_vit import InternVisionModel
from ..modeling_internlm2 import InternLM2ForCausalLM
from ..modeling_internvl_chat import InternVLChatModel
from ..native_internvl import NATIVE_MODEL_TYPE
from .arguments import ModelArguments

# How images become tokens: what every release since 2.5 says, unless the vision encoder comes from a chat checkpoint.
_IMAGE_FIELDS = {
    "select_layer": -1,
    "ps_version": "v2",
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "use_thumbnail": True,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 12,
    "pad2square": False,
    "force_image_size": None,
}
_CHAT_TYPES = (InternVLChatConfig.model_type, NATIVE_MODEL_TYPE)


@dataclass(frozen=True)
class Origin:
    """Where a tower comes from: its own checkpoint, or a chat checkpoint, which is opened without reading weights."""

    folder: Path
    chat: Source | None

    @classmethod
    def of(cls, name_or_path: str) -> Origin:
        folder = resolve(name_or_path)
        chat = read_json(folder / "config.json").get("model_type") in _CHAT_TYPES
        return cls(folder, open_checkpoint(folder) if chat else None)

    def load(self, kind: type[PreTrainedModel], config: PretrainedConfig, prefix: str, **options: Any) -> Any:
        """`from_pretrained` that reads this tower alone and refuses what it would fill with random weights."""
        where: dict[str, Any] = {"pretrained_model_name_or_path": self.folder}
        if self.chat is not None:
            own = {name: x for name, x in self.chat.tensors.items() if name.startswith(prefix)}
            tensors = {name.removeprefix(prefix): x for name, x in own.items()}
            where = {"pretrained_model_name_or_path": None, "state_dict": tensors}
        loaded: Any = kind.from_pretrained(**where, config=config, output_loading_info=True, **options)
        model, report = loaded
        wrong = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
        if wrong:
            raise ValueError(
                f"{self.folder} lacks weights of its {kind.__name__}, or has them in other shapes: {wrong[:3]}"
            )
        return model


def config_of_parts(arguments: ModelArguments, llm: Origin, vision: Origin | None) -> InternVLChatConfig:
    """The configuration before overrides; `arguments.config` outweighs what a chat checkpoint says of images."""
    described = dict(arguments.config or {})
    if "llm_config" in described:
        raise ValueError("config['llm_config'] and llm_path exclude one another: the language model has its own")
    if vision is not None and "vision_config" in described:
        raise ValueError("config['vision_config'] and vision_path exclude one another: the encoder has its own")
    images = vision.chat.config if vision is not None and vision.chat is not None else None
    if images is not None:
        vision_config = images.vision_config
    elif vision is not None:
        vision_config = InternVisionConfig.from_pretrained(vision.folder)
    else:
        vision_config = build_vision_config(described.pop("vision_config", None))
    talk = llm.chat.config if llm.chat is not None else None
    llm_config = build_llm_config(read_json(llm.folder / "config.json")) if talk is None else talk.llm_config
    fields: dict[str, Any] = {name: getattr(images, name, value) for name, value in _IMAGE_FIELDS.items()}
    fields = {**fields, "template": getattr(talk, "template", None), **described}
    config = InternVLChatConfig(vision_config=vision_config, llm_config=llm_config, **fields)
    config.force_image_size = config.image_size
    config.template = arguments.conv_style or config.template
    return config


def compose(
    config: InternVLChatConfig, vision_model: InternVisionModel, language_model: PreTrainedModel
) -> InternVLChatModel:
    """The model around two loaded towers, with a fresh projector that starts as in the original: torch's own way."""
    # Not by a new configuration around theirs: that would set their attention implementation to None, without which
    # transformers makes no causal mask.
    config.vision_config, config.llm_config = vision_model.config, language_model.config
    config.vision_config._name_or_path = config.llm_config._name_or_path = ""
    config.dtype, config.architectures = language_model.dtype, [InternVLChatModel.__name__]
    model = InternVLChatModel(config, vision_model=vision_model, language_model=language_model)
    for layer in (model.mlp1[0], model.mlp1[1], model.mlp1[3]):
        layer.reset_parameters()  # type: ignore[operator]
    model.mlp1.to(language_model.dtype)
    return model


def language_model_class(config: PretrainedConfig) -> Any:
    """The class of a language model with its output head, by its configuration."""
    internlm2 = config.model_type == InternLM2ForCausalLM.config_class.model_type
    return InternLM2ForCausalLM if internlm2 else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def resize_positions(model: InternVLChatModel, size: int) -> None:
    """Interpolates the position embeddings of the encoder to tiles of `size` pixels, in place."""
    vision = model.config.vision_config
    if size != vision.image_size:
        model.vision_model.resize_pos_embeddings(vision.image_size, size, vision.patch_size)


@torch.no_grad()
def load_projector(model: InternVLChatModel, path: str | Path) -> None:
    """Loads `mlp1` from a chat checkpoint of any layout, or from a file with its weights.

    Args:
        model: Its projector is overwritten.
        path: Folder or repository, or a `.safetensors`, `.bin` or `.pth` file whose names are those of `mlp1` alone
            (`0.weight`, as the original saves it) or of a model that has it (`mlp1.0.weight`).

    Raises:
        ValueError: weights are missing, or of other shapes than the model's.
    """
    file = Path(path)
    tensors = scan_files([file]).checked().tensors if file.is_file() else open_checkpoint(path).tensors
    prefixed = {name.removeprefix("mlp1."): x for name, x in tensors.items() if name.startswith("mlp1.")}
    found = prefixed or tensors
    wanted = model.mlp1.state_dict()
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"mlp_path={path} has no mlp1 weights {missing}: give a chat checkpoint or a file of them")
    for name, parameter in wanted.items():
        if tuple(found[name].shape) != tuple(parameter.shape):
            raise ValueError(
                f"mlp_path={path}: mlp1.{name} has shape {tuple(found[name].shape)}, the model needs "
                f"{tuple(parameter.shape)}. Its encoder, language model and down_sample_ratio must be those it is "
                "trained with; leave mlp_path out for a fresh projector"
            )
        parameter.copy_(found[name].read())
