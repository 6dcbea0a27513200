"""What the metadata of GGUF files should say for a checkpoint: architecture, image processing, vocabulary, template.

Each function compares one kind of field and yields findings. Keys are those that llama.cpp reads (for the encoder in
`tools/mtmd/clip.cpp`); fields that only describe (names, licences, file type) are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ...prompting_internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, prompt_encoder
from ..checks import TOKENIZER_CONFIG, Finding, Subject, problem
from .files import GgufModel
from .tensors import ARCHITECTURES

AREA = "gguf"
CONVERT_AGAIN = "convert the checkpoint again with llama.cpp's convert_hf_to_gguf.py"
PROCESSORS = ("processor_config.json", "preprocessor_config.json")  # as the converter prefers them
# Where a file does not say, llama.cpp takes these; likewise _DEFAULT_IDS.
DEFAULT_TILES = {"min": 1, "max": 12}
# Tokens that the model's text is made of and that must not be cut up.
TOKENS = (IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>")
# By these texts llama.cpp recognises ends of turns itself.
ENDS = ("<|im_end|>", "<|end|>", "<|eot_id|>", "<|return|>", "<|endoftext|>", "</s>", "<end_of_turn>")
_CONTROL, _USER_DEFINED = 3, 4
_TOKENS, _TYPES, _TEMPLATE = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.chat_template"
_DEFAULT_IDS = {"bos": 1, "eos": 2}
_NUL = "\x00"  # the converter writes another sign for it


def image_statistics(subject: Subject) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of the pixels as the converter finds them; None where no file has them."""
    for name in PROCESSORS:
        values = subject.read(name)
        values = values | (values.get("image_processor") or {})
        if "image_mean" in values and "image_std" in values:
            return list(values["image_mean"]), list(values["image_std"])
    return None


def vision_fields(subject: Subject) -> dict[str, Any]:
    """Metadata of the encoder's file."""
    config, vision = subject.config, subject.config.vision_config
    mean, std = image_statistics(subject) or (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    return {
        "clip.has_vision_encoder": True,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": vision.num_hidden_layers,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": vision.layer_norm_eps,
        "clip.vision.projection_dim": config.llm_config.hidden_size,
        "clip.vision.projector.scale_factor": round(1 / config.downsample_ratio),
        "clip.vision.image_mean": list(mean),
        "clip.vision.image_std": list(std),
    }


def check_vision(subject: Subject, model: GgufModel) -> Iterator[Finding]:
    """Everything that llama.cpp reads of the encoder's file but its tensors."""
    found = model.values.get("clip.projector_type") or model.values.get("clip.vision.projector_type")
    if found != "internvl":
        yield _wrong(model, "clip.projector_type", found, "internvl")
    yield from _compare(model, vision_fields(subject))
    activation = subject.config.vision_config.hidden_act
    said = [name for name in ("gelu", "silu") if model.values.get(f"clip.use_{name}")]
    if said != [activation]:
        yield _wrong(model, "clip.use_gelu and clip.use_silu", " and ".join(said) or "neither", activation)
    for end, default in DEFAULT_TILES.items():
        key, wanted = f"clip.vision.preproc_{end}_tiles", getattr(subject.config, f"{end}_dynamic_patch")
        tiles = model.values.get(key, default)
        if tiles != wanted:
            shown = tiles if key in model.values else f"missing, which means {tiles}"
            yield _wrong(model, key, shown, wanted)


def text_fields(subject: Subject) -> dict[str, Any]:
    """Metadata of the language model's file, keys without the architecture."""
    llm = subject.config.llm_config
    rope = getattr(llm, "rope_parameters", None) or {}
    fields = {
        "block_count": llm.num_hidden_layers,
        "context_length": llm.max_position_embeddings,
        "embedding_length": llm.hidden_size,
        "feed_forward_length": llm.intermediate_size,
        "attention.head_count": llm.num_attention_heads,
        "attention.head_count_kv": llm.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": llm.rms_norm_eps,
        "rope.freq_base": rope.get("rope_theta"),
        "expert_count": getattr(llm, "num_experts", None) or getattr(llm, "num_local_experts", None),
        "expert_used_count": getattr(llm, "num_experts_per_tok", None),
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        fields |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope.get("factor")}
    return {key: value for key, value in fields.items() if value is not None}


def check_text(subject: Subject, model: GgufModel) -> Iterator[Finding]:
    """What the language model's file says of its architecture."""
    llm, name = subject.config.llm_config, model.values.get("general.architecture")
    wanted = ARCHITECTURES.get(llm.architectures[0])
    if wanted is None:
        return
    if name != wanted:
        yield _wrong(model, "general.architecture", name, wanted)
        return
    yield from _compare(model, {f"{name}.{key}": value for key, value in text_fields(subject).items()})
    heads = llm.hidden_size // llm.num_attention_heads
    wanted_size, key = getattr(llm, "head_dim", None) or heads, f"{name}.attention.key_length"
    if (said := model.values.get(key, heads)) != wanted_size:
        yield _wrong(model, key, said, wanted_size)


def _compare(model: GgufModel, wanted: dict[str, Any]) -> Iterator[Finding]:
    for key, value in wanted.items():
        found = model.values.get(key)
        if not _equal(found, value):
            yield _wrong(model, key, "missing" if key not in model.values else found, value)


def _equal(found: Any, wanted: Any) -> bool:
    """Numbers as GGUF stores them, in single precision."""
    if isinstance(wanted, list):
        return isinstance(found, list) and len(found) == len(wanted) and all(map(_equal, found, wanted))
    if isinstance(wanted, float) and isinstance(found, (int, float)):
        return math.isclose(found, wanted, rel_tol=1e-6)
    return bool(found == wanted)


def _wrong(model: GgufModel, key: str, found: Any, wanted: Any) -> Finding:
    return problem(AREA, f"{model.name}: {key} is {found}, the checkpoint has {wanted}", CONVERT_AGAIN)


# ---------------------------------------------------------------------------------------------------------- vocabulary


def check_vocabulary(subject: Subject, model: GgufModel) -> Iterator[Finding]:
    """Every token's text, the kinds of the tokens of images, the ends of turns, the token before a text."""
    tokens, tokenizer = model.values.get(_TOKENS), subject.tokenizer
    if not isinstance(tokens, list):
        yield problem(AREA, f"{model.name}: it has no vocabulary ({_TOKENS})", CONVERT_AGAIN)
        return
    if subject.rows is not None and len(tokens) != subject.rows:
        yield _wrong(model, "the number of tokens", len(tokens), f"{subject.rows} rows in its embedding table")
    if tokenizer is None:
        fix = "mend the tokenizer: internvl doctor says more"
        yield problem(AREA, f"the checkpoint's tokenizer cannot be loaded: {subject.tokenizer_error}", fix)
        return
    yield from _texts(model, tokens, tokenizer)
    yield from _kinds(model, tokens, tokenizer)
    yield from _ends(subject, model, tokens)
    yield from _beginning(model, tokenizer)


def _texts(model: GgufModel, tokens: list[str], tokenizer: Any) -> Iterator[Finding]:
    ids = range(min(len(tokenizer), len(tokens)))
    own = tokenizer.convert_ids_to_tokens(list(ids))
    wrong = [i for i in ids if own[i] not in (None, tokens[i], _NUL) and tokenizer.decode([i]) != tokens[i]]
    if len(tokenizer) > len(tokens):
        yield _wrong(model, "the number of tokens", len(tokens), f"a tokenizer of {len(tokenizer)}")
    if wrong:
        shown = ", ".join(f"{i} is {tokens[i]!r}, not {own[i]!r}" for i in wrong[:3])
        more = ", ..." if len(wrong) > 3 else ""
        yield problem(AREA, f"{model.name}: {len(wrong)} tokens have other texts: {shown}{more}", CONVERT_AGAIN)


def _kinds(model: GgufModel, tokens: list[str], tokenizer: Any) -> Iterator[Finding]:
    kinds = model.values.get(_TYPES) or []
    encoder = prompt_encoder(tokenizer)
    ids = {token: number for token in TOKENS if (number := encoder.token_id(token)) is not None}
    plain = [t for t, i in ids.items() if i >= len(kinds) or kinds[i] not in (_CONTROL, _USER_DEFINED)]
    if plain:
        message = f"{model.name}: {', '.join(plain)} are no special tokens there, so prompts would be cut up at them"
        yield problem(AREA, message, f"declare them in {TOKENIZER_CONFIG} (internvl upgrade does), and convert again")


def _ends(subject: Subject, model: GgufModel, tokens: list[str]) -> Iterator[Finding]:
    """An answer must end where it ends here; the converter may prefer the end of a turn to the tokenizer's eos."""
    tokenizer, template = subject.tokenizer, subject.template
    end = prompt_encoder(tokenizer).token_id(template.end_of_turn.strip()) if template else None
    key = "tokenizer.ggml.eos_token_id"
    eos = model.values.get(key, _DEFAULT_IDS["eos"] if _sentencepiece(model) else None)
    if eos not in {tokenizer.eos_token_id, end} - {None}:
        yield _wrong(model, key, eos, tokenizer.eos_token_id)
    known = {eos, *(model.values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))}
    if template and end is not None and end not in known and template.end_of_turn.strip() not in ENDS:
        message = (
            f"{model.name}: {template.end_of_turn.strip()!r} ({end}) ends turns, but llama.cpp would not stop at it"
        )
        yield problem(AREA, message, f"set {key} to {end} (gguf_set_metadata.py of the package gguf)")


def _beginning(model: GgufModel, tokenizer: Any) -> Iterator[Finding]:
    """Whether a text gets a token in front; llama.cpp's own default depends on the kind of vocabulary."""
    first = (tokenizer("a").input_ids or [None])[0]
    wanted = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    key = "tokenizer.ggml.add_bos_token"
    said = model.values.get(key, _sentencepiece(model))
    if said != wanted:
        yield _wrong(model, key, said if key in model.values else f"missing, which means {said}", wanted)
        return
    key = "tokenizer.ggml.bos_token_id"
    bos = model.values.get(key, _DEFAULT_IDS["bos"] if _sentencepiece(model) else None)
    if wanted and bos != tokenizer.bos_token_id:
        yield _wrong(model, key, bos, tokenizer.bos_token_id)


def _sentencepiece(model: GgufModel) -> bool:
    """Whether llama.cpp takes its defaults for a SentencePiece vocabulary."""
    return model.values.get("tokenizer.ggml.model") == "llama"


def check_chat_template(subject: Subject, model: GgufModel) -> Iterator[Finding]:
    """The chat template, to the letter."""
    wanted, found = getattr(subject.tokenizer, "chat_template", None), model.values.get(_TEMPLATE)
    if wanted is None:
        message = f"{model.name}: the checkpoint has no chat template; llama.cpp needs one for the prompts of training"
        yield problem(AREA, message, "write one into the folder (internvl upgrade does), and convert again")
    elif found != wanted:
        is_missing = "no chat template" if found is None else "another chat template than the checkpoint"
        fix = f"{CONVERT_AGAIN}, or start llama.cpp with --chat-template-file chat_template.jinja"
        yield problem(AREA, f"{model.name}: {is_missing}", fix)
