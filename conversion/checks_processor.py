"""What the doctor says of the files that decide about pixels and stop tokens: processors and generation settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..generation_internvl import id_list
from ..image_processing_internvl import NORMALIZATIONS
from ..prompting_internvl import prompt_encoder
from .checks import CONFIG, Finding, Subject, note, problem
from .checks_settings import impossible_ids
from .processors import FILE, NOT_NATIVE, SavedProcessor

_IMAGENET = NORMALIZATIONS["imagenet"]
_NEW_PROCESSOR = f"--fix OUT writes processor_config.json from {CONFIG}"
_BICUBIC = 3
# Field of the configuration -> its names in processor files.
_TILING = {
    "min_dynamic_patch": ("min_dynamic_patch", "min_num", "min_patches"),
    "max_dynamic_patch": ("max_dynamic_patch", "max_num", "max_patches"),
    "use_thumbnail": ("use_thumbnail",),
    "dynamic_image_size": ("dynamic_image_size",),
    "pad2square": ("pad2square",),
}
_SETTINGS = {**_TILING, "image_size": ("image_size", "size", "crop_size")}


def check_processor(subject: Subject) -> Iterator[Finding]:
    """Whether the processor's files cut and normalise images as the model expects."""
    if not subject.chat or subject.config is None:
        return
    processor, image = subject.read("processor_config.json"), subject.read("preprocessor_config.json")
    video = subject.read("video_preprocessor_config.json")
    files = [
        ("processor_config.json", processor.get("image_processor") or {}),
        ("preprocessor_config.json", image),
        ("processor_config.json (video)", processor.get("video_processor") or {}),
        ("video_preprocessor_config.json", video),
    ]
    files = [(file, values) for file, values in files if values]
    if not (files or processor):
        message = f"no processor_config.json or preprocessor_config.json; here the processor follows {CONFIG}"
        yield note("processor", message, _NEW_PROCESSOR)
        return
    saved = SavedProcessor.open(subject.folder)
    found = [*_whole(subject, processor), *_saved(subject, saved)]
    for file, values in files:
        found += [*_pixels(subject, file, values, saved), *_tiles(subject, file, values)]
    yield from found
    if not any(finding.level == "problem" for finding in found):
        size, most = subject.config.image_size, subject.config.max_dynamic_patch
        names = " and ".join(dict.fromkeys(file.split(" ")[0] for file, _ in files)) or "processor_config.json"
        yield Finding("processor", "ok", f"{names}: tiles of {size} px, at most {most}, as {CONFIG} says")


def _whole(subject: Subject, values: dict[str, Any]) -> Iterator[Finding]:
    """Fields of the processor itself."""
    config = subject.config
    tokens = config.tokens_per_tile(1)[0]
    wanted = {"num_image_token": tokens, "image_seq_length": tokens, "template": config.template}
    wanted["system_message"] = config.system_message
    for name, value in wanted.items():
        if name in values and values[name] != value:
            message = f"processor_config.json: {name} is {values[name]!r}, but {CONFIG} gives {value!r}"
            yield problem("processor", message, _NEW_PROCESSOR)
    said = subject.values.get("image_seq_length", tokens)
    if said != tokens:
        message = f"{CONFIG}: image_seq_length is {said}, but a tile has {tokens} visual tokens"
        yield problem("processor", message, f"set image_seq_length to {tokens}")


def _saved(subject: Subject, saved: SavedProcessor) -> Iterator[Finding]:
    """Whether the processor loads, and what it says that no other file does."""
    if saved.error:
        yield problem("processor", f"{FILE}: no processor can be made of it: {saved.error}", _NEW_PROCESSOR)
    written = subject.read(FILE).get("image_processor") or subject.read("preprocessor_config.json")
    for name, (value, wanted) in saved.overruled(subject.config).items():
        if name in _SETTINGS and all(written.get(alias) is None for alias in _SETTINGS[name]):
            message = f"{FILE}: no {name}, which then is {value}, but {CONFIG} says {wanted}"
            yield problem("processor", message, _NEW_PROCESSOR)
    unusual = saved.unusual(subject.config)
    if unusual:
        shown = ", ".join(f"{name} {value}" for name, value in unusual.items())
        lost = [name for name in unusual if name in NOT_NATIVE] if subject.kind == "native" else []
        tail = f"; transformers' own processor does not apply {', '.join(lost)}" if lost else ""
        message = f"{FILE}: {shown}, unlike every release{tail}"
        yield note("processor", message, "nothing, if it was set on purpose: --fix OUT keeps it")


def _pixels(subject: Subject, file: str, values: dict[str, Any], saved: SavedProcessor) -> Iterator[Finding]:
    size = subject.config.image_size
    sizes = {edge for name in ("image_size", "size", "crop_size") for edge in _edges(values.get(name))}
    if sizes - {size}:
        message = f"{file}: size {sorted(sizes - {size})[0]}, but the model's tiles have {size} pixels"
        yield problem("processor", message, _NEW_PROCESSOR)
    if saved.image is None:
        reference, whose = _IMAGENET, "InternVL is trained with ImageNet's"
    else:
        reference, whose = (saved.image.image_mean, saved.image.image_std), f"the processor of {FILE} has"
    for name, wanted in zip(("image_mean", "image_std"), reference, strict=True):
        given = values.get(name)
        if given is not None and (
            len(given) != 3 or any(abs(a - b) > 1e-4 for a, b in zip(given, wanted, strict=True))
        ):
            message = f"{file}: {name} is {given}, but {whose} {list(wanted)}"
            yield problem("processor", message, _NEW_PROCESSOR)
    if values.get("resample", _BICUBIC) != _BICUBIC:
        message = f"{file}: resample {values['resample']}, but InternVL resizes bicubically ({_BICUBIC})"
        yield problem("processor", message, _NEW_PROCESSOR)


def _edges(size: Any) -> list[int]:
    if isinstance(size, dict):
        return [value for value in size.values() if isinstance(value, int)]
    return [size] if isinstance(size, int) else []


def _tiles(subject: Subject, file: str, values: dict[str, Any]) -> Iterator[Finding]:
    kind = str(values.get("image_processor_type") or values.get("feature_extractor_type") or "")
    if kind.startswith("CLIP"):
        message = f"{file}: {kind} makes one tile of an image; AutoProcessor then gives the tokenizer alone"
        yield note("processor", message, _NEW_PROCESSOR)
    if kind.startswith("GotOcr2") and values.get("crop_to_patches") is False:
        message = f"{file}: crop_to_patches is false; used without its processor it makes one tile of an image"
        yield note("processor", message, "set crop_to_patches to true")
    for field, names in _TILING.items():
        wanted = getattr(subject.config, field)
        for name in names:
            if name in values and values[name] != wanted:
                message = f"{file}: {name} is {values[name]}, but {CONFIG} says {field} {wanted}"
                yield problem("processor", message, _NEW_PROCESSOR)


# ---------------------------------------------------------------------------------------------------------- generation
def check_generation(subject: Subject) -> Iterator[Finding]:
    """Whether plain `generate` stops where the template ends an answer."""
    template = subject.template if subject.chat else None
    if template is None or subject.tokenizer is None:
        return
    end = prompt_encoder(subject.tokenizer).token_id(template.end_of_turn)
    file, fix = "generation_config.json", "--fix OUT writes every stop token"
    values = subject.read(file)
    wrong = [sentence for _, sentence in impossible_ids(values, subject.rows)]
    for sentence in wrong:
        yield problem("generation", f"{file}: {sentence}", f"correct {file}, or remove it, then --fix OUT writes one")
    if wrong:
        return
    default = id_list(subject.config.llm_config.eos_token_id)
    stops = id_list(values.get("eos_token_id")) or default
    covered = end is None or end in stops
    where = f"eos_token_id {stops or None}" + ("" if values.get("eos_token_id") is not None else f" from {CONFIG}")
    turn = f"the end of a turn, {template.end_of_turn} ({end})"
    if not subject.has(file):
        tail = "covers" if covered else "does not cover"
        message = f"no {file}: plain generate() stops at {where}, which {tail} {turn}; chat() adds what is missing"
        yield note("generation", message, fix)
    elif covered:
        yield Finding("generation", "ok", f"{file}: {where} covers {turn}")
    else:
        yield problem("generation", f"{file}: {where} does not cover {turn}: plain generate() runs on", fix)
