"""What vLLM, LMDeploy and SGLang expect of tokenizer, templates, stop tokens and quantisation, as rules.

Each rule states a fact about the source of the engines at the versions in `ENGINES`; where engines behave alike, they
share a verdict. Which prompts are right is `checks_template.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..conversation import get_template
from ..generation_internvl import id_list
from ..prompting_internvl import IMG_CONTEXT_TOKEN, prompt_encoder
from .checks import CONFIG, TOKENIZER_CONFIG, Subject, one_line
from .checks_template import chat_templates
from .serving_engines import (
    ALL,
    CLEAN,
    ENGINES,
    LMDEPLOY,
    SGLANG,
    VLLM,
    Verdict,
    is_original,
    language_part,
    needs,
    refuses,
)
from .source import IMAGE_TOKENS

_VIDEO_TOKENS = {
    **dict.fromkeys(("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"), "<|video_pad|>"),
    "GptOssForCausalLM": "<|reserved_200000|>",
}
_QUANTISATION = {
    "vllm": {"awq", "gptq", "fp8", "compressed-tensors", "torchao", "modelopt", "quark", "mxfp4"},
    "lmdeploy": {"awq", "gptq", "fp8", "compressed-tensors", "mxfp4", "smooth_quant"},
    "sglang": {"awq", "gptq", "fp8", "compressed-tensors", "bitsandbytes", "modelopt", "quark", "mxfp4"},
}
_SGLANG_TEMPLATE = "internvl2_5"
_SKIP_LISTS = ("modules_to_not_convert", "ignore", "ignored_layers", "llm_int8_skip_modules")


# ------------------------------------------------------------------------------------------------------------- prompts


def tokens(subject: Subject) -> Iterator[Verdict]:
    """the tokens of images"""
    if subject.tokenizer is None:
        yield refuses(ALL, f"the tokenizer does not load: {subject.tokenizer_error}", "take that of the release")
        return
    encoder = prompt_encoder(subject.tokenizer)
    missing = [token for token in IMAGE_TOKENS if encoder.token_id(token) is None]
    if missing:
        message = f"the tokenizer has no {', '.join(missing)}, between which images are put"
        yield refuses(ALL, message, "take the tokenizer of the release")
    if subject.kind == "native":
        named = subject.read(TOKENIZER_CONFIG).get("extra_special_tokens")
        if not (isinstance(named, dict) and "context_image_token" in named):
            message = f"{TOKENIZER_CONFIG}: extra_special_tokens does not name context_image_token"
            yield refuses(("vllm", "lmdeploy"), message, "internvl convert FOLDER OUT --to native writes it")
        return
    video = _VIDEO_TOKENS.get(subject.config.llm_config.architectures[0])
    if video is None or encoder.token_id(video) is None:
        message = (
            f"no video input: the tokenizer has no {video}" if video else "no video input for this language model"
        )
        fix = "send frames as images; internvl eval and internvl pairs do"
        yield needs(("vllm", "sglang"), message, fix)


def chat_template(subject: Subject) -> Iterator[Verdict]:
    """the chat template"""
    templates = [text for _, text in chat_templates(subject)]
    if not templates:
        yield refuses(("vllm", "lmdeploy"), "no chat template in the folder, and none of its own", CLEAN)
    mark = IMG_CONTEXT_TOKEN if subject.kind == "native" else "<image>"
    for text in templates:
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        try:
            options = {"chat_template": text, "add_generation_prompt": True, **_special_tokens(subject)}
            shown = render_jinja_template([[{"role": "user", "content": content}]], **options)[0][0]
        except Exception as error:  # a template can raise anything
            message = f"the chat template fails on an image part: {one_line(error)}"
            yield refuses(("vllm", "lmdeploy"), message, CLEAN)
            continue
        if shown.count(mark) != 1:
            message = f"the chat template writes {shown.count(mark)} {mark} for an image; it looks for one"
            yield refuses(VLLM, message, CLEAN)
        yield from _two_beginnings(subject, shown)
    if is_original(subject):
        yield from _own_template(subject)


def _two_beginnings(subject: Subject, shown: str) -> Iterator[Verdict]:
    """A prompt that begins with the first token already, and a tokenizer that adds it."""
    if subject.tokenizer is None or subject.tokenizer.bos_token is None:
        return
    first = subject.tokenizer(shown)["input_ids"][:2]
    if first == [subject.tokenizer.bos_token_id] * 2:
        message = f"the chat template writes {subject.tokenizer.bos_token} and the tokenizer adds another"
        fix = "released checkpoints have this too; take the token out of the template in a copy for these engines"
        yield needs(("lmdeploy", "sglang"), message, fix)


def _special_tokens(subject: Subject) -> dict[str, Any]:
    return dict(getattr(subject.tokenizer, "special_tokens_map", {}) or {})


def _own_template(subject: Subject) -> Iterator[Verdict]:
    fix = "start it with --chat-template FOLDER/chat_template.jinja"
    own, template = get_template(_SGLANG_TEMPLATE), subject.template
    same = template is not None and template.name == own.name
    if same and subject.config.system_message in (None, own.system_message):
        message = (
            "it renders prompts itself, with all images before the text: wrong for frames and text between images"
        )
    else:
        message = f"it renders prompts itself, as {own.name}, not as template {subject.config.template!r} says"
    yield needs(SGLANG, message, fix)


def stops(subject: Subject) -> Iterator[Verdict]:
    """the stop tokens"""
    if subject.template is None or subject.tokenizer is None:
        yield refuses(ALL, f"{CONFIG}: template {subject.config.template!r} is unknown", "set that of the release")
        return
    end = prompt_encoder(subject.tokenizer).token_id(subject.template.end_of_turn)
    values = subject.read("generation_config.json")
    known = {*id_list(values.get("eos_token_id")), subject.tokenizer.eos_token_id}
    if end is not None and end not in known:
        message = f"neither generation_config.json nor the tokenizer ends at {subject.template.end_of_turn} ({end})"
        yield refuses(ALL, message + ": answers run on", "--fix OUT writes every stop token")


def processor(subject: Subject) -> Iterator[Verdict]:
    """the processor's files"""
    if subject.kind != "native":
        return  # vLLM, LMDeploy and SGLang cut the images of the original layout with code of their own
    image = subject.read("processor_config.json").get("image_processor") or subject.read("preprocessor_config.json")
    if not image:
        message = "neither processor_config.json nor preprocessor_config.json describes the image processor"
        yield refuses(("vllm", "lmdeploy"), message, "internvl convert FOLDER OUT --to native writes both")
    elif image.get("crop_to_patches") is False:
        message = "the image processor says crop_to_patches false: its largest image is counted as one tile"
        yield needs(VLLM, message, "set crop_to_patches to true")


# -------------------------------------------------------------------------------------------------------- quantisation


def quantisation(subject: Subject) -> Iterator[Verdict]:
    """the quantisation"""
    values = subject.values.get("quantization_config") or language_part(subject)[1].get("quantization_config")
    if not values:
        packed = {str(t.dtype) for t in subject.weights.tensors.values() if t.dtype.itemsize == 1}
        if packed:
            message = f"{CONFIG}: no quantization_config, but tensors are stored as {', '.join(sorted(packed))}"
            yield refuses(ALL, message, "save config.json and weights by one call of save_pretrained")
        return
    method = str(values.get("quant_method"))
    refusing = tuple(engine for engine, methods in _QUANTISATION.items() if method not in methods)
    if refusing:
        others = [ENGINES[engine].title for engine in ENGINES if engine not in refusing]
        fix = f"serve it by {' or '.join(others) or 'transformers'}, or quantise by awq or compressed-tensors"
        yield refuses(refusing, f"{CONFIG}: quant_method {method!r} is none of its methods", fix)
    if method == "smooth_quant":
        yield needs(LMDEPLOY, "TurboMind has no smooth_quant", "it falls back to its PyTorch engine by itself")
    yield from _quantised_tower(subject, values, method)


def _quantised_tower(subject: Subject, values: dict[str, Any], method: str) -> Iterator[Verdict]:
    tower = "vision_tower." if subject.kind == "native" else "vision_model."
    packed = re.compile(r"\.(qweight|qzeros|weight_packed|weight_scale|weight_scale_inv|SCB|absmax)$")
    names = [name for name in subject.weights.tensors if tower in name]
    if any(packed.search(name) for name in names):
        message = f"tensors of {tower[:-1]} are quantised, which it keeps in full precision"
        yield refuses(("lmdeploy", "sglang"), message, "quantise again without the vision tower")
        return
    entries = [str(entry) for key in _SKIP_LISTS for entry in values.get(key) or ()]
    patched = method == "awq" and not entries and "quantization_config" in language_part(subject)[1]
    layer = f"{tower}encoder.layers.0.attn.qkv"
    if method in ("awq", "fp8", "compressed-tensors") and not patched and not _covers(entries, layer):
        message = f"{CONFIG}: quantization_config does not except {tower[:-1]}, though its tensors are not quantised"
        yield refuses(VLLM, message, f"add {tower[:-1]} and the projector to {_SKIP_LISTS[0]} (or ignore)")


def _covers(entries: list[str], layer: str) -> bool:
    for entry in entries:
        if entry.startswith("re:"):
            if re.match(entry[3:], layer):
                return True
        elif entry in layer:
            return True
    return False


PROMPT_RULES = (tokens, chat_template, stops, processor, quantisation)
