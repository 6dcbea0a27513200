"""Reference prompts and pixels of a checkpoint, written down so that other engines can be compared with this package.

A dump holds what comes before the model: prompt texts, ids, tile grids and hashes of pixels for the conversations and
images of `golden_inputs.py`. Nothing that the model computes is in it, so no weights are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image
from transformers import GenerationConfig

from ..checkpoint_internvl import CheckpointError, read_json
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversation import conversation_from_messages, get_template
from ..generation_internvl import generation_options
from ..image_processing_internvl import ImageSettings, InternVLImageProcessor, find_grid, split_tile_budget
from ..processing_internvl import InternVLProcessor
from ..prompting_internvl import TokenizerError, prompt_encoder
from .checks import one_line, quiet
from .folders import resolve, staged_folder
from .golden_inputs import IMAGES, PROMPTS, synthetic_image
from .source import load_tokenizer

FORMAT = 1
FILE = "golden.json"
_VERSIONED = ("internvl-hub", "transformers", "tokenizers", "torch", "pillow", "numpy")


def golden(name_or_path: str | Path, out: str | Path, **hub_options: Any) -> Path:
    """Writes the reference dump of a checkpoint.

    Args:
        name_or_path: A folder of either layout, or a Hub repository; its weights are not fetched.
        out: A folder that is absent or empty; gets `golden.json` and `images/*.png`, less than 300 kB.
        **hub_options: `revision`, `cache_dir`, `token`, `local_files_only`.

    Returns:
        The path of `golden.json`; docs/doctor.md explains its fields.

    Raises:
        CheckpointError: no checkpoint there.
        TokenizerError: its tokenizer does not load, or lacks the image tokens.
        TemplateError: its conversation template is unknown.
        FileExistsError: `out` holds something.
    """
    folder = resolve(name_or_path, weights=False, **hub_options)
    config = InternVLChatConfig.from_pretrained(folder)
    with staged_folder(out) as staged:
        processor = _processor(folder, config)
        images = {name: synthetic_image(*IMAGES[name]) for name in IMAGES}
        record = {
            "format": FORMAT,
            "checkpoint": str(name_or_path),
            "versions": {name: _version(name) for name in _VERSIONED},
            **_settings(folder, config, processor),
            "prompts": {name: prompt_record(processor, messages, images) for name, messages in PROMPTS.items()},
            "images": {name: image_record(processor, image) for name, image in images.items()},
        }
        (staged / "images").mkdir()
        for name, image in images.items():
            image.save(staged / "images" / f"{name}.png", optimize=True)
        (staged / FILE).write_text(_dump(record), encoding="utf-8")
    return Path(out) / FILE


def _processor(folder: Path, config: InternVLChatConfig) -> InternVLProcessor:
    """The checkpoint's processor if this package saved it, else the one that follows from the configuration."""
    try:
        with quiet():
            tokenizer = load_tokenizer(folder)
    except Exception as error:  # the tokenizers library has no narrower one
        cause = one_line(error)
        raise TokenizerError(f"the tokenizer of {folder} does not load ({cause}): run doctor --fix first.") from error
    path = folder / "processor_config.json"
    saved = read_json(path) if path.is_file() else {}
    if "num_image_token" not in saved:
        return InternVLProcessor.from_model_config(config, tokenizer)
    # Not from_pretrained, which would ask whether to run the folder's code.
    fields = {name: saved[name] for name in ("template", "num_image_token", "system_message") if name in saved}
    image_processor = InternVLImageProcessor.from_dict(saved.get("image_processor") or {})
    return InternVLProcessor(image_processor, tokenizer, **fields)


def _settings(folder: Path, config: InternVLChatConfig, processor: InternVLProcessor) -> dict[str, Any]:
    """What decides about prompts, pixels and the end of an answer."""
    template, encoder = get_template(processor.template), prompt_encoder(processor.tokenizer)
    path = folder / "generation_config.json"
    saved = GenerationConfig.from_pretrained(folder) if path.is_file() else GenerationConfig.from_model_config(config)
    end = encoder.token_id(template.end_of_turn)
    options = generation_options(SimpleNamespace(generation_config=saved), processor.tokenizer, end, None)
    system = processor.system_message
    return {
        "template": template.name,
        "system_message": template.system_message if system is None else system,
        "stop_ids": sorted(options["eos_token_id"] or ()),
        "begin_ids": encoder.bos,
        "context_id": encoder.context_id,
        "tokens_per_tile": processor.num_image_token,
        "image_settings": {name: getattr(processor.image_processor, name) for name in asdict(ImageSettings())},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def image_record(processor: InternVLProcessor, image: Image.Image) -> dict[str, Any]:
    """Grid, tile count and hashes of one image.

    `sha256_uint8` is of the tiles before normalisation, (tiles, size, size, 3); `sha256_float32` of `pixel_values`,
    (tiles, 3, size, size), little-endian; both row-major. `grid` is (columns, rows) without the thumbnail.
    """
    settings = processor.image_processor
    pixels = settings([image], return_tensors="np")["pixel_values"]
    mean, std = (np.float64(values).reshape(1, 3, 1, 1) for values in (settings.image_mean, settings.image_std))
    levels = np.rint((pixels * std + mean) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    return {
        "size": list(image.size),
        "mode": image.mode,
        "grid": _grid(settings, image),
        "tiles": len(pixels),
        "sha256_uint8": _sha256(levels),
        "sha256_float32": _sha256(pixels.astype("<f4")),
    }


def _grid(settings: Any, image: Image.Image) -> list[int]:
    if not settings.dynamic_image_size:
        return [1, 1]
    least, most = settings.min_dynamic_patch, settings.max_dynamic_patch
    options = {"image_size": settings.image_size, "no_upscale": settings.no_upscale}
    if settings.max_total_patches is not None:
        shared = {"min_num": least, "max_num": most, "use_thumbnail": settings.use_thumbnail, **options}
        most = split_tile_budget([image.size], settings.max_total_patches, **shared)[0]
    return list(find_grid(*image.size, min(least, most), most, **options))


def _sha256(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def prompt_record(
    processor: InternVLProcessor, messages: list[dict[str, Any]], images: dict[str, Image.Image]
) -> dict[str, Any]:
    """Text, ids and tile counts of one conversation; `images` holds the pictures that it names."""
    template = get_template(processor.template)
    conversation = conversation_from_messages(template, messages, processor.system_message, add_generation_prompt=True)
    output = processor.apply_chat_template(
        _with_images(messages, images),
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors=None,
    )
    return {
        "messages": messages,
        "prompt": conversation.get_prompt(),
        "tiles": [int(number) for number in output.get("num_patches", ())],
        "input_ids": [int(number) for number in output["input_ids"]],
    }


def _with_images(value: Any, images: dict[str, Image.Image]) -> Any:
    """A copy of messages with pictures in place of their names."""
    if isinstance(value, list):
        return [_with_images(item, images) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "image":
        return {**value, "image": images[value["image"]]}
    if value.get("type") == "video":
        return {**value, "video": [images[name] for name in value["video"]]}
    return {key: _with_images(item, images) for key, item in value.items()}


def _dump(record: dict[str, Any]) -> str:
    """JSON with one line for each prompt and image, so that two dumps can be read side by side."""
    lines = []
    for key, value in record.items():
        if key in ("prompts", "images"):
            inner = ",\n".join(f"    {_json(name)}: {_json(entry)}" for name, entry in value.items())
            lines.append(f"  {_json(key)}: {{\n{inner}\n  }}")
        else:
            lines.append(f"  {_json(key)}: {_json(value)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


# ----------------------------------------------------------------------------------------------------------- comparing


def compare_golden(a: str | Path, b: str | Path) -> list[str]:
    """How two dumps differ, in words; empty where they agree.

    Versions and the checkpoint's name do not count. An entry that only one of them has is a difference.

    Args:
        a, b: Folders that `golden` wrote, or their JSON files; another engine writes the same fields.

    Raises:
        CheckpointError: a file is missing or no dump.
    """
    left, right = _load(Path(a)), _load(Path(b))
    output: list[str] = []
    for key in dict.fromkeys((*left, *right)):
        if key in ("format", "checkpoint", "versions"):
            continue
        describe = {"prompts": _prompt_differences, "images": _image_differences}.get(key)
        if describe is None or not (key in left and key in right):
            output += _plain(key, left, right)
            continue
        for name in dict.fromkeys((*left[key], *right[key])):
            if name in left[key] and name in right[key]:
                output += describe(f"{key}.{name}", left[key][name], right[key][name])
            else:
                output += _plain(name, left[key], right[key], f"{key}.")
    return output


def _load(path: Path) -> dict[str, Any]:
    path = path / FILE if path.is_dir() else path
    values = read_json(path)
    if values.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no dump of format {FORMAT} (it says {values.get('format')!r}): write it anew."
        )
    return values


def _plain(key: str, left: dict[str, Any], right: dict[str, Any], where: str = "") -> Iterator[str]:
    label = f"{where}{key}"
    if key not in left or key not in right:
        yield f"{label} is only in the {'first' if key in left else 'second'}"
    elif isinstance(left[key], dict) and isinstance(right[key], dict):
        for inner in dict.fromkeys((*left[key], *right[key])):
            yield from _plain(inner, left[key], right[key], f"{label}.")
    elif left[key] != right[key]:
        yield f"{label} is {left[key]!r} in the first and {right[key]!r} in the second"


def _prompt_differences(label: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[str]:
    texts, ids = (left.get("prompt"), right.get("prompt")), (left.get("input_ids"), right.get("input_ids"))
    for key in ("messages", "tiles"):
        yield from _plain(key, left, right, f"{label}.")
    if texts[0] != texts[1]:
        start = _first(texts[0] or "", texts[1] or "")
        shown = [(text or "")[max(0, start - 10) : start + 30] for text in texts]
        yield f"{label}: the texts differ at character {start}: {shown[0]!r} and {shown[1]!r}"
    if ids[0] != ids[1]:
        start = _first(ids[0] or [], ids[1] or [])
        shown = [(one or [])[start : start + 4] for one in ids]
        cause = ", though the texts are the same" if texts[0] == texts[1] else ""
        lengths = f"{len(ids[0] or [])} and {len(ids[1] or [])} ids"
        yield f"{label}: ids differ at position {start}: {shown[0]} and {shown[1]} ({lengths}){cause}"


def _first(left: Any, right: Any) -> int:
    """The first position at which two sequences differ."""
    same = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(same, min(len(left), len(right)))


def _image_differences(label: str, left: dict[str, Any], right: dict[str, Any]) -> Iterator[str]:
    grids = [f"{'x'.join(map(str, one.get('grid', '?')))} ({one.get('tiles')} tiles)" for one in (left, right)]
    if grids[0] != grids[1]:
        yield f"{label}: cut into {grids[0]} and {grids[1]}"
    elif left.get("sha256_uint8") != right.get("sha256_uint8"):
        yield f"{label}: the same grid {grids[0]}, but other pixels after resizing"
    elif left.get("sha256_float32") != right.get("sha256_float32"):
        yield f"{label}: the same pixels, but normalised to other numbers"
    for key in ("size", "mode"):
        yield from _plain(key, left, right, f"{label}.")
