"""Keys and values of recipes: the fields of the classes behind the sections, each value as its field's type.

Whether values make sense together is for those classes to say, when they are made.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from enum import Enum
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers.hf_argparser import string_to_bool

from .arguments import DataArguments, InternVLTrainingArguments, ModelArguments
from .preference_arguments import PreferenceArguments

PREFERENCE = "preference"
SECTIONS: dict[str, type] = {
    "model": ModelArguments,
    "data": DataArguments,
    "training": InternVLTrainingArguments,
    PREFERENCE: PreferenceArguments,
}
OPTIONAL = (PREFERENCE,)  # there or not, which decides what is done: an empty one is there, null takes it away
BATCH = "global_batch_size"
_CONVERSIONS = (ValueError, TypeError, OverflowError)
# The same argument under the names of transformers up to 5.2x and of later versions, which warn about the old one.
_RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}

Settings = dict[str, Any]


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the file or override and the key."""


def checked_settings(content: Settings, where: str) -> Settings:
    """Content of one file or override with every key known and every value of its field's type.

    Raises:
        RecipeError: an unknown key, or a value that cannot be converted; the message starts with `where`.
    """
    settings: Settings = {}
    for key, value in content.items():
        if key == BATCH:
            settings[key] = _positive(value, where)
        elif key not in SECTIONS:
            raise RecipeError(f"{where}: unknown key {key!r}; {nearest_names(key, ['extends', BATCH, *SECTIONS])}")
        elif value is None and key in OPTIONAL:
            settings[key] = None
        elif value is not None and not isinstance(value, dict):
            raise RecipeError(f"{where}: {key} must be a mapping of fields, got {value!r}")
        else:
            fields = {current_name(key, field): item for field, item in (value or {}).items()}
            settings[key] = {field: _field(key, field, item, where) for field, item in fields.items()}
    return settings


def current_name(section: str, field: str) -> str:
    """The name that the installed transformers prefers for an argument that has two."""
    for old, new in _RENAMED.items():
        if field in (old, new):
            return new if new in field_types(section) else old
    return field


def _positive(value: Any, where: str) -> int | None:
    number = None if value is None else _convert(value, int, f"{where}: {BATCH}")
    if number is not None and number < 1:
        raise RecipeError(f"{where}: {BATCH} must be at least 1, got {number}")
    return number


def _field(section: str, field: str, value: Any, where: str) -> Any:
    hints = field_types(section)
    if field not in hints:
        raise RecipeError(f"{where}: unknown key '{section}.{field}'; {nearest_names(str(field), list(hints))}")
    return _convert(value, hints[field], f"{where}: {section}.{field}")


def nearest_names(key: Any, known: list[str]) -> str:
    """For a message about an unknown key: the known ones that are most like it."""
    closest = difflib.get_close_matches(str(key), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(closest)}?" if closest else f"known: {', '.join(known[:8])}"


@cache
def field_types(section: str) -> dict[str, Any]:
    """Fields of a section's class that can be given, with their types."""
    hints = get_type_hints(SECTIONS[section])
    return {field.name: hints[field.name] for field in dataclasses.fields(SECTIONS[section]) if field.init}


@cache
def field_defaults(section: str) -> dict[str, Any]:
    """Fields of a section's class with their defaults."""
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
