"""Recipes: the settings of a training run as a YAML file, and the bundled files of the published stages.

A file has up to five keys: `extends` (files merged below it), `model`, `data`, `training` (fields of the three classes
of `arguments.py`) and `global_batch_size`, which becomes `gradient_accumulation_steps` once the number of processes is
known. Nothing is loaded, downloaded or trained here, and data is never part of a bundled recipe.

YAML is read by the core schema of YAML 1.2: `1e-5` is a number and `no` is text, unlike in PyYAML's default. Paths in
`extends` are relative to the file that has them; all others are relative to the working directory, as in scripts.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import os
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from transformers.hf_argparser import string_to_bool

from .arguments import DataArguments, InternVLTrainingArguments, ModelArguments

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
SECTIONS: dict[str, type] = {"model": ModelArguments, "data": DataArguments, "training": InternVLTrainingArguments}
BATCH = "global_batch_size"
_NO_RECIPES = ("_base", "accelerate", "deepspeed")
_CONVERSIONS = (ValueError, TypeError, OverflowError)
# The same argument under the names of transformers up to 5.2x and of later versions, which warn about the old one.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
# A Hub repository, "name" or "organisation/name"; anything longer or starting with a dot or slash is a local path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")

Settings = dict[str, Any]


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the file or override and the key."""


@dataclass(frozen=True)
class Recipe:
    """A loaded recipe.

    Attributes:
        name: Of a bundled recipe its path below `recipes/` without suffix, else the file's name without suffix.
        model, data, training: The arguments.
        settings: What the arguments were made from, per section, and `global_batch_size`; see `dump_recipe`.
        source: Text of the file.
    """

    name: str
    model: ModelArguments
    data: DataArguments
    training: InternVLTrainingArguments
    settings: Settings
    source: str


# ------------------------------------------------------------------------------------------------------------- loading


def load_recipe(path: str | Path, overrides: Sequence[str] = (), *, world_size: int | None = None) -> Recipe:
    """Reads a recipe, what it extends and the overrides, later ones winning.

    Two settings have defaults of their own here: `output_dir` is `runs/NAME`, and `use_cpu` is true for bf16 or fp16
    where there is no accelerator, so that every recipe can be inspected (`check_ready` refuses to train such a one).

    Args:
        path: A file, or the name of a bundled recipe such as `internvl2_5/8b_stage2`.
        overrides: `section.field=value`; the value is YAML. `field=value` does if one section has such a field, and
            `model.config.llm_config.hidden_size=64` reaches into a dictionary. Dictionaries merge, all else replaces.
        world_size: Number of processes that share a global batch; None for `WORLD_SIZE` of the environment, else 1.

    Raises:
        RecipeError: no such recipe, unknown keys, values of a wrong kind, or a batch that the processes cannot share.
    """
    file = find_recipe(path)
    name, settings = _name(file), _read(file, ())
    for override in overrides:
        settings = _merged(settings, _parse_override(override))
    settings.setdefault("training", {}).setdefault("output_dir", f"runs/{name}")
    values = {section: copy.deepcopy(settings.get(section, {})) for section in SECTIONS}
    steps = _accumulation_steps(settings, os.environ.get("WORLD_SIZE", 1) if world_size is None else world_size, name)
    if steps is not None:
        values["training"]["gradient_accumulation_steps"] = steps
    training = values["training"]
    if (training.get("bf16") or training.get("fp16")) and not torch.accelerator.is_available():
        training.setdefault("use_cpu", True)
    try:
        model, data, training = (cls(**values[section]) for section, cls in SECTIONS.items())
    except ValueError as error:
        raise RecipeError(f"{name}: {error}") from error
    return Recipe(name, model, data, training, settings, file.read_text(encoding="utf-8"))


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
    content = _parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping with {', '.join(SECTIONS)}, got {type(content).__name__}")
    extends = content.pop("extends", None) or []
    extends = [extends] if isinstance(extends, str) else extends
    if not isinstance(extends, list) or not all(isinstance(item, str) for item in extends):
        raise RecipeError(f"{file}: extends must be a path or a list of paths, got {extends!r}")
    settings: Settings = {}
    for item in extends:
        settings = _merged(settings, _read(find_recipe(item, file.parent), (*chain, file)))
    return _merged(settings, _checked(content, str(file)))


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
    per_device = training.get("per_device_train_batch_size", _defaults("training")["per_device_train_batch_size"])
    at_once = per_device * int(world_size)
    steps, rest = divmod(total, at_once)
    if rest:
        nearest = [str(count * at_once) for count in (steps, steps + 1) if count]
        raise RecipeError(
            f"{name}: {BATCH}={total} is not a multiple of per_device_train_batch_size {per_device} x {world_size} "
            f"processes = {at_once}; nearest possible: {BATCH}={' or '.join(nearest)}"
        )
    return steps


# ------------------------------------------------------------------------------------------------------ keys, values


def _checked(content: Settings, where: str) -> Settings:
    """Content of one file or override with every key known and every value of its field's type."""
    settings: Settings = {}
    for key, value in content.items():
        if key == BATCH:
            settings[key] = _positive(value, where)
        elif key not in SECTIONS:
            raise RecipeError(f"{where}: unknown key {key!r}; {_nearest(key, ['extends', BATCH, *SECTIONS])}")
        elif value is not None and not isinstance(value, dict):
            raise RecipeError(f"{where}: {key} must be a mapping of fields, got {value!r}")
        else:
            fields = {_current(key, field): item for field, item in (value or {}).items()}
            settings[key] = {field: _field(key, field, item, where) for field, item in fields.items()}
    return settings


def _current(section: str, field: str) -> str:
    """The name that the installed transformers prefers for an argument that has two."""
    for old, new in _RENAMED.items():
        if field in (old, new):
            return new if new in _hints(section) else old
    return field


def _positive(value: Any, where: str) -> int | None:
    number = None if value is None else _convert(value, int, f"{where}: {BATCH}")
    if number is not None and number < 1:
        raise RecipeError(f"{where}: {BATCH} must be at least 1, got {number}")
    return number


def _field(section: str, field: str, value: Any, where: str) -> Any:
    hints = _hints(section)
    if field not in hints:
        raise RecipeError(f"{where}: unknown key '{section}.{field}'; {_nearest(str(field), list(hints))}")
    return _convert(value, hints[field], f"{where}: {section}.{field}")


def _nearest(key: Any, known: list[str]) -> str:
    closest = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(closest)}?" if closest else f"known: {', '.join(known[:8])}"


@cache
def _hints(section: str) -> dict[str, Any]:
    """Fields of a section's class that can be given, with their types."""
    hints = get_type_hints(SECTIONS[section])
    return {field.name: hints[field.name] for field in dataclasses.fields(SECTIONS[section]) if field.init}


@cache
def _defaults(section: str) -> dict[str, Any]:
    fields = dataclasses.fields(SECTIONS[section])
    return {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as a field's type: `1e-5` given as text, `1` for a float, one item for a list, `yes` for true."""
    union = get_origin(hint) in (Union, types.UnionType)
    options = get_args(hint) if union else (hint,)
    if value is None and (type(None) in options or hint is Any):
        return None
    exact = [kind for kind in options if type(value) is (get_origin(kind) or kind)]
    for kind in (*exact, *options):
        try:
            return _as(value, kind, where)
        except _CONVERSIONS as error:
            if isinstance(error, RecipeError):
                raise
    expected = " or ".join("null" if kind is type(None) else _describe(kind) for kind in options)
    raise RecipeError(f"{where} must be {expected}, got {value!r}")


def _describe(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(item.value) for item in kind)
    return str(kind) if get_origin(kind) else getattr(kind, "__name__", str(kind))


def _as(value: Any, kind: Any, where: str) -> Any:
    """`value` as one type.

    Raises:
        ValueError, TypeError: it is none.
    """
    origin = get_origin(kind) or kind
    if kind is Any:
        return value
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_convert(item, (get_args(kind) or (Any,))[0], where) for item in items]
    if origin is dict and isinstance(value, dict):
        return value
    if origin is Literal and value in get_args(kind):
        return value
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value).value
    if kind is bool:
        return string_to_bool(value) if isinstance(value, str) else _same(value, bool)
    if kind in (int, float, str) and isinstance(value, int | float | str) and not isinstance(value, bool):
        if kind is str and isinstance(value, float):
            raise TypeError  # how it was written is lost
        return _whole(value) if kind is int else kind(value)
    raise TypeError


def _same(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _whole(value: int | float | str) -> int:
    number = value if isinstance(value, int) else float(value)
    if number != int(number):
        raise ValueError
    return int(number)


# ----------------------------------------------------------------------------------------------------------- overrides


def _parse_override(override: str) -> Settings:
    """`training.learning_rate=1e-5` as settings."""
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise RecipeError(f"override {override!r}: write section.field=value, such as training.learning_rate=1e-5")
    value, path = _parse_yaml(text, f"override {override!r}"), _path(key, override)
    if len(path) == 2 and isinstance(value, int | float) and not _takes(type(value), *path) and _takes(str, *path):
        value = text.strip()  # a name such as 1e5 stays as it was written
    if len(path) > 2 and not _takes(dict, *path[:2]):
        raise RecipeError(f"override {override!r}: {'.'.join(path[:2])} is not a mapping, it has no {path[2]!r}")
    for part in reversed(path):
        value = {part: value}
    return _checked(value, f"override {override!r}")


def _path(key: str, override: str) -> list[str]:
    """Section and field of an override's key, which may leave out the section."""
    path = key.split(".")
    if path == [BATCH] or (path[0] in SECTIONS and len(path) > 1):
        return path
    owners = [section for section in SECTIONS if _current(section, path[0]) in _hints(section)]
    if len(owners) == 1:
        return [owners[0], *path]
    if owners:
        raise RecipeError(f"override {override!r}: {path[0]} is a field of {' and '.join(owners)}; name the section")
    known = [BATCH, *(name for section in SECTIONS for name in _hints(section))]
    raise RecipeError(f"override {override!r}: unknown key {key!r}; {_nearest(path[0], known)}")


def _takes(kind: type, section: str, field: str) -> bool:
    """Whether a field's type, or one of a union, is `kind`."""
    hint = _hints(section).get(_current(section, field))
    return any((get_origin(option) or option) is kind for option in (hint, *get_args(hint)))


# ---------------------------------------------------------------------------------------------------- saving, checking


def dump_recipe(recipe: Recipe) -> str:
    """A recipe as one file without `extends`, to be saved with its run: what differs from the defaults.

    `load_recipe` makes equal arguments of it, on another number of processes up to the accumulation steps. It records
    what was loaded: later changes to the arguments are not in it.
    """
    content: Settings = {}
    if recipe.settings.get(BATCH) is not None:
        content[BATCH] = recipe.settings[BATCH]
    for section in SECTIONS:
        defaults, values = _defaults(section), recipe.settings.get(section, {})
        changed = {key: value for key, value in values.items() if value != defaults[key]}
        content |= {section: changed} if changed else {}
    steps = recipe.training.gradient_accumulation_steps
    header = f"# Settings of {recipe.name}, resolved; gradient_accumulation_steps was {steps}.\n"
    return header + yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


def check_ready(recipe: Recipe) -> None:
    """Checks that training can start: there is data, named local files exist, mixed precision has an accelerator.

    Raises:
        RecipeError: with what to add.
    """
    name, data = recipe.name, recipe.data
    if data.meta_path is None and not data.data_paths:
        raise RecipeError(
            f"{name} does not say what to train on; add data.meta_path=path/to/meta.json, or "
            "data.data_paths=[a.jsonl] data.image_folders=[path/to/images]"
        )
    for key in ("meta_path", "eval_meta_path", "data_paths", "eval_data_paths"):
        value = getattr(data, key)
        for path in value if isinstance(value, list) else [value]:
            if path is not None and not Path(path).exists():
                raise RecipeError(f"{name}: data.{key}: {path} does not exist")
    for key in ("model_name_or_path", "vision_path", "llm_path", "mlp_path", "tokenizer_path"):
        path = getattr(recipe.model, key)
        if path is not None and not Path(path).exists() and not _HUB_ID.fullmatch(path):
            raise RecipeError(f"{name}: model.{key}: {path} does not exist{_how_to_get(path, key)}")
    if recipe.training.use_cpu and "use_cpu" not in recipe.settings["training"]:
        raise RecipeError(
            f"{name} trains in 16 bits, but no accelerator was found; add training.use_cpu=true to train on the CPU"
        )


def _how_to_get(path: str, key: str) -> str:
    """For a missing input of a stage: the stage whose output it is."""
    stage = path.removeprefix("runs/")
    if stage != path and stage in list_recipes():
        return f"; run the stage before this one (internvl train {stage} ...), or set model.{key}=PATH"
    return f"; the recipe's header says where it comes from, or set model.{key}=PATH"


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain scalars of YAML 1.2's core schema; a key given twice is an error."""

    yaml_implicit_resolvers: dict[str, list] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the parent's, refusing duplicates, of which the parent would silently keep the last."""
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        for key in keys:
            if keys.count(key) > 1:
                problem = f"key {key!r} is given twice"
                raise yaml.constructor.ConstructorError(problem=problem, problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes text that YAML 1.1 and 1.2 read alike, without anchors for values that occur twice."""

    def ignore_aliases(self, data: Any) -> bool:
        """No anchors."""
        return True


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.nan", "-+.0123456789"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), list(_first))


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
