"""What `internvl validate` and `internvl preview` are told: a recipe, a meta json or an annotation file, and a model.

Weights are never read: tokenizer, image processor and configuration are enough to measure and to show rows.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..configuration_internvl_chat import InternVLChatConfig
from ..conversion.folders import resolve
from ..data.features import FeatureMaker
from ..data.media import RowSettings
from ..data.pairs import parse_any, parse_pair
from ..data.records import RowParser, parse_record
from ..data.validate import Limits
from ..training.arguments import DataArguments, ModelArguments
from ..training.overrides import apply_overrides, make_processor
from ..training.recipes import load_recipe
from ..training.vocabulary import SPECIAL_TOKENS, load_own_tokenizer

_PARTS = ("vision_path", "llm_path", "mlp_path", "config", "tokenizer_path")
SEED = 42  # as TrainingArguments


class DataInputError(ValueError):
    """Arguments of a command that do not go together; the message says what to give instead."""


@dataclass(frozen=True)
class DataInputs:
    """What a command works on.

    Attributes:
        data: Which data, and how it is read.
        model: Which checkpoint; None if none is named.
        limits: Of the run.
        loss_reduction: Of the run.
        parse: Reads rows: preference rows with a recipe that has a `preference` section, conversations with any other
            recipe, either kind without one.
    """

    data: DataArguments
    model: ModelArguments | None
    limits: Limits
    loss_reduction: str = "square"
    parse: RowParser = parse_any

    @property
    def settings(self) -> RowSettings:
        """How rows are read; a row that is too long can still be looked at."""
        return RowSettings.of_arguments(self.data)


def read_inputs(options: argparse.Namespace) -> DataInputs:
    """The data, model and limits that the command line names.

    Raises:
        ValueError: arguments that do not go together, or an unreadable recipe or file.
    """
    path = Path(options.data)
    is_file = path.suffix.lower() in (".json", ".jsonl")
    if not is_file:
        inputs = _read_recipe(options.data, options.overrides)
    else:
        if options.overrides:
            raise DataInputError(f"{options.overrides[0]!r}: overrides go with a recipe, {path} is a data file")
        inputs = DataInputs(_data_of(path, options.images), None, Limits(seed=SEED))
    if options.images is not None and (not is_file or inputs.data.meta_path is not None):
        raise DataInputError("--images goes with an annotation file; recipes and meta files name their own folders")
    return inputs if options.model is None else replace(inputs, model=_with_checkpoint(inputs.model, options.model))


def _read_recipe(name: str, overrides: Sequence[str]) -> DataInputs:
    recipe = load_recipe(name, overrides)
    training = recipe.training
    limits = Limits(
        training.longest_row,
        training.num_images_expected if training.packing else None,
        training.seed,
    )
    data = recipe.data
    if not (data.meta_path or data.data_paths or data.eval_meta_path or data.eval_data_paths):
        raise DataInputError(f"{recipe.name} names no data; add data.meta_path=FILE, or data.data_paths=[FILE]")
    parse = parse_record if recipe.preference is None else parse_pair
    return DataInputs(data, recipe.model, limits, training.loss_reduction, parse)


def _data_of(path: Path, images: str | None) -> DataArguments:
    """Of a meta json, which holds an object, or of an annotation file, which holds rows."""
    if path.suffix.lower() == ".json":
        try:
            content = json.loads(path.read_bytes())
        except (ValueError, RecursionError) as error:
            raise DataInputError(f"{path} is not valid json: {error}") from error
        if isinstance(content, dict):
            return DataArguments(meta_path=str(path))
    return DataArguments(data_paths=[str(path)], image_folders=[images])


def _with_checkpoint(model: ModelArguments | None, checkpoint: str) -> ModelArguments:
    if model is None:
        return ModelArguments(model_name_or_path=checkpoint)
    return replace(model, model_name_or_path=checkpoint, **dict.fromkeys(_PARTS))  # type: ignore[arg-type]


def load_maker(model: ModelArguments) -> FeatureMaker:
    """Tokenizer, image processor and configuration of a checkpoint as training has them, without its weights.

    Raises:
        DataInputError: the model is made from parts. ValueError, OSError: the checkpoint cannot be read.
    """
    if model.model_name_or_path is None:
        raise DataInputError("the recipe makes its model from parts; give a checkpoint of that kind with --model")
    folder = resolve(model.model_name_or_path, weights=False)
    config = InternVLChatConfig.from_pretrained(folder)
    apply_overrides(config, model)
    tokenizer = load_own_tokenizer(model.tokenizer_path or folder)
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    processor = make_processor(config, tokenizer, model, folder)
    return FeatureMaker(tokenizer, processor.image_processor, config)
