"""The files beside the weights that transformers' own InternVL classes read: configuration, processor, template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint_internvl import read_json
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversation import IMAGE_PLACEHOLDER
from ..image_processing_internvl import InternVLImageProcessor
from ..native_internvl import config_to_native
from ..prompting_internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN
from ..upload_to_hub import write_json
from .processors import NOT_NATIVE, OUTPUTS, SavedProcessor

_VIDEO_TOKEN = "<video>"
# The native processor reads these attributes of its tokenizer.
_NAMED_TOKENS = {
    "start_image_token": IMG_START_TOKEN,
    "end_image_token": IMG_END_TOKEN,
    "context_image_token": IMG_CONTEXT_TOKEN,
    "video_token": _VIDEO_TOKEN,
}
_BICUBIC = 3


def write_native_files(
    folder: Path, config: InternVLChatConfig, tokenizer: Any, saved: SavedProcessor
) -> tuple[str, ...]:
    """Writes `config.json`, processor files and chat template, and names the image tokens in the tokenizer's file.

    Args:
        folder: Already holds the tokenizer's files.
        config: Of the original layout, with the id of `<IMG_CONTEXT>`.
        tokenizer: Of the folder.
        saved: Processor of the checkpoint. Settings of it that the native processor does not have are written into its
            files all the same: it passes them over, and this package's reads them.

    Returns:
        One sentence for each setting that is changed or that the native processor does not apply.
    """
    write_json(folder / "config.json", config_to_native(config))
    ours = saved.processor(config, tokenizer)
    beyond = {name: value for name, value in saved.unusual(config).items() if name in NOT_NATIVE}
    if not config.dynamic_image_size:
        beyond["dynamic_image_size"] = False
    (folder / "chat_template.jinja").write_text(native_template(ours.chat_template), encoding="utf-8")
    image, video = _image_processor(ours.image_processor), _video_processor(ours.image_processor)
    image |= {name: value for name, value in beyond.items() if name != OUTPUTS}
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": config.tokens_per_tile(1)[0]}
    processor |= {name: value for name, value in beyond.items() if name == OUTPUTS}
    write_json(
        folder / "processor_config.json",
        {**processor, "image_processor": image, "video_processor": video},
    )
    # transformers 4 and inference engines look for these.
    write_json(folder / "preprocessor_config.json", {**image, "processor_class": "InternVLProcessor"})
    write_json(folder / "video_preprocessor_config.json", {**video, "processor_class": "InternVLProcessor"})
    path = folder / "tokenizer_config.json"
    values = read_json(path)
    values.pop("chat_template", None)
    write_json(path, {**values, "extra_special_tokens": _NAMED_TOKENS, "processor_class": "InternVLProcessor"})
    kept = (f"{name} {value!r} is kept, but transformers' own does not apply it" for name, value in beyond.items())
    return (*saved.changes(config), *kept)


def native_template(template: str) -> str:
    """A chat template of this package with the native placeholders: one per image, one per video."""
    video = (
        "{%- for frame in part.video or part.frames -%}\n"
        "                    {{- 'Frame-' ~ loop.index ~ ': <image>\\n' -}}\n"
        "                {%- endfor -%}"
    )
    if video not in template or IMAGE_PLACEHOLDER not in template:
        raise ValueError("this chat template is not one that the package wrote: its video part was not found.")
    template = template.replace(video, f"{{{{- '{_VIDEO_TOKEN}\\n' -}}}}")
    return template.replace(IMAGE_PLACEHOLDER, IMG_CONTEXT_TOKEN)


def _shared(processor: InternVLImageProcessor) -> dict[str, Any]:
    side = processor.image_size
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(processor.image_mean),
        "image_std": list(processor.image_std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }


def _image_processor(processor: InternVLImageProcessor) -> dict[str, Any]:
    return {
        **_shared(processor),
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": processor.dynamic_image_size,
        "min_patches": processor.min_dynamic_patch,
        "max_patches": processor.max_dynamic_patch,
        **({} if processor.use_thumbnail else {"use_thumbnail": False}),  # of one tile: there never is a thumbnail
    }


def _video_processor(processor: InternVLImageProcessor) -> dict[str, Any]:
    return {**_shared(processor), "video_processor_type": "InternVLVideoProcessor"}
