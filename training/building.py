"""A model ready to train, from `ModelArguments`: a checkpoint, an encoder and a language model, or fresh weights.

This is the order of work in each of the three ways. `composing` puts parts together, `overrides` makes configuration
and processor agree with the arguments, `vocabulary` has the tokenizer and its new tokens, `quantization` the settings
of bitsandbytes. What is trained, and how, belongs to `tuning`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from ..configuration_internvl_chat import InternVLChatConfig
from ..conversion.folders import resolve
from ..conversion.source import generation_config
from ..generation_internvl import stop_ids
from ..modeling_intern_vit import InternVisionModel
from ..modeling_internvl_chat import InternVLChatModel
from ..processing_internvl import InternVLProcessor
from ..prompting_internvl import IMG_CONTEXT_TOKEN
from .arguments import ModelArguments
from .composing import Origin, compose, config_of_parts, language_model_class, load_projector, resize_positions
from .overrides import apply_overrides, ask_for_template, check_template, make_processor, patches_per_token
from .quantization import quantization_config, refuse_quantized_experts
from .vocabulary import SPECIAL_TOKENS, add_special_tokens, load_own_tokenizer, rows_needed

_LLM, _VISION = "language_model.", "vision_model."


@dataclass(frozen=True)
class Built:
    """What a run trains, and what prepares its data.

    Attributes:
        model: In evaluation mode, nothing frozen.
        tokenizer: The processor's.
        processor: Fits the model; saved with it, it makes a complete checkpoint.
    """

    model: InternVLChatModel
    tokenizer: Any
    processor: InternVLProcessor


def build(arguments: ModelArguments) -> Built:
    """Makes the model, its tokenizer and its processor.

    The tokens of `SPECIAL_TOKENS` that the tokenizer lacks are added in that order; for their embeddings see
    `vocabulary.add_special_tokens`. Fresh weights (the projector between an encoder and a language model; everything
    with `config` alone) come from torch's random state: seed it first.

    Args:
        arguments: Exactly one of `model_name_or_path`, `llm_path` and `config` alone leads.

    Raises:
        ValueError: arguments contradict each other or the weights; the message names argument, value and fix.
            (`CheckpointError`, `LayoutError`, `TokenizerError`, `TemplateError` are ValueErrors.)
        ImportError: `quantization` without bitsandbytes.
    """
    if arguments.model_name_or_path is not None:
        return _from_checkpoint(arguments, arguments.model_name_or_path)
    if arguments.quantization is not None:
        raise ValueError(
            f"quantization={arguments.quantization!r} needs model_name_or_path, so that adapters have a base on disk: "
            "build the model without it, save it, and start from there"
        )
    if arguments.llm_path is not None:
        return _from_parts(arguments, arguments.llm_path)
    return _from_config(arguments, arguments.config or {})


# ------------------------------------------------------------------------------------------------------ one checkpoint


def _from_checkpoint(arguments: ModelArguments, path: str) -> Built:
    for name in ("vision_path", "config"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name} goes with llm_path: the checkpoint {path} has its own")
    folder = resolve(path)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"model_name_or_path={path} is a PEFT adapter: merge it into its base first")
    config = InternVLChatConfig.from_pretrained(folder)
    ratio = config.downsample_ratio
    apply_overrides(config, arguments)
    if config.downsample_ratio != ratio:
        width = config.vision_config.hidden_size
        raise ValueError(
            f"down_sample_ratio={config.downsample_ratio} gives the projector {width * patches_per_token(config)} "
            f"channels, that of {path} takes {width * round(1 / ratio) ** 2} (ratio {ratio}): leave it "
            "out, or name the parts (llm_path, vision_path) for a fresh projector"
        )
    tokenizer = load_own_tokenizer(arguments.tokenizer_path or folder)
    check_template(config, tokenizer)
    options = _loading_options(arguments)
    if arguments.quantization is not None:
        refuse_quantized_experts(config, arguments.quantization)
        options["quantization_config"] = quantization_config(arguments.quantization, arguments.dtype)
    model = InternVLChatModel.from_pretrained(folder, config=config, **options)
    model.name_or_path = str(path)  # adapters note it as their base
    if arguments.force_image_size is not None:
        resize_positions(model, arguments.force_image_size)
    if arguments.mlp_path is not None:
        load_projector(model, arguments.mlp_path)
    model.generation_config = generation_config(folder, config, tokenizer)
    return _finished(model, tokenizer, arguments, folder)


# ---------------------------------------------------------------------------------------- an encoder, a language model


def _from_parts(arguments: ModelArguments, llm_path: str) -> Built:
    """Progressive scaling: a trained encoder meets another language model (original `internvl_chat_pretrain.py`)."""
    llm = Origin.of(llm_path)
    vision = None if arguments.vision_path is None else Origin.of(arguments.vision_path)
    tokenizer = load_own_tokenizer(arguments.tokenizer_path or llm.folder)
    config = config_of_parts(arguments, llm, vision)
    config.template = config.template or ask_for_template(tokenizer)
    apply_overrides(config, arguments)
    check_template(config, tokenizer)
    options = _loading_options(arguments)
    language_model = llm.load(language_model_class(config.llm_config), config.llm_config, _LLM, **options)
    options["dtype"] = language_model.dtype
    if vision is None:
        vision_model = InternVisionModel._from_config(config.vision_config, **options)
    else:
        vision_model = vision.load(InternVisionModel, config.vision_config, _VISION, **options)
    model = compose(config, vision_model, language_model)
    if arguments.force_image_size is not None:
        resize_positions(model, arguments.force_image_size)
    if arguments.mlp_path is not None:
        load_projector(model, arguments.mlp_path)
    model.generation_config = _fresh_generation_config(config, tokenizer, language_model.generation_config)
    return _finished(model, tokenizer, arguments)


# -------------------------------------------------------------------------------------------------------- from nothing


def _from_config(arguments: ModelArguments, fields: dict[str, Any]) -> Built:
    """Fresh weights everywhere; the vocabulary is the tokenizer's unless the configuration names a larger one."""
    if arguments.vision_path is not None:
        raise ValueError("vision_path goes with llm_path, not with config alone")
    if arguments.tokenizer_path is None:
        raise ValueError("config without llm_path needs tokenizer_path: fresh weights bring no tokenizer")
    tokenizer = load_own_tokenizer(arguments.tokenizer_path)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    llm, rows = dict(fields.get("llm_config") or {}), rows_needed(tokenizer)
    if llm.setdefault("vocab_size", rows) < rows:
        raise ValueError(
            f"config['llm_config']['vocab_size']={llm['vocab_size']} is too small for the {rows} ids of the tokenizer "
            "with InternVL's tokens: leave it out"
        )
    config = InternVLChatConfig(**{**fields, "llm_config": llm})
    apply_overrides(config, arguments)
    if arguments.force_image_size is not None:
        config.vision_config.image_size = arguments.force_image_size
    if config.template is None:
        ask_for_template(tokenizer)
    check_template(config, tokenizer)
    options = _loading_options(arguments)
    options["dtype"] = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = InternVLChatModel._from_config(config, **options)
    if arguments.mlp_path is not None:
        load_projector(model, arguments.mlp_path)
    model.generation_config = _fresh_generation_config(config, tokenizer)
    return _finished(model, tokenizer, arguments)


# -------------------------------------------------------------------------------------------------------------- shared


def _loading_options(arguments: ModelArguments) -> dict[str, Any]:
    if arguments.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {arguments.dtype!r}")
    attention = arguments.attn_implementation
    return {"dtype": arguments.dtype, **({"attn_implementation": attention} if attention is not None else {})}


def _fresh_generation_config(
    config: InternVLChatConfig, tokenizer: Any, of_llm: GenerationConfig | None = None
) -> GenerationConfig:
    """Stop and pad tokens; how the language model alone is best sampled says nothing about the whole."""
    fresh = generation_config(Path(os.devnull), config, tokenizer)
    fresh.eos_token_id = stop_ids(fresh.eos_token_id, getattr(of_llm, "eos_token_id", None)) or None
    return fresh


def _finished(
    model: InternVLChatModel, tokenizer: Any, arguments: ModelArguments, folder: Path | None = None
) -> Built:
    """Adds tokens, notes the context token and makes the processor."""
    add_special_tokens(model.language_model, tokenizer)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    processor = make_processor(model.config, tokenizer, arguments, folder)
    tokenizer.chat_template = processor.chat_template
    return Built(model.eval(), tokenizer, processor)
