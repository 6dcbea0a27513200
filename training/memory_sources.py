"""Which model and which settings a name stands for, when memory is to be estimated: a release, a folder, a recipe.

Only configurations are read, never weights; a Hub repository is asked only where no release has its name.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..configuration_internvl_chat import InternVLChatConfig
from ..conversion import families
from .memory_settings import RunSettings
from .overrides import apply_overrides
from .recipes import Recipe, list_recipes, load_recipe

_OUTPUTS = "runs/"  # where recipes write, and where those of later stages read


def resolve(
    source: str, overrides: Sequence[str] = (), model: str | None = None, **changes: Any
) -> tuple[InternVLChatConfig, RunSettings]:
    """Configuration and settings of what a user names: a recipe, a release, a checkpoint folder, a Hub repository.

    Where no recipe is named, everything is trained, under bf16 and gradient checkpointing, one row at a time.

    Args:
        source: Its name or path.
        overrides: `section.field=value`, as for `load_recipe`.
        model: For a recipe, the model to estimate instead of the recipe's own.
        **changes: Fields of `RunSettings` that win over the recipe's.

    Raises:
        ValueError: nothing is called so, a recipe's model is unknown, or settings that cannot be.
    """
    devices = changes.get("devices", 1)
    if _names_recipe(source):
        recipe = load_recipe(source, overrides, world_size=devices)
    elif model is not None:
        raise ValueError(f"--model goes with a recipe, but {source!r} is none")
    else:
        recipe = _plain_recipe(source, overrides, devices)
    config = _base_config(recipe.model, recipe.name) if model is None else find_config(model)
    apply_overrides(config, recipe.model)
    return config, settings_of_recipe(recipe, config, **changes)


def _names_recipe(source: str) -> bool:
    """A file, or a name in one of the folders of bundled recipes; a wrong one is `load_recipe`'s to refuse."""
    folders = {name.partition("/")[0] for name in list_recipes()}
    bundled = "/" in source and source.partition("/")[0] in folders and not Path(source).is_dir()
    return bundled or Path(source).suffix in (".yaml", ".yml")


def _plain_recipe(source: str, overrides: Sequence[str], devices: int) -> Recipe:
    """A recipe of the model alone, which takes overrides as any other."""
    settings = {
        "model": {"model_name_or_path": source},
        "training": {"bf16": True, "gradient_checkpointing": True, "per_device_train_batch_size": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"{Path(source).resolve().name}.yaml")
        file.write_text(json.dumps(settings), encoding="utf-8")
        return load_recipe(file, overrides, world_size=devices)


def settings_of_recipe(recipe: Recipe, config: InternVLChatConfig, **changes: Any) -> RunSettings:
    """The settings that a recipe's arguments amount to, with its fullest batch.

    That is a whole pack, or rows of the most tokens (4096 if the recipe sets no bound), each with one image of the
    most tiles; of pairs, both sequences of the most tokens.

    Args:
        recipe: The recipe.
        config: Of its model, the recipe's own overrides applied; says how many tiles an image has at most.
        **changes: Fields that win over the recipe's.

    Raises:
        ValueError: a setting that is not modelled.
    """
    model, training = recipe.model, recipe.training
    for name in ("deepspeed", "fsdp"):
        if getattr(training, name, None) and "sharding" not in changes:
            raise ValueError(f"{recipe.name} sets training.{name}: say what it divides with --sharding")
    names = {field.name for field in dataclasses.fields(RunSettings)} & {f.name for f in dataclasses.fields(training)}
    checkpointing = ("gradient_checkpointing", "activation_checkpointing")  # its name from transformers 5.23 on
    fresh = model.model_name_or_path is None and model.llm_path is None
    stored = "float32" if fresh else _stored_dtype(config)
    values = {
        **{name: getattr(training, name) for name in names},
        **_fullest_batch(recipe, config),
        "optim": str(getattr(training.optim, "value", training.optim)),
        "gradient_checkpointing": any(getattr(training, name, False) for name in checkpointing),
        "dtype": {"auto": stored, "float16": "bfloat16"}.get(model.dtype, model.dtype),
        "mixed_precision": "bf16" if training.bf16 else "fp16" if training.fp16 else None,
        "attn_implementation": model.attn_implementation,
        "quantization": model.quantization,
        "pairs": recipe.preference is not None,
        "reference": _reference(recipe),
    }
    return RunSettings(**{**values, **changes})


def _reference(recipe: Recipe) -> str | None:
    """The reference model that `MPOTrainer` would hold in memory."""
    training, preference = recipe.training, recipe.preference
    if preference is None or preference.precompute_reference:
        return None
    if preference.reference_path is not None:
        return "checkpoint"
    adapters = training.use_backbone_lora or training.use_llm_lora or training.use_mlp_lora
    return None if adapters else "copy"


def _fullest_batch(recipe: Recipe, config: InternVLChatConfig) -> dict[str, int]:
    training = recipe.training
    if training.packing:
        return {"tokens": training.max_packed_tokens, "tiles": training.num_images_expected}
    tiles = config.max_dynamic_patch if config.dynamic_image_size else 1
    thumbnail = config.use_thumbnail and tiles > 1
    return {"tokens": training.max_seq_length or RunSettings.tokens, "tiles": tiles + thumbnail}


def _stored_dtype(config: InternVLChatConfig) -> str:
    """Of a checkpoint's weights; released ones are bfloat16, and float16 takes as many bytes."""
    dtype = str(config.dtype).removeprefix("torch.")
    return "float32" if dtype == "float32" else "bfloat16"


def find_config(name: str) -> InternVLChatConfig:
    """The configuration of a checkpoint folder, of a release, or of a Hub repository (of which only that is read).

    Raises:
        ValueError: there is none, or it is that of an encoder alone.
    """
    if not Path(name).is_dir():
        try:
            config = families.find(name).config()
        except families.UnknownReleaseError:
            if name.count("/") != 1 or name.startswith(_OUTPUTS):
                raise
        else:
            if not isinstance(config, InternVLChatConfig):
                raise ValueError(f"{name} is a vision encoder alone: name a whole model")
            return config
    return InternVLChatConfig.from_pretrained(name)


def _base_config(model: Any, name: str) -> InternVLChatConfig:
    """The configuration that a recipe starts from; an output of another recipe has that one's."""
    source = model.model_name_or_path
    if source is not None:
        stage = source.removeprefix(_OUTPUTS)
        if stage != source and stage in list_recipes() and not Path(source).is_dir():
            earlier = load_recipe(stage)
            config = _base_config(earlier.model, earlier.name)
            apply_overrides(config, earlier.model)
            return config
        return find_config(source)
    if model.llm_path is not None and model.config is None:
        return _composed(model, name)
    fields = dict(model.config)
    if "vocab_size" not in (fields.get("llm_config") or {}):
        raise ValueError(f"{name}: model.config.llm_config has no vocab_size: add it, or name a model with --model")
    return InternVLChatConfig(**fields)


def _composed(model: Any, name: str) -> InternVLChatConfig:
    """That of a release with the same language model (which may be named by it), around the recipe's encoder."""
    encoder, llm = (Path(str(path)).name for path in (model.vision_path, model.llm_path))
    for release in families.releases():
        if _same_shape(llm) in map(_same_shape, filter(None, (release.llm, release.name))):
            config: Any = release.config()
            tower = families.find(encoder).config()
            config.vision_config = getattr(tower, "vision_config", tower)  # a chat model lends its own
            return config
    raise ValueError(f"{name}: no release is made of {llm}: name a model of the same shape with --model")


def _same_shape(name: str) -> str:
    """A model and its instruction-tuned version under one name."""
    return name.lower().removesuffix("-instruct")
