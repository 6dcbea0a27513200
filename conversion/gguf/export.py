"""Whether a checkpoint can go to llama.cpp: what its converter refuses, and what it would compute differently.

Judged from llama.cpp's source at `LLAMA_CPP`; docs/gguf.md has the facts. Nothing is converted here
(`gguf_convert.py`), no tensor is read, and speed, memory and quantisation are not judged.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checkpoint_internvl import CheckpointError, scan_weights
from ..checks import CONFIG, TOKENIZER_MODEL, Finding, Subject, note, problem, quiet
from ..folders import resolve
from .convert import require_converter
from .metadata import AREA, PROCESSORS, image_statistics
from .tensors import ARCHITECTURES, FEWEST_LAYERS, LLAMA_CPP

__all__ = ["LLAMA_CPP", "check_exportable", "pre_tokenizer"]

# llama.cpp takes RMS norms for the one encoder of this width and depth (InternViT-6B), layer norms for all others.
_RMS_SHAPE = (3200, 45)
# Sizes of the vocabularies, added tokens left out, whose hashes the converter has: Qwen2 to Qwen3, GPT-OSS.
_KNOWN_VOCABULARIES = {151643, 199998}
_SENTENCEPIECE = ("InternLM2ForCausalLM", "Phi3ForCausalLM")
_TO_ORIGINAL, _UPGRADE = "internvl convert FOLDER OUT --to original", "internvl upgrade FOLDER OUT"
_KEEP = "there is no way around it in llama.cpp; serve the model with vLLM or transformers"


def check_exportable(checkpoint: str | Path, converter: str | Path | None = None) -> list[Finding]:
    """What stands between a checkpoint and llama.cpp, before anything is converted.

    Args:
        checkpoint: Folder or Hub repository.
        converter: `convert_hf_to_gguf.py` of a llama.cpp, whose list of tokenizers is then read; it is not run.

    Returns:
        Findings of the area `gguf`. "problem": the converter refuses it, or llama.cpp computes something else; "note":
        holds for every InternVL, or could not be decided; "ok": nothing stands in the way.

    Raises:
        CheckpointError: there is no such checkpoint. FileNotFoundError: there is no such converter.
    """
    if converter is not None:
        require_converter(Path(converter))
    folder = resolve(checkpoint)
    with quiet():
        subject = Subject.open(folder, scan_weights(folder))
        found = list(_layout(subject))
        if not found:
            for rule in (_language_model, _encoder, _activations, _projector, _tiles, _pixels, _dtypes, _rope):
                found += rule(subject)
            found += _tokenizer(subject, converter)
    if not any(finding.level == "problem" for finding in found):
        message = f"{folder.name}: llama.cpp ({LLAMA_CPP}) has everything that this checkpoint computes with"
        found.insert(0, Finding(AREA, "ok", message))
    return [*found, *_always()]


# --------------------------------------------------------------------------------------------------------------- rules


def _layout(subject: Subject) -> Iterator[Finding]:
    if subject.kind == "native":
        yield problem(AREA, "transformers' own layout, whose encoder the converter does not know", _TO_ORIGINAL)
    elif subject.kind == "adapters":
        yield problem(AREA, "LoRA adapters are stored in the weights, which the converter cannot name", _UPGRADE)
    elif subject.kind != "original":
        yield problem(AREA, f"{CONFIG}: not an InternVL with its language model", "give a whole model")
    elif subject.config is None:
        yield problem(AREA, f"{CONFIG} cannot be read: {subject.config_error}", f"correct {CONFIG}")
    elif subject.weights.problems:
        yield problem(AREA, subject.weights.problems[0], "mend the weights: internvl doctor says more")


def _language_model(subject: Subject) -> Iterator[Finding]:
    for part, known in (("llm_config", ARCHITECTURES), ("vision_config", {"InternVisionModel": ""})):
        values = subject.values.get(part)
        said = ((values if isinstance(values, dict) else {}).get("architectures") or [None])[0]
        if said is None:
            message = f"{CONFIG}: {part}.architectures is missing, by which the converter chooses its class"
            yield problem(AREA, message, _UPGRADE)
        elif said not in known:
            message = f"{CONFIG}: {part}.architectures {said!r} is not among {', '.join(known)}, which were looked up"
            yield problem(AREA, message, _KEEP)


def _encoder(subject: Subject) -> Iterator[Finding]:
    vision, layer = subject.config.vision_config, subject.config.select_layer
    if layer not in (-1, vision.num_hidden_layers):
        message = f"{CONFIG}: select_layer {layer} is not read; llama.cpp takes the output of the last layer"
        yield problem(AREA, message, _KEEP)
    rms = (vision.hidden_size, vision.num_hidden_layers) == _RMS_SHAPE
    if rms != (vision.norm_type == "rms_norm"):
        message = (
            f"{CONFIG}: norm_type {vision.norm_type!r} is not read; an encoder of width {vision.hidden_size} and "
        )
        message += f"{vision.num_hidden_layers} layers gets {'RMS' if rms else 'layer'} norms"
        yield problem(AREA, message, _KEEP)
    if vision.qk_normalization and not rms:
        message = f"{CONFIG}: qk_normalization is RMS normalisation always, but llama.cpp would take layer norms there"
        yield problem(AREA, message, _KEEP)
    if vision.num_hidden_layers < FEWEST_LAYERS:
        message = f"{CONFIG}: with {vision.num_hidden_layers} encoder layers the converter finds no name for mlp1.3"
        yield problem(AREA, message, f"an encoder has at least {FEWEST_LAYERS} layers there")


def _activations(subject: Subject) -> Iterator[Finding]:
    activation = subject.config.vision_config.hidden_act
    if activation not in ("gelu", "silu"):
        yield problem(AREA, f"{CONFIG}: vision_config.hidden_act {activation!r}: the converter stops there", _KEEP)


def _projector(subject: Subject) -> Iterator[Finding]:
    config = subject.config
    if config.ps_version != "v2":
        message = f"{CONFIG}: ps_version {config.ps_version!r} is not read; llama.cpp orders visual tokens as v2 does"
        yield problem(AREA, message, _KEEP)
    scale, side = 1 / config.downsample_ratio, config.vision_config.image_size // config.vision_config.patch_size
    if abs(scale - round(scale)) > 1e-6 or side % round(scale):
        message = f"{CONFIG}: downsample_ratio {config.downsample_ratio}: {side} x {side} patches are merged by whole "
        yield problem(AREA, f"{message}numbers only", _KEEP)


def _tiles(subject: Subject) -> Iterator[Finding]:
    config, built = subject.config, subject.config.vision_config.image_size
    if config.image_size != built:
        message = f"{CONFIG}: force_image_size {config.image_size} is not read; tiles have vision_config's {built} px"
        yield problem(AREA, message, "resize the position embeddings to the tiles first")
    if config.pad2square:
        yield problem(AREA, f"{CONFIG}: pad2square is not read", "pad the images yourself")
    if config.dynamic_image_size and not config.use_thumbnail:
        message = f"{CONFIG}: use_thumbnail false is not read; a whole view follows the tiles always"
        yield problem(AREA, message, _KEEP)
    if config.min_dynamic_patch > 1:
        message = f"{CONFIG}: min_dynamic_patch {config.min_dynamic_patch} is taken as the fewest columns and rows"
        yield problem(AREA, message, "set clip.vision.preproc_min_tiles to 1 in the file, and resize small images")
    if not config.dynamic_image_size:
        message = f"{CONFIG}: dynamic_image_size false is not read; images larger than a tile are cut"
        yield note(AREA, message, f"resize images to {built} x {built} first")


def _pixels(subject: Subject) -> Iterator[Finding]:
    if image_statistics(subject) is None:
        message = f"no {' or '.join(PROCESSORS)} with image_mean and image_std, without which the converter stops"
        yield problem(AREA, message, _UPGRADE)


def _dtypes(subject: Subject) -> Iterator[Finding]:
    """Packed weights of GPT-OSS (MXFP4) are repacked; no other kind of packing was looked up."""
    packed = [
        name
        for name, tensor in subject.weights.tensors.items()
        if not tensor.dtype.is_floating_point and not name.endswith(("_blocks", "_scales", ".position_ids"))
    ]
    if packed or any(t.dtype.itemsize == 1 and t.dtype.is_floating_point for t in subject.weights.tensors.values()):
        shown = packed[0] if packed else "8-bit floats"
        yield problem(
            AREA, f"the weights are quantised ({shown})", "export the full weights; llama-quantize comes after"
        )


def _rope(subject: Subject) -> Iterator[Finding]:
    llm = subject.config.llm_config
    if (getattr(llm, "rope_parameters", None) or {}).get("rope_type") == "dynamic":
        message = f"{CONFIG}: dynamic scaling of RoPE is left out, so that llama.cpp computes something else beyond "
        yield note(AREA, f"{message}{llm.max_position_embeddings} tokens", "keep prompts below that")


def _always() -> Iterator[Finding]:
    """What holds for every InternVL; docs/gguf.md has the measurements."""
    yield note(
        AREA,
        f"llama.cpp {LLAMA_CPP} puts the class token behind the patches but adds position embeddings in the "
        "checkpoint's order, so that every patch gets its neighbour's",
        "--converter ... --reorder-positions writes them in its order",
    )
    yield note(
        AREA,
        "llama.cpp chooses other grids of tiles than InternVL, and pads instead of stretching",
        "resize images to their grid first (docs/gguf.md)",
    )
    yield note(
        AREA,
        "llama-mtmd-cli puts no line break between image and question, as training did",
        "write it: -p $'<__media__>\\nWhat is it?'",
    )


# ----------------------------------------------------------------------------------------------------------- tokenizer


def pre_tokenizer(converter: str | Path, tokenizer: Any) -> str | None:
    """The name under which a converter knows a byte-level tokenizer; None if it does not.

    The converter hashes the ids of a text of its own; text and hashes are read from its source, which is not run.

    Args:
        converter: `convert_hf_to_gguf.py`; newer ones keep the list in `conversion/base.py` beside it.
        tokenizer: Of the checkpoint.

    Raises:
        CheckpointError: the list is in neither file.
    """
    converter = Path(converter)
    for path in (converter, converter.parent / "conversion" / "base.py"):
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "get_vocab_base_pre":
                return _lookup(node, tokenizer)
    raise CheckpointError(f"{converter} has no list of tokenizers: give convert_hf_to_gguf.py of a whole llama.cpp.")


def _lookup(function: ast.FunctionDef, tokenizer: Any) -> str | None:
    text = ""
    names: dict[Any, str] = {}
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name("chktxt")], value=ast.Constant(str() as text)):
                pass
            case ast.If(
                test=ast.Compare(left=ast.Name("chkhsh"), comparators=[ast.Constant(digest)]),
                body=[ast.Assign(value=ast.Constant(str() as name)), *_],
            ):
                names[digest] = name
    return names.get(hashlib.sha256(str(tokenizer.encode(text)).encode()).hexdigest())


def _tokenizer(subject: Subject, converter: str | Path | None) -> Iterator[Finding]:
    llm = subject.config.llm_config.architectures[0]
    if llm in _SENTENCEPIECE:
        yield from _pieces(subject, llm)
    elif subject.tokenizer is None:
        yield problem(AREA, f"the tokenizer cannot be loaded: {subject.tokenizer_error}", "internvl doctor says more")
    elif not subject.has(TOKENIZER_MODEL):
        yield from _byte_level(subject.tokenizer, converter)


def _pieces(subject: Subject, llm: str) -> Iterator[Finding]:
    """InternLM2 and Phi-3 are read from SentencePiece alone; for InternLM2 every id must be a piece."""
    if not subject.has(TOKENIZER_MODEL):
        message = f"{llm} is converted from {TOKENIZER_MODEL} alone, which the folder lacks"
        yield problem(AREA, message, f"copy the release's {TOKENIZER_MODEL} into it")
        return
    if llm != "InternLM2ForCausalLM":
        return
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        message = f"the pieces of {TOKENIZER_MODEL} were not counted; the converter wants one for every row"
        yield note(AREA, message, "pip install sentencepiece")
        return
    pieces = SentencePieceProcessor(model_file=str(subject.folder / TOKENIZER_MODEL)).vocab_size()
    if subject.rows is not None and subject.rows > pieces:
        message = (
            f"{TOKENIZER_MODEL} has {pieces} pieces for {subject.rows} rows: the converter stops at the first of the "
        )
        yield problem(AREA, f"{message}rows for added tokens such as <img>", _KEEP)


def _byte_level(tokenizer: Any, converter: str | Path | None) -> Iterator[Finding]:
    fix = "keep the tokenizer of the release and only add tokens; the converter has no option to be told"
    size = len(tokenizer) - len(tokenizer.get_added_vocab())
    if converter is not None:
        if pre_tokenizer(converter, tokenizer) is None:
            yield problem(AREA, f"{converter} does not know the tokenizer ({size} tokens), and stops at it", fix)
    elif size not in _KNOWN_VOCABULARIES:
        message = (
            f"the converter knows byte-level tokenizers by a hash; one of {size} tokens is of no InternVL release"
        )
        yield note(AREA, f"{message}, and it probably stops at it", "give --converter, which decides it")
