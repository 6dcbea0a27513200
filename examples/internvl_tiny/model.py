"""InternVL-tiny's parts: recipe to configuration and processor; samples of the tasks to training records."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerFast

from ...configuration_internvl_chat import InternVLChatConfig
from ...conversation import IMAGE_PLACEHOLDER
from ...data.records import Message, Record
from ...processing_internvl import InternVLProcessor
from ...prompting_internvl import IMG_CONTEXT_TOKEN
from .tasks import Sample, TaskMixture

RECIPE = Path(__file__).parents[2] / "recipes" / "internvl_tiny.yaml"
# Most samples drawn for one record; a stage that suits one in ten misses about once in 1000 records.
_TRIES = 64


def load_recipe(path: str | Path = RECIPE) -> dict[str, Any]:
    """A recipe file: `seed`, `batch_size`, and the sections `model`, `stages`, `training` and `held_out`."""
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def make_config(model: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> InternVLChatConfig:
    """Configuration from a recipe's `model` section; ids and vocabulary come from the tokenizer."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    llm = {**model["llm_config"], **ids, "vocab_size": len(tokenizer)}
    context = tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    config = InternVLChatConfig(**{**model, "llm_config": llm}, **ids, img_context_token_id=context)
    config.architectures = ["InternVLChatModel"]
    config.force_image_size = config.image_size  # LMDeploy counts visual tokens from it alone
    return config


def make_processor(config: InternVLChatConfig, tokenizer: PreTrainedTokenizerFast) -> InternVLProcessor:
    """Processor with the template and the tiling of `config`; the tokenizer gets its chat template."""
    processor = InternVLProcessor.from_model_config(config, tokenizer)
    tokenizer.chat_template = processor.chat_template
    return processor


def to_data_record(sample: Sample) -> Record:
    """A sample of the task suite as a training record, its picture in memory."""
    messages: list[Message] = []
    for place, turn in enumerate(sample.turns):
        marker = f"{IMAGE_PLACEHOLDER}\n" if place == 0 and sample.image is not None else ""
        messages += [Message("human", marker + turn.question), Message("gpt", turn.answer)]
    return Record(tuple(messages), () if sample.image is None else (sample.image,), sample.id)


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum: `steps` optimiser steps on pictures of at most `max_tiles` tiles.

    `weights` and `turns` are those of `TaskMixture`.
    """

    steps: int
    max_tiles: int
    weights: dict[str, float] | None = None
    turns: tuple[int, int] = (2, 4)


class MixtureRecords(Sequence[Record]):
    """Training samples of a curriculum, drawn when asked for; record i is a function of the arguments and i alone.

    Args:
        stages: In order.
        batch_size: Samples per optimiser step.
        seed: Of the mixtures.
        image_processor: Says how many tiles a picture takes.
    """

    def __init__(self, stages: Sequence[Stage], batch_size: int, seed: int, image_processor: Any) -> None:
        self.ends: list[int] = list(accumulate(stage.steps * batch_size for stage in stages))
        self.stages = list(stages)
        self.mixtures = [TaskMixture("train", seed, stage.weights, tuple(stage.turns)) for stage in stages]
        self.image_processor = image_processor

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> Record:  # type: ignore[override]  # no slices
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}, there are {len(self)} records")
        place = bisect_right(self.ends, index)
        stage, mixture = self.stages[place], self.mixtures[place]
        # Candidates of different records never meet: record i tries the indices i * _TRIES, i * _TRIES + 1, ...
        for candidate in range(index * _TRIES, (index + 1) * _TRIES):
            sample = mixture[candidate]
            if sample.image is None or self.image_processor.num_tiles(*sample.image.size) <= stage.max_tiles:
                break
        return to_data_record(sample)
