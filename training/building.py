"""A model ready to train, from `ModelArguments`: a checkpoint, an encoder and a language model, or fresh weights.

Configuration and processor always agree: an argument that overrides a field of one overrides it in both, and what
contradicts the weights is refused before anything is loaded. What is trained, and how, belongs to `tuning.py`.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_bitsandbytes_available

from ..checkpoint_internvl import read_json, scan_files
from ..configuration_intern_vit import InternVisionConfig
from ..configuration_internvl_chat import InternVLChatConfig, build_llm_config, build_vision_config
from ..conversation import get_template, template_names
from ..conversion.folders import resolve
from ..conversion.source import Source, generation_config, load_tokenizer, open_checkpoint
from ..conversion.tokenizers import make_loadable
from ..generation_internvl import stop_ids
from ..image_processing_internvl import InternVLImageProcessor
from ..modeling_intern_vit import InternVisionModel
from ..modeling_internlm2 import InternLM2ForCausalLM
from ..modeling_internvl_chat import InternVLChatModel
from ..native_internvl import NATIVE_MODEL_TYPE
from ..processing_internvl import InternVLProcessor, image_settings
from ..prompting_internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN, prompt_encoder
from .arguments import ModelArguments

# In the order in which the original adds them (`internvl/train/constants.py`, `internvl_chat_finetune.py`).
SPECIAL_TOKENS = (
    IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN, "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip
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

    The tokens of `SPECIAL_TOKENS` that the tokenizer lacks are added in that order; see `add_special_tokens` for
    their embeddings. Fresh weights (the projector between an encoder and a language model; everything with `config`
    alone) come from torch's random state: seed it first.

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


# ---------------------------------------------------------------------------------------------------- one checkpoint


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
            f"down_sample_ratio={config.downsample_ratio} gives the projector {width * _per_token(config)} channels, "
            f"that of {path} takes {width * round(1 / ratio) ** 2} (ratio {ratio}): leave it "
            "out, or name the parts (llm_path, vision_path) for a fresh projector"
        )
    tokenizer = load_own_tokenizer(arguments.tokenizer_path or folder)
    _check_template(config, tokenizer)
    options = _loading_options(arguments)
    if arguments.quantization is not None:
        _refuse_quantized_experts(config, arguments.quantization)
        options["quantization_config"] = quantization_config(arguments.quantization, arguments.dtype)
    model = InternVLChatModel.from_pretrained(folder, config=config, **options)
    model.name_or_path = str(path)  # adapters note it as their base
    if arguments.force_image_size is not None:
        _resize_positions(model, arguments.force_image_size)
    if arguments.mlp_path is not None:
        load_projector(model, arguments.mlp_path)
    model.generation_config = generation_config(folder, config, tokenizer)
    return _finished(model, tokenizer, arguments, folder)


def quantization_config(kind: str, dtype: str = "auto") -> BitsAndBytesConfig:
    """Settings of bitsandbytes for the language model; vision encoder, projector and output head stay as they are.

    Args:
        kind: `"nf4"` (4 bits, constants quantized too: QLoRA, arXiv 2305.14314, section 3) or `"int8"` (LLM.int8).
        dtype: In which nf4 weights are multiplied; `"auto"` for bfloat16.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if not is_bitsandbytes_available():
        raise ImportError(f"quantization={kind!r} needs bitsandbytes: pip install bitsandbytes")
    kept = {"llm_int8_skip_modules": ["vision_model", "mlp1", "lm_head"]}
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **kept)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else getattr(torch, dtype),
        **kept,
    )


def _refuse_quantized_experts(config: InternVLChatConfig, kind: str) -> None:
    """bitsandbytes replaces linear layers; transformers 5 holds experts as three-dimensional parameters."""
    text = config.get_text_config()
    if getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None):
        raise ValueError(
            f"quantization={kind!r} would leave the experts of {text.architectures[0]}, most of its weights, as they "
            "are: bitsandbytes quantizes linear layers only; leave it out"
        )


def _resize_positions(model: InternVLChatModel, size: int) -> None:
    vision = model.config.vision_config
    if size != vision.image_size:
        model.vision_model.resize_pos_embeddings(vision.image_size, size, vision.patch_size)


# --------------------------------------------------------------------------------------- an encoder, a language model


@dataclass(frozen=True)
class _Origin:
    """Where a tower comes from: its own checkpoint, or a chat checkpoint, which is opened without reading weights."""

    folder: Path
    chat: Source | None

    @classmethod
    def of(cls, name_or_path: str) -> _Origin:
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


def _from_parts(arguments: ModelArguments, llm_path: str) -> Built:
    """Progressive scaling: a trained encoder meets another language model (original `internvl_chat_pretrain.py`)."""
    llm = _Origin.of(llm_path)
    vision = None if arguments.vision_path is None else _Origin.of(arguments.vision_path)
    tokenizer = load_own_tokenizer(arguments.tokenizer_path or llm.folder)
    config = _config_of_parts(arguments, llm, vision)
    config.template = config.template or _ask_for_template(tokenizer)
    apply_overrides(config, arguments)
    _check_template(config, tokenizer)
    options = _loading_options(arguments)
    language_model = llm.load(_language_model_class(config.llm_config), config.llm_config, _LLM, **options)
    options["dtype"] = language_model.dtype
    if vision is None:
        vision_model = InternVisionModel._from_config(config.vision_config, **options)
    else:
        vision_model = vision.load(InternVisionModel, config.vision_config, _VISION, **options)
    model = _compose(config, vision_model, language_model)
    if arguments.force_image_size is not None:
        _resize_positions(model, arguments.force_image_size)
    if arguments.mlp_path is not None:
        load_projector(model, arguments.mlp_path)
    model.generation_config = _fresh_generation_config(config, tokenizer, language_model.generation_config)
    return _finished(model, tokenizer, arguments)


def _config_of_parts(arguments: ModelArguments, llm: _Origin, vision: _Origin | None) -> InternVLChatConfig:
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


def _compose(
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


def _language_model_class(config: PretrainedConfig) -> Any:
    internlm2 = config.model_type == InternLM2ForCausalLM.config_class.model_type
    return InternLM2ForCausalLM if internlm2 else MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _ask_for_template(tokenizer: Any) -> str:
    encoder = prompt_encoder(tokenizer)
    fit = [name for name in template_names() if encoder.token_id(get_template(name).end_of_turn) is not None]
    raise ValueError(
        "conv_style is needed: a language model alone does not say how its chats are written. Templates whose end of "
        f"turn its tokenizer knows: {', '.join(fit) or 'none'}"
    )


def _fresh_generation_config(
    config: InternVLChatConfig, tokenizer: Any, of_llm: GenerationConfig | None = None
) -> GenerationConfig:
    """Stop and pad tokens; how the language model alone is best sampled says nothing about the whole."""
    fresh = generation_config(Path(os.devnull), config, tokenizer)
    fresh.eos_token_id = stop_ids(fresh.eos_token_id, getattr(of_llm, "eos_token_id", None)) or None
    return fresh


# ------------------------------------------------------------------------------------------------------ from nothing


def _from_config(arguments: ModelArguments, fields: dict[str, Any]) -> Built:
    """Fresh weights everywhere; the vocabulary is the tokenizer's unless the configuration names a larger one."""
    if arguments.vision_path is not None:
        raise ValueError("vision_path goes with llm_path, not with config alone")
    if arguments.tokenizer_path is None:
        raise ValueError("config without llm_path needs tokenizer_path: fresh weights bring no tokenizer")
    tokenizer = load_own_tokenizer(arguments.tokenizer_path)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    llm, rows = dict(fields.get("llm_config") or {}), _rows_needed(tokenizer)
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
        _ask_for_template(tokenizer)
    _check_template(config, tokenizer)
    options = _loading_options(arguments)
    options["dtype"] = torch.float32 if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    model = InternVLChatModel._from_config(config, **options)
    if arguments.mlp_path is not None:
        load_projector(model, arguments.mlp_path)
    model.generation_config = _fresh_generation_config(config, tokenizer)
    return _finished(model, tokenizer, arguments)


# ------------------------------------------------------------------------------------------------------------- shared


def _loading_options(arguments: ModelArguments) -> dict[str, Any]:
    if arguments.dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {arguments.dtype!r}")
    attention = arguments.attn_implementation
    return {"dtype": arguments.dtype, **({"attn_implementation": attention} if attention is not None else {})}


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


def _per_token(config: InternVLChatConfig) -> int:
    """Patches that one visual token is made of."""
    return round(1 / config.downsample_ratio) ** 2


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


def _check_template(config: InternVLChatConfig, tokenizer: Any) -> None:
    end = get_template(config.template).end_of_turn
    if prompt_encoder(tokenizer).token_id(end) is None:
        raise ValueError(
            f"conv_style={config.template!r} ends turns with {end!r}, which is no token of the tokenizer, so the "
            "model could never learn to stop: choose the template of this language model, or add the token first"
        )


def load_own_tokenizer(name_or_path: str | Path) -> Any:
    """The tokenizer of a folder or repository: released SentencePiece ones, other models' and this package's own."""
    folder = resolve(name_or_path, weights=False)
    config = folder / "config.json"
    made = tempfile.TemporaryDirectory(prefix="internvl_tokenizer_")
    make_loadable(folder, made.name, read_json(config) if config.is_file() else {})
    tokenizer = load_tokenizer(Path(made.name))
    weakref.finalize(tokenizer, made.cleanup)  # SentencePiece ones copy their file from here when saved
    return tokenizer


def _rows_needed(tokenizer: Any) -> int:
    return max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


@torch.no_grad()
def add_special_tokens(language_model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Adds the tokens of `SPECIAL_TOKENS` that are missing; old rows of the embeddings keep their bits.

    Their output rows are the mean of the rows of all older tokens, as in the original, so that at first each gets an
    average logit. The original leaves their input rows to the library's random start; here they are the mean of the
    older input rows. It lies where the language model expects embeddings, also under a frozen one, whose new rows
    never move; it depends on no random state, so every rank has the same; and rows that padded the vocabulary, which
    nobody trained, are not taken over. The original also cuts such padding off; here tables only ever grow.

    Args:
        language_model: Grows where the ids leave its table.
        tokenizer: Changed in place.

    Returns:
        Rows that were written: ids of new tokens, and ids beyond the old table.
    """
    before = set(tokenizer.get_vocab().values())
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    table: Any = language_model.get_input_embeddings()
    rows, needed = table.weight.shape[0], _rows_needed(tokenizer)
    new = sorted((set(tokenizer.get_vocab().values()) - before) | set(range(rows, needed)))
    if needed > rows:
        language_model.resize_token_embeddings(needed, mean_resizing=False)
    if new:
        _write_means(language_model.get_input_embeddings(), new)
        _write_means(language_model.get_output_embeddings(), new)
    return new


def _write_means(table: Any, rows: list[int]) -> None:
    for values in (table.weight, getattr(table, "bias", None)):
        if values is not None:
            values[rows] = values[: rows[0]].mean(dim=0)


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


def _finished(
    model: InternVLChatModel, tokenizer: Any, arguments: ModelArguments, folder: Path | None = None
) -> Built:
    """Adds tokens, notes the context token and makes the processor."""
    add_special_tokens(model.language_model, tokenizer)
    model.img_context_token_id = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    processor = make_processor(model.config, tokenizer, arguments, folder)
    tokenizer.chat_template = processor.chat_template
    return Built(model.eval(), tokenizer, processor)


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
