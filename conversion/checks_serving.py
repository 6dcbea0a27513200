"""What vLLM, LMDeploy and SGLang expect of `config.json` and of the weights, as rules.

Each rule states a fact about the source of the engines at the versions in `ENGINES`; where engines behave alike, they
share a verdict. Faults that stop every program (damaged files, missing tensors) are the other checks' business.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .checks import CONFIG, Subject
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

_ARCHITECTURE = {"original": "InternVLChatModel", "native": "InternVLForConditionalGeneration"}
# Language models that each engine puts behind InternVL, among those that transformers has and InternVL was built on.
_TURBOMIND = {f"{n}ForCausalLM" for n in ("Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Llama", "InternLM2", "GptOss")}
_LANGUAGE_MODELS = {
    "vllm": _TURBOMIND | {"MistralForCausalLM", "Phi3ForCausalLM"},
    "lmdeploy": _TURBOMIND | {"MistralForCausalLM", "Phi3ForCausalLM"},
    "sglang": _TURBOMIND - {"LlamaForCausalLM", "Qwen2MoeForCausalLM"},
}
_SGLANG_TILE, _SGLANG_TILES = 448, 12
_TO_ORIGINAL = "internvl convert FOLDER OUT --to original"


# -------------------------------------------------------------------------------------------------------- architecture


def architecture(subject: Subject) -> Iterator[Verdict]:
    """the kind of checkpoint"""
    if not subject.chat:
        fix = "serve a whole InternVL; an adapter is merged by internvl merge"
        yield refuses(ALL, f"{CONFIG}: not an InternVL with its language model", fix)
        return
    wanted = _ARCHITECTURE["native" if subject.kind == "native" else "original"]
    said = (subject.values.get("architectures") or [None])[0]
    if said != wanted:
        yield refuses(ALL, f"{CONFIG}: architectures[0] is {said!r}, by which the model is found", f"set {wanted!r}")
    if subject.kind == "native":
        message = f"{wanted} is not among its models, and its InternVL processor serves InternVLChatModel alone"
        yield refuses(SGLANG, message, _TO_ORIGINAL)


def code(subject: Subject) -> Iterator[Verdict]:
    """the code of the folder"""
    if not is_original(subject):
        return
    auto_map = subject.values.get("auto_map")
    reference = str((auto_map if isinstance(auto_map, dict) else {}).get("AutoConfig") or "")
    file = f"{reference.rpartition('--')[2].rpartition('.')[0]}.py"
    engines = ("vllm", "lmdeploy")  # SGLang has a configuration class of its own
    reason = "it has no class of its own for internvl_chat and loads the one of the folder"
    if not reference:
        yield refuses(engines, f"{CONFIG}: auto_map names no AutoConfig; {reason}", CLEAN)
    elif "--" not in reference and not subject.has(file):
        yield refuses(engines, f"{file}, which auto_map names, is missing; {reason}", CLEAN)


def language_model(subject: Subject) -> Iterator[Verdict]:
    """the language model"""
    name, values = language_part(subject)
    chosen = (values.get("architectures") or [None])[0]
    if not chosen:
        message = f"{CONFIG}: {name}.architectures is missing, by which the language model is chosen"
        yield refuses(ALL if is_original(subject) else ("vllm", "lmdeploy"), message, CLEAN)
        return
    refusing = tuple(engine for engine in ENGINES if chosen not in _LANGUAGE_MODELS[engine])
    if refusing:
        others = ", ".join(ENGINES[engine].title for engine in ENGINES if engine not in refusing) or "transformers"
        yield refuses(refusing, f"{CONFIG}: no InternVL around {chosen}", f"serve it by {others}")
    if "lmdeploy" not in refusing and chosen not in _TURBOMIND:
        message = f"{CONFIG}: {chosen} is unknown to TurboMind, which is chosen by the outer architecture alone"
        yield needs(LMDEPLOY, message, "start it with --backend pytorch")


# -------------------------------------------------------------------------------------------------------------- vision


def image_size(subject: Subject) -> Iterator[Verdict]:
    """the size of tiles"""
    if not is_original(subject):
        return
    forced, built = subject.values.get("force_image_size"), subject.config.vision_config.image_size
    if forced is None:
        message = f"{CONFIG}: force_image_size is not set, and the visual tokens of a tile are counted from it alone"
        yield refuses(LMDEPLOY, message, f"set force_image_size to {built}, which changes nothing else")
    elif forced != built:
        message = f"{CONFIG}: tiles are cut at vision_config.image_size {built}, tokens counted at {forced}"
        yield refuses(("vllm", "lmdeploy"), message, "resize the position embeddings to the tiles first")
    if subject.config.image_size != _SGLANG_TILE:
        message = f"tiles are always {_SGLANG_TILE} px, but the model's have {subject.config.image_size}"
        yield refuses(SGLANG, message, "serve it by vLLM or LMDeploy")


def tiling(subject: Subject) -> Iterator[Verdict]:
    """how images are cut"""
    config = subject.config
    if config.pad2square:
        yield refuses(ALL, f"{CONFIG}: pad2square is true, which no engine does", "pad the images yourself")
    if not is_original(subject):
        return
    if not config.use_thumbnail or config.min_dynamic_patch != 1 or not config.dynamic_image_size:
        shown = f"use_thumbnail {config.use_thumbnail}, min_dynamic_patch {config.min_dynamic_patch}, "
        message = f"{CONFIG}: {shown}dynamic_image_size {config.dynamic_image_size} are not read: it cuts from 1 tile "
        yield refuses(SGLANG, message + "and always adds the thumbnail", "serve it by vLLM")
    elif config.max_dynamic_patch != _SGLANG_TILES:
        message = f"{CONFIG}: max_dynamic_patch {config.max_dynamic_patch} is not read; it takes {_SGLANG_TILES} tiles"
        fix = f'send "max_dynamic_patch": {config.max_dynamic_patch} in each image_url'
        # The branch for InternLM2 does not read the number from requests either.
        internlm = language_part(subject)[1].get("architectures") == ["InternLM2ForCausalLM"]
        yield refuses(SGLANG, message, "serve it by vLLM") if internlm else needs(SGLANG, message, fix)
    files = ("preprocessor_config.json", "processor_config.json")
    if not config.dynamic_image_size and any(subject.has(file) for file in files):
        message = f"{CONFIG}: without dynamic_image_size it prepares images with CLIP's processor from the folder"
        yield refuses(LMDEPLOY, message, "serve it by vLLM")


def pixel_shuffle(subject: Subject) -> Iterator[Verdict]:
    """the pixel shuffle"""
    if not is_original(subject):
        return
    if subject.config.ps_version != "v2":
        message = f"{CONFIG}: ps_version {subject.config.ps_version!r}: TurboMind refuses it, its PyTorch engine "
        yield refuses(LMDEPLOY, message + "computes 'v2' without a word", "serve it by vLLM or SGLang")


def select_layer(subject: Subject) -> Iterator[Verdict]:
    """the layer of the encoder"""
    name = "vision_feature_layer" if subject.kind == "native" else "select_layer"
    layer, layers = subject.config.select_layer, subject.config.vision_config.num_hidden_layers
    if layer == -1:
        return
    says = f"{CONFIG}: {name} is {layer}"
    if subject.kind == "native":
        yield refuses(VLLM, f"{says}, which it does not read: it takes the last", _TO_ORIGINAL)
        yield needs(LMDEPLOY, f"{says}, which TurboMind does not read", "start it with --backend pytorch")
        return
    message = f"{says}: TurboMind takes the last layer, its PyTorch engine stops at the first image"
    yield refuses(LMDEPLOY, message, "serve it by vLLM or SGLang")
    if layer >= 0:
        fix = f"set select_layer to {layer - layers - 1}, which names the same layer"
        yield refuses(VLLM, f"{says}: counted from the front it runs one layer more than the model", fix)


def vision_fields(subject: Subject) -> Iterator[Verdict]:
    """fields of the encoder"""
    vision = subject.values.get("vision_config")
    if is_original(subject) and "norm_type" not in (vision if isinstance(vision, dict) else {}):
        message = f"{CONFIG}: vision_config.norm_type is missing, for which its own class has no default"
        yield refuses(SGLANG, message, CLEAN)


# ------------------------------------------------------------------------------------------------------------- weights


def weights(subject: Subject) -> Iterator[Verdict]:
    """the tensors"""
    if subject.kind == "adapters" or subject.values.get("use_llm_lora") or subject.values.get("use_backbone_lora"):
        yield refuses(ALL, "LoRA adapters are stored in the weights, which no engine merges", CLEAN)
    head = any(name.endswith(("lm_head.weight", "language_model.output.weight")) for name in subject.weights.tensors)
    if is_original(subject) and subject.weights.tensors and not head:
        message = f"{CONFIG}: tie_word_embeddings is read as false always, and no output head is stored"
        yield refuses(SGLANG, message, "store the head: set tie_word_embeddings to false and save a copy of the table")


def dtypes(subject: Subject) -> Iterator[Verdict]:
    """the dtypes"""
    name, llm = language_part(subject)
    for where, values in (
        ("", subject.values),
        (f"{name}.", llm),
        ("vision_config.", subject.values["vision_config"]),
    ):
        for field in ("dtype", "torch_dtype"):
            said = values.get(field)
            dtype = getattr(torch, said.removeprefix("torch."), None) if isinstance(said, str) else None
            if said is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
                fix = "set float32, float16 or bfloat16"
                yield refuses(ALL, f"{CONFIG}: {where}{field} {said!r} is no floating dtype of torch", fix)
    said = subject.values.get("dtype") or subject.values.get("torch_dtype")
    if said == "float32":
        message = f"{CONFIG}: dtype float32 is served in half precision (vLLM: bfloat16 where the device has it)"
        yield needs(ALL, message, "vLLM and SGLang take --dtype float32; answers can differ in the last digits")


def readable(subject: Subject) -> Iterator[Verdict]:
    """the configuration"""
    if subject.chat and subject.config is None:
        yield refuses(ALL, f"{CONFIG} cannot be read: {subject.config_error}", f"correct {CONFIG}")


MODEL_RULES = (code, language_model, image_size, tiling, pixel_shuffle, select_layer, vision_fields, weights, dtypes)
