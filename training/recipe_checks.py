"""Whether the training of a recipe can start, asked before anything is loaded.

What a recipe may say at all is checked when it is read (`recipes`), its data by `data.validate`.
"""

from __future__ import annotations

import re
from pathlib import Path

from .recipe_fields import RecipeError
from .recipes import Recipe, list_recipes

# A Hub repository, "name" or "organisation/name"; anything longer or starting with a dot or slash is a local path.
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


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
    keys = ("model_name_or_path", "vision_path", "llm_path", "mlp_path", "tokenizer_path")
    paths = {f"model.{key}": getattr(recipe.model, key) for key in keys}
    if recipe.preference is not None:
        paths["preference.reference_path"] = recipe.preference.reference_path
    for key, path in paths.items():
        if path is not None and not Path(path).exists() and not _HUB_ID.fullmatch(path):
            raise RecipeError(f"{name}: {key}: {path} does not exist{_how_to_get(path, key)}")
    if recipe.training.use_cpu and "use_cpu" not in recipe.settings["training"]:
        raise RecipeError(
            f"{name} trains in 16 bits, but no accelerator was found; add training.use_cpu=true to train on the CPU"
        )


def _how_to_get(path: str, key: str) -> str:
    """For a missing input of a stage: the stage whose output it is."""
    stage = path.removeprefix("runs/")
    if stage != path and stage in list_recipes():
        return f"; run the stage before this one (internvl train {stage} ...), or set {key}=PATH"
    return f"; the recipe's header says where it comes from, or set {key}=PATH"
