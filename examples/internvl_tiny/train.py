"""Trains InternVL-tiny from nothing, on a CPU, and writes its checkpoint folder with curve, table and model card.

Run: python -m internvl_hub.examples.internvl_tiny.train --output checkpoints/internvl-tiny
On a busy machine two processes of one thread are much faster than one of two (and give the same losses):
OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m internvl_hub.examples.internvl_tiny.train
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerFast, TrainerCallback, set_seed

from ...data.dataset import ConversationDataset, Features
from ...data.records import Record
from ...modeling_internvl_chat import InternVLChatModel
from ...processing_internvl import InternVLProcessor
from ...training.arguments import InternVLTrainingArguments
from ...training.trainer import InternVLTrainer
from .evaluate import evaluate, mark
from .metrics import aggregate
from .model import RECIPE, MixtureRecords, Stage, load_recipe, make_config, make_processor
from .report import write_card, write_curve
from .tasks import TaskMixture
from .tokenizer import build_tokenizer


class SortedBlocks(Dataset):
    """Rows in their order, but inside each block of one global batch grouped by size into its micro-batches.

    Rows of like length need little padding, and the gradient stays the same, because the trainer's loss does not
    depend on how a global batch is cut. Large and small micro-batches take turns, so that two ranks get equal work.

    Args:
        dataset: Its records hold their pictures in memory.
        micro: Rows of a micro-batch.
        parts: Micro-batches of a global batch, over all ranks.
    """

    def __init__(self, dataset: ConversationDataset, micro: int, parts: int) -> None:
        self.dataset = dataset
        self.micro = micro
        self.parts = parts
        self._cached: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Features:
        block, place = divmod(index, self.micro * self.parts)
        if self._cached[0] != block:
            self._cached = (block, self._order(block))
        return self.dataset[self._cached[1][place]]

    def _order(self, block: int) -> list[int]:
        size = self.micro * self.parts
        rows = range(block * size, min((block + 1) * size, len(self)))
        ranked = sorted(rows, key=lambda row: self._size(self.dataset.records[row]))
        batches = [ranked[i : i + self.micro] for i in range(0, len(ranked), self.micro)]
        pairs = [batches[i : i + 2][:: -1 if i // 2 % 2 else 1] for i in range(0, len(batches), 2)]
        return [row for pair in pairs for batch in pair for row in batch]

    def _size(self, record: Record) -> float:
        """Estimated tokens, found without resizing a picture."""
        tiles = self.dataset.image_processor.num_tiles_per_image([image.size for image in record.images])
        visual = sum(self.dataset.config.tokens_per_tile(sum(tiles)))
        return visual + sum(len(message.text) for message in record.messages) / 4


class HeldOutCallback(TrainerCallback):
    """Logs accuracies on the val split as `held_out_<task>`.

    Args:
        processor: Of the model in training.
        every: Steps between two measurements.
        samples: Single questions, in the mixture's shares.
    """

    def __init__(self, processor: InternVLProcessor, every: int, samples: int) -> None:
        mixture = TaskMixture("val", seed=2, turns=(1, 1))
        self.samples = [mixture[i] for i in range(samples)]
        self.processor = processor
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Measures and logs, on the first rank."""
        if not state.is_world_process_zero or (state.global_step % self.every and state.global_step < state.max_steps):
            return
        table = aggregate(mark(model, self.processor, self.samples))
        scores = {f"held_out_{task}": round(entry["accuracy"], 4) for task, entry in table.items() if "/" not in task}
        state.log_history.append({**scores, "step": state.global_step})
        tqdm.write(str({key.removeprefix("held_out_"): value for key, value in scores.items()}))


def make_arguments(recipe: dict[str, Any], work: Path) -> InternVLTrainingArguments:
    """Training arguments of a recipe; the global batch is cut for as many ranks as there are."""
    settings, ranks = recipe["training"], int(os.environ.get("WORLD_SIZE", "1"))
    return InternVLTrainingArguments(
        output_dir=str(work),
        seed=recipe["seed"],
        max_steps=sum(stage["steps"] for stage in recipe["stages"]),
        gradient_accumulation_steps=max(1, recipe["batch_size"] // ranks // settings["per_device_train_batch_size"]),
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        **settings,
    )


def load_start(folder: Path, tokenizer: PreTrainedTokenizerFast) -> InternVLChatModel:
    """The model of an earlier run, in float32, to train on.

    Raises:
        ValueError: it was trained with another tokenizer, as after a change of the tasks.
    """
    if PreTrainedTokenizerFast.from_pretrained(folder).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{folder} has another vocabulary than the tasks now have: train from nothing.")
    return InternVLChatModel.from_pretrained(folder, dtype=torch.float32)


def make_trainer(recipe: dict[str, Any], work: Path, start: Path | None = None) -> InternVLTrainer:
    """Everything that `recipe` describes, ready to train; with the weights of `start` instead of fresh ones."""
    set_seed(recipe["seed"])
    tokenizer = build_tokenizer()
    config = make_config(recipe["model"], tokenizer)
    processor = make_processor(config, tokenizer)
    args = make_arguments(recipe, work)
    micro, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps * args.world_size
    stages = [Stage(**stage) for stage in recipe["stages"]]
    records = MixtureRecords(stages, micro * parts, recipe["seed"], processor.image_processor)
    dataset = ConversationDataset(records, tokenizer, processor.image_processor, config, args.max_seq_length)
    model = InternVLChatModel(config) if start is None else load_start(start, tokenizer)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return InternVLTrainer(
        model,
        args,
        train_dataset=SortedBlocks(dataset, micro, parts),
        processing_class=processor,
        callbacks=[HeldOutCallback(processor, **recipe["held_out"])],
    )


def write_checkpoint(trainer: InternVLTrainer, recipe: dict[str, Any], folder: Path, per_task: int) -> None:
    """Writes weights, configuration, processor, state, curve, table and card; measures what was written."""
    trainer.save_model(str(folder))
    # Code has one home, the repository; an upload puts it beside the weights.
    for path in (*folder.glob("*.py"), folder / "training_args.bin"):
        path.unlink(missing_ok=True)
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    write_curve(folder / "loss_curve.png", trainer.state.log_history)
    table = evaluate(folder, "test", per_task)
    write_card(folder / "README.md", recipe, trainer, table)


def main() -> None:
    """Trains, measures, writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("checkpoints/internvl-tiny"))
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--work", type=Path, default=Path("build/internvl-tiny"), help="checkpoints of the run")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--samples", type=int, default=400, help="test questions per task")
    parser.add_argument("--init", type=Path, help="train the weights of this checkpoint instead of fresh ones")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --work")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = load_recipe(arguments.recipe)
    trainer = make_trainer(recipe, arguments.work, arguments.init)
    trainer.train(resume_from_checkpoint=arguments.resume or None)
    if trainer.is_world_process_zero():
        write_checkpoint(trainer, recipe, arguments.output, arguments.samples)
    trainer.accelerator.end_training()  # Trainer.end, new in transformers 5.18


if __name__ == "__main__":
    main()
