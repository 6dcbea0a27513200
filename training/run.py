"""`internvl train`: a run from a recipe to a checkpoint with its report.

Everything that happens here is a call of a part that can be used alone: `recipes`, `building`, `data`, `trainer`,
`report`. On several processes each of them runs this (`accelerate launch`, `torchrun`).
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from transformers import enable_full_determinism, set_seed

from ..data.dataset import ConversationDataset
from ..data.media import RowSettings
from ..data.mixture import Mixture
from ..data.pairs import parse_pair
from ..data.preference_dataset import PreferenceDataset
from ..data.records import parse_record
from ..data.sources import load_sources
from .building import Built, build
from .checkpoints import find_last_checkpoint
from .mpo import MPOTrainer
from .parameters import trainable_summary
from .preference_report import describe_reference
from .recipe_checks import check_ready
from .recipe_fields import RecipeError
from .recipes import Recipe, dump_recipe
from .report import write_report
from .trainer import InternVLTrainer

INDEX_CACHE = Path(HF_HOME) / "internvl" / "lengths"
BASE = "base"  # where a model that was built for LoRA is kept, in the run's folder


class InterruptedRunError(RuntimeError):
    """The run was asked to stop; its last checkpoint continues it."""


def train(recipe: Recipe, resume: bool = False) -> Path:
    """Trains as a recipe says.

    Args:
        recipe: From `load_recipe`.
        resume: Continue from the last complete checkpoint in the output folder, from the beginning if there is none.

    Returns:
        `training.output_dir`, which then holds the trained checkpoint, or the adapters and their base model's name;
        `report.md`; `recipe.yaml`, the settings; `trainer_state.json`, every logged number; and `checkpoint-N`
        folders, each a state of the run.

    Raises:
        RecipeError: the recipe lacks something, or the output folder holds another run's checkpoints.
        InterruptedRunError: Ctrl-C or SIGTERM stopped the run after saving it.
        ValueError: model, data and settings do not go together.
        TooManySkippedError: too many rows of a data set cannot be used.
    """
    trainer = prepare(recipe, resume)
    output = Path(recipe.training.output_dir)
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        (output / "recipe.yaml").write_text(dump_recipe(recipe), encoding="utf-8")
    trainer.train(resume and find_last_checkpoint(output) is not None)
    if trainer.interrupted:
        raise InterruptedRunError(
            f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; the same command with "
            "--resume goes on"
        )
    if trainer.eval_dataset is not None and not _just_evaluated(trainer):
        trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        write_report(output, trainer, dump_recipe(recipe), trainable_summary(trainer.model), f"Run {recipe.name}")
    trainer.accelerator.wait_for_everyone()
    return output


def prepare(recipe: Recipe, resume: bool = False) -> InternVLTrainer:
    """Everything that `recipe` describes, ready to train; arguments and errors as of `train`.

    A recipe with a section `preference` reads pairs of answers and gets an `MPOTrainer`.
    """
    check_ready(recipe)
    args = recipe.training
    _check_output(Path(args.output_dir), resume)
    enable_full_determinism(args.seed) if args.full_determinism else set_seed(args.seed)
    built = build(recipe.model)
    if args.use_backbone_lora or args.use_llm_lora or args.use_mlp_lora:
        with args.main_process_first(local=False, desc="saving the base model"):
            _keep_base(built, recipe)
    options: dict[str, Any] = {
        "train_dataset": make_dataset(recipe, built),
        "eval_dataset": make_dataset(recipe, built, evaluation=True),
        "processing_class": built.processor,
        "max_skip_share": recipe.data.max_skip_share,
    }
    if recipe.preference is not None:
        return MPOTrainer(built.model, args, recipe.preference, **options)
    return InternVLTrainer(built.model, args, **options)


def _check_output(output: Path, resume: bool) -> None:
    last = find_last_checkpoint(output)
    if last is not None and not resume:
        raise RecipeError(
            f"{output} holds {last.name} of an earlier run: --resume continues it, training.output_dir=FOLDER starts "
            "another one"
        )


def _keep_base(built: Built, recipe: Recipe) -> None:
    """Adapters alone are worth nothing: fresh or composed weights below them are saved, and named as their base."""
    if recipe.model.model_name_or_path is not None:
        return
    base = (Path(recipe.training.output_dir) / BASE).resolve()
    if not (base / "config.json").is_file():
        built.model.save_pretrained(base)
        built.processor.save_pretrained(base)
    built.model.name_or_path = built.model.config.name_or_path = os.fspath(base)


def make_dataset(recipe: Recipe, built: Built, evaluation: bool = False) -> ConversationDataset | None:
    """The training or evaluation data of a recipe, None if it names none; measured where the plan needs lengths.

    Pairs of answers where the recipe has preferences, else conversations.
    """
    data, args = recipe.data, recipe.training
    sources = load_sources(data, evaluation)
    if not sources:
        return None
    settings = RowSettings.of_arguments(data, args.longest_row)
    if evaluation:  # nothing random
        sampling = "middle" if data.frame_sampling == "rand" else data.frame_sampling
        settings = replace(settings, data_augment=False, frame_sampling=sampling)
    pairs = recipe.preference is not None
    dataset = (PreferenceDataset if pairs else ConversationDataset)(
        Mixture(sources, parse=parse_pair if pairs else parse_record),
        built.tokenizer,
        built.processor.image_processor,
        built.model.config,
        on_error="skip",
        settings=settings,
        seed=args.seed,
    )
    if not evaluation and args.needs_lengths:
        with args.main_process_first(desc="measuring the rows"):
            dataset.build_index(data.index_cache or INDEX_CACHE, data.index_workers, not args.disable_tqdm)
    return dataset


def _just_evaluated(trainer: InternVLTrainer) -> bool:
    steps = [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return bool(steps) and steps[-1] == trainer.state.global_step


def describe(trainer: InternVLTrainer) -> str:
    """What a run will do, in a few lines for the terminal."""
    args, rows = trainer.args, trainable_summary(trainer.model)
    lines = [f"{row.module:<15}{row.trainable:>16,} of {row.total:>16,} parameters are trained" for row in rows]
    entries = sum(trainer.accounts.entries.values())
    left_out = sum(trainer.accounts.left_out.values())
    kind = "pairs of answers" if isinstance(trainer, MPOTrainer) else "entries"
    lines.append(f"{entries:,} {kind} an epoch, {left_out:,} of them left out")
    lines += [f"compared with {describe_reference(trainer)}"] if isinstance(trainer, MPOTrainer) else []
    if trainer.plan is not None:
        planner = trainer.plan.sampler.planner
        steps = len(planner) // (args.world_size * args.gradient_accumulation_steps)
        lines.append(f"{len(planner):,} batches, {steps:,} steps an epoch")
        if args.packing:
            fill = planner.fill  # type: ignore[attr-defined]  # of an EpochPlanner
            lines.append(f"packs are {fill.tokens:.1%} full of tokens, {fill.tiles:.1%} of tiles")
    return "\n".join(lines)


def leave(code: int = 0) -> None:
    """Ends a process of several, without Python's own teardown; returns where there is only one.

    In the teardown DistributedDataParallel's destructor waits for a thread of gloo that waits for Python: a deadlock
    that was seen with torch 2.13 after everything had been written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if code == 0 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
