"""Overrides of recipes on the command line: `section.field=value`, or `field=value` where the name is clear.

Merging them over a recipe is `recipes`.
"""

from __future__ import annotations

from typing import get_args, get_origin

from .recipe_fields import (
    BATCH,
    OPTIONAL,
    SECTIONS,
    RecipeError,
    Settings,
    checked_settings,
    current_name,
    field_types,
    nearest_names,
)
from .recipe_yaml import parse_yaml


def parse_override(override: str) -> Settings:
    """`training.learning_rate=1e-5` as settings.

    Raises:
        RecipeError: it is no override, or its field is unknown, ambiguous or of another type.
    """
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise RecipeError(f"override {override!r}: write section.field=value, such as training.learning_rate=1e-5")
    value, path = parse_yaml(text, f"override {override!r}"), _path(key, override)
    if len(path) == 2 and isinstance(value, int | float) and not _takes(type(value), *path) and _takes(str, *path):
        value = text.strip()  # a name such as 1e5 stays as it was written
    if len(path) > 2 and not _takes(dict, *path[:2]):
        raise RecipeError(f"override {override!r}: {'.'.join(path[:2])} is not a mapping, it has no {path[2]!r}")
    for part in reversed(path):
        value = {part: value}
    return checked_settings(value, f"override {override!r}")


def _path(key: str, override: str) -> list[str]:
    """Section and field of an override's key, which may leave out the section."""
    path = key.split(".")
    if path == [BATCH] or (path[0] in SECTIONS and (len(path) > 1 or path[0] in OPTIONAL)):
        return path
    owners = [section for section in SECTIONS if current_name(section, path[0]) in field_types(section)]
    if len(owners) == 1:
        return [owners[0], *path]
    if owners:
        raise RecipeError(f"override {override!r}: {path[0]} is a field of {' and '.join(owners)}; name the section")
    known = [BATCH, *SECTIONS, *(name for section in SECTIONS for name in field_types(section))]
    raise RecipeError(f"override {override!r}: unknown key {key!r}; {nearest_names(path[0], known)}")


def _takes(kind: type, section: str, field: str) -> bool:
    """Whether a field's type, or one of a union, is `kind`."""
    hint = field_types(section).get(current_name(section, field))
    return any((get_origin(option) or option) is kind for option in (hint, *get_args(hint)))
