"""Recipes: the settings of a training run as a YAML file, and the bundled files of the published stages.

A file has up to six keys: `extends` (files merged below it), `model`, `data`, `training` (fields of the three classes
of `arguments.py`), `preference` (of `preference_arguments.py`; a recipe with this section trains on pairs of answers)
and `global_batch_size`, which becomes `gradient_accumulation_steps` once the number of processes is known. Nothing is
loaded, downloaded or trained here, and data is never part of a bundled recipe.

Paths in `extends` are relative to the file that has them; all others are relative to the working directory, as in
scripts. Keys and values are checked by `recipe_fields`, overrides read by `recipe_overrides`, YAML by `recipe_yaml`.
"""

from __future__ import annotations

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arguments import DataArguments, InternVLTrainingArguments, ModelArguments
from .preference_arguments import PreferenceArguments
from .recipe_fields import BATCH, OPTIONAL, SECTIONS, RecipeError, Settings, checked_settings, field_defaults
from .recipe_overrides import parse_override
from .recipe_yaml import dump_yaml, parse_yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
_ON_DISK = "# Weights on disk, no Hub names: "
_WEIGHTS = ("model_name_or_path", "vision_path", "llm_path", "mlp_path")
_NO_RECIPES = ("_base", "accelerate", "deepspeed")


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe.

    Attributes:
        name: Of a bundled recipe its path below `recipes/` without suffix, else the file's name without suffix.
        model, data, training: The arguments.
        settings: What the arguments were made from, per section, and `global_batch_size`; see `dump_recipe`.
        source: Text of the file.
        preference: The arguments of preference optimisation; None where neither a file nor an override has the
            section.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    training: InternVLTrainingArguments
    settings: Settings
    source: str
    preference: PreferenceArguments | None = None


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Recipe:
    """Reads a recipe, what it extends and the overrides, later ones winning.

    Two settings have defaults of their own here: `output_dir` is `runs/NAME`, and `use_cpu` is true for bf16 or fp16
    where there is no accelerator, so that every recipe can be inspected (`recipe_checks.check_ready` refuses to train
    such a one).

    Args:
        path: A file, or the name of a bundled recipe such as `internvl2_5/8b_stage2`.
        overrides: `section.field=value`; the value is YAML. `field=value` does if one section has such a field, and
            `model.config.llm_config.hidden_size=64` reaches into a dictionary. Dictionaries merge, all else replaces.
            `preference={}` adds that section with its defaults, `preference=null` takes it away. A number of epochs
            takes the place of the recipe's number of steps.
        world_size: Number of processes that share a global batch; None for `WORLD_SIZE` of the environment, else 1.

    Raises:
        RecipeError: no such recipe, unknown keys, values of a wrong kind, or a batch that the processes cannot share.
    """
    file = find_recipe(path)
    name, settings = _name(file), _read(file, ())
    for override in overrides:
        settings = _over(settings, parse_override(override))
    settings.setdefault("training", {}).setdefault("output_dir", f"runs/{name}")
    values: dict[str, Any] = {
        key: copy.deepcopy(settings.get(key, None if key in OPTIONAL else {})) for key in SECTIONS
    }
    steps = _accumulation_steps(settings, os.environ.get("WORLD_SIZE", 1) if world_size is None else world_size, name)
    if steps is not None:
        values["training"]["gradient_accumulation_steps"] = steps
    training = values["training"]
    if (training.get("bf16") or training.get("fp16")) and not torch.accelerator.is_available():
        training.setdefault("use_cpu", True)
    try:
        made = {key: cls(**values[key]) for key, cls in SECTIONS.items() if values[key] is not None}
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error
    return Recipe(name=name, settings=settings, source=file.read_text(encoding="utf-8"), **made)


def list_recipes() -> list[str]:
    """Names of the bundled recipes."""
    files = (file.relative_to(RECIPES) for file in RECIPES.glob("*/*.yaml"))
    return sorted(file.with_suffix("").as_posix() for file in files if file.parts[0] not in _NO_RECIPES)


def find_recipe(path: str | Path, base: Path | None = None) -> Path:
    """The file of a recipe: one relative to `base` (None: the working directory), else a bundled one.

    Raises:
        RecipeError: there is none; the message lists the closest bundled names.
    """
    for file in ((base or Path()) / path, RECIPES / path, RECIPES / f"{path}.yaml"):
        if file.is_file():
            return file.resolve()
    names = list_recipes()
    closest = difflib.get_close_matches(str(path).removesuffix(".yaml"), names, n=3, cutoff=0.5)
    hint = f"closest bundled recipes: {', '.join(closest)}" if closest else "bundled recipes are in docs/recipes.md"
    raise RecipeError(f"no recipe {str(path)!r}: neither a file nor a bundled recipe; {hint}")


def _name(file: Path) -> str:
    bundled = file.is_relative_to(RECIPES)
    return file.relative_to(RECIPES).with_suffix("").as_posix() if bundled else file.stem


def _read(file: Path, chain: tuple[Path, ...]) -> Settings:
    """Settings of a file over those that it extends; keys and values checked."""
    if file in chain:
        raise RecipeError(" extends ".join(str(link) for link in (*chain[chain.index(file) :], file)) + ": a cycle")
    content = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping with {', '.join(SECTIONS)}, got {type(content).__name__}")
    extends = content.pop("extends", None) or []
    extends = [extends] if isinstance(extends, str) else extends
    if not isinstance(extends, list) or not all(isinstance(item, str) for item in extends):
        raise RecipeError(f"{file}: extends must be a path or a list of paths, got {extends!r}")
    settings: Settings = {}
    for item in extends:
        settings = _merged(settings, _read(find_recipe(item, file.parent), (*chain, file)))
    return _over(settings, checked_settings(content, str(file)))


def _over(below: Settings, above: Settings) -> Settings:
    """`above` over `below`; a number of epochs replaces a number of steps below it, which would win in silence."""
    training = above.get("training") or {}
    if "num_train_epochs" in training and "max_steps" not in training and "max_steps" in below.get("training", {}):
        below = _merged(below, {"training": {"max_steps": -1}})
    return _merged(below, above)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> Settings:
    """`above` over `below`; mappings are merged key by key."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _accumulation_steps(settings: Settings, world_size: int | str, name: str) -> int | None:
    """Gradient accumulation that makes the global batch; None if the recipe gives no global batch."""
    total, training = settings.get(BATCH), settings["training"]
    if total is None:
        return None
    if "gradient_accumulation_steps" in training:
        raise RecipeError(
            f"{name}: {BATCH}={total} and training.gradient_accumulation_steps="
            f"{training['gradient_accumulation_steps']} exclude one another; to set the latter, add {BATCH}=null"
        )
    per_device = training.get("per_device_train_batch_size", field_defaults("training")["per_device_train_batch_size"])
    at_once = per_device * int(world_size)
    steps, rest = divmod(total, at_once)
    if rest:
        nearest = [str(count * at_once) for count in (steps, steps + 1) if count]
        raise RecipeError(
            f"{name}: {BATCH}={total} is not a multiple of per_device_train_batch_size {per_device} x {world_size} "
            f"processes = {at_once}; nearest possible: {BATCH}={' or '.join(nearest)}"
        )
    return steps


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as one file without `extends`, to be saved with its run: what differs from the defaults.

    `load_recipe` makes equal arguments of it, on another number of processes up to the accumulation steps. It records
    what was loaded: later changes to the arguments are not in it. A comment names the settings of weights on disk,
    since elsewhere nobody could tell a folder `runs/stage1` from a Hub name; model cards read it.
    """
    content: Settings = {}
    if recipe.settings.get(BATCH) is not None:
        content[BATCH] = recipe.settings[BATCH]
    for section in SECTIONS:
        defaults, values = field_defaults(section), recipe.settings.get(section)
        changed = {key: value for key, value in (values or {}).items() if value != defaults[key]}
        there = section in OPTIONAL and values is not None
        content |= {section: changed} if changed or there else {}
    steps = recipe.training.gradient_accumulation_steps
    header = f"# Settings of {recipe.name}, resolved; gradient_accumulation_steps was {steps}.\n"
    values = content.get("model", {})
    if on_disk := [key for key in _WEIGHTS if isinstance(values.get(key), str) and Path(values[key]).exists()]:
        header += f"{_ON_DISK}{', '.join(on_disk)}\n"
    return header + dump_yaml(content)
