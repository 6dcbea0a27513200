"""Arguments that outweigh what a checkpoint says of its template, tiles and encoder: checked, then applied.

Configuration and processor always agree: what overrides a field of one overrides it in both, and what contradicts the
configuration is refused before any weights are loaded. No weights are read or changed here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from ..checkpoint_internvl import read_json
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversation import get_template, template_names
from ..image_processing_internvl import InternVLImageProcessor
from ..processing_internvl import InternVLProcessor, image_settings
from ..prompting_internvl import prompt_encoder
from .arguments import ModelArguments

# Argument -> field of InternVLChatConfig.
OVERRIDES = {
    "conv_style": "template",
    "force_image_size": "force_image_size",
    "down_sample_ratio": "downsample_ratio",
    "vision_select_layer": "select_layer",
    "ps_version": "ps_version",
    "dynamic_image_size": "dynamic_image_size",
    "use_thumbnail": "use_thumbnail",
    "min_dynamic_patch": "min_dynamic_patch",
    "max_dynamic_patch": "max_dynamic_patch",
}


def apply_overrides(config: InternVLChatConfig, arguments: ModelArguments) -> None:
    """Writes the arguments that are not None into a configuration and checks what it says then.

    Raises:
        ValueError: a value that no weights could follow. TemplateError: an unknown `conv_style`.
    """
    for argument, field in OVERRIDES.items():
        if getattr(arguments, argument) is not None:
            setattr(config, field, getattr(arguments, argument))
    _set_drop_path(config.vision_config, arguments)
    if arguments.conv_style is not None:
        get_template(arguments.conv_style)
    if config.ps_version not in ("v1", "v2"):
        raise ValueError(f"ps_version must be v1 or v2, got {config.ps_version!r}")
    _check_grid(config)
    layers = config.vision_config.num_hidden_layers
    if not -layers - 1 <= config.select_layer <= layers:
        raise ValueError(
            f"vision_select_layer={config.select_layer} is outside the {layers + 1} hidden states of the encoder: "
            f"give one of {-layers - 1} to {layers}, -1 for the last"
        )
    if not 1 <= config.min_dynamic_patch <= config.max_dynamic_patch:
        raise ValueError(
            f"need 1 <= min_dynamic_patch <= max_dynamic_patch, got {config.min_dynamic_patch} and "
            f"{config.max_dynamic_patch}"
        )


def _set_drop_path(vision: PretrainedConfig, arguments: ModelArguments) -> None:
    rate = arguments.drop_path_rate
    if rate is None:
        return
    if not 0 <= rate < 1:
        raise ValueError(f"drop_path_rate must be at least 0 and below 1, got {rate}")
    vision.drop_path_rate = rate


def _check_grid(config: InternVLChatConfig) -> None:
    ratio, size, patch = config.downsample_ratio, config.image_size, config.vision_config.patch_size
    if not 0 < ratio <= 1 or abs(round(1 / ratio) * ratio - 1) > 1e-6:
        raise ValueError(f"down_sample_ratio must be 1, 1/2, 1/3 or another 1/n, got {ratio}")
    step = patch * round(1 / ratio)
    if size < step or size % step:
        below = max(size // step, 1) * step
        raise ValueError(
            f"force_image_size={size} does not cut into patches of {patch} pixels, {round(1 / ratio)} by "
            f"{round(1 / ratio)} of them a token (down_sample_ratio {ratio}): take {below} or {below + step}"
        )


def patches_per_token(config: InternVLChatConfig) -> int:
    """Patches that one visual token is made of."""
    return round(1 / config.downsample_ratio) ** 2


def check_template(config: InternVLChatConfig, tokenizer: Any) -> None:
    """Refuses a template whose end of turn the tokenizer does not know.

    Raises:
        ValueError: it does not. TemplateError: there is no such template.
    """
    end = get_template(config.template).end_of_turn
    if prompt_encoder(tokenizer).token_id(end) is None:
        raise ValueError(
            f"conv_style={config.template!r} ends turns with {end!r}, which is no token of the tokenizer, so the "
            "model could never learn to stop: choose the template of this language model, or add the token first"
        )


def ask_for_template(tokenizer: Any) -> str:
    """Raises the ValueError for a missing `conv_style`, with the templates that fit."""
    encoder = prompt_encoder(tokenizer)
    fit = [name for name in template_names() if encoder.token_id(get_template(name).end_of_turn) is not None]
    raise ValueError(
        "conv_style is needed: a language model alone does not say how its chats are written. Templates whose end of "
        f"turn its tokenizer knows: {', '.join(fit) or 'none'}"
    )


def make_processor(
    config: InternVLChatConfig, tokenizer: Any, arguments: ModelArguments, folder: Path | None
) -> InternVLProcessor:
    """The processor of the configuration, with what a checkpoint's saved one says beyond it."""
    file = None if folder is None else folder / "processor_config.json"
    saved = read_json(file) if file is not None and file.is_file() else {}
    settings, template = image_settings(config), None
    if folder is not None and ("template" in saved or "image_seq_length" in saved):
        own = InternVLImageProcessor.from_pretrained(folder)
        given = {field for argument, field in OVERRIDES.items() if getattr(arguments, argument) is not None}
        settings = {name: value for name, value in settings.items() if name in given | {"image_size"}}
        kept = ("image_processor_type", "processor_class", "auto_map")
        settings = {**{k: v for k, v in own.to_dict().items() if k not in kept}, **settings}
        jinja = folder / "chat_template.jinja"
        if "template" in saved and arguments.conv_style is None and jinja.is_file():
            template = jinja.read_text(encoding="utf-8")
    return InternVLProcessor(
        InternVLImageProcessor(**settings),
        tokenizer,
        template=config.template,
        num_image_token=config.tokens_per_tile(1)[0],
        system_message=config.system_message,
        chat_template=template,
    )
