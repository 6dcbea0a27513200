"""Pairs and trainers on them that several tests share; as a script, one rank of a run on several processes.

Run as: torchrun --nproc-per-node 2 preference_runs.py OUTPUT.pt BATCH [twice] [packed] [inexact] [precomputed]
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from typing import Any

import torch

from internvl_hub.data.pairs import PairRecord
from internvl_hub.data.preference_dataset import PreferenceDataset
from internvl_hub.data.records import Message
from internvl_hub.tests.training import runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.arguments import InternVLTrainingArguments
from internvl_hub.training.mpo import MPOTrainer
from internvl_hub.training.preference_arguments import PreferenceArguments
from internvl_hub.training.run import leave

# Answers of the rejected side, of very different length; the third is a chosen answer too.
_REJECTED = ("A dog, or perhaps not.", "No.", "No", "3, I think, though nobody can be quite sure of it", "?")
PAD = 2


def pair(chosen: dict[str, Any], answer: str) -> dict[str, Any]:
    """A row's features with another answer, encoded by hand: everything up to the answer, the answer, its end."""
    vocabulary = tiny.tokenizer()
    labels, ids = chosen["labels"], chosen["input_ids"]
    places = torch.nonzero(labels != -100).flatten()
    end = ids[places[-1]]  # the last supervised token closes the turn
    fresh = torch.tensor([*vocabulary(answer, add_special_tokens=False)["input_ids"], int(end)])
    prompt = ids[: int(places[0])]
    return {
        "chosen_input_ids": ids, "chosen_labels": labels,
        "rejected_input_ids": torch.cat([prompt, fresh]),
        "rejected_labels": torch.cat([torch.full_like(prompt, -100), fresh]),
        "pixel_values": chosen["pixel_values"], "num_patches": chosen["num_patches"],
    }  # fmt: skip


def pairs(count: int = 8, with_images: bool = True) -> list[dict[str, Any]]:
    """Text alone, one picture and two mixed; the third pair of five has equal answers."""
    rows = tiny.dataset(count=count, with_images=with_images)
    return [pair(row, _REJECTED[i % len(_REJECTED)]) for i, row in enumerate(rows)]


def moved(model: torch.nn.Module, scale: float = 0.05, seed: int = 7) -> torch.nn.Module:
    """The model with noise on its trained parameters, so that policy and reference differ; in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((scale * noise).to(parameter.dtype))
    return model


class Recorder(MPOTrainer):
    """Keeps the rewards that the shift is updated with, and the shift after it."""

    def _update_shift(self, values: torch.Tensor) -> None:
        super()._update_shift(values)
        self.seen = [*getattr(self, "seen", ()), (values.tolist(), self.shift.value)]


def make_trainer(folder: str, batch: int = 8, accumulation: int = 1, dataset: Any = None, **options: Any) -> Recorder:
    """Three steps of plain SGD on pairs in order, from a policy that is not the reference."""
    defaults = {
        "output_dir": folder, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "max_steps": 3, "optim": "sgd", "learning_rate": 0.02, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2, "max_grad_norm": 0.0,
    }  # fmt: skip
    settings = PreferenceArguments(**options.pop("preference", {}))
    model, move = options.pop("model", None), options.pop("move", 0.05)
    others = {name: options.pop(name) for name in ("eval_dataset", "data_collator") if name in options}
    trainer = Recorder(
        tiny.model() if model is None else model,
        InternVLTrainingArguments(**{**defaults, **options}),
        settings,
        train_dataset=pairs(24) if dataset is None else dataset,
        processing_class=tiny.tokenizer(),
        image_processor=tiny.image_processor(),
        **others,
    )
    if move:
        moved(trainer.model, move)
    return trainer


def pair_dataset(count: int = 24, **options: Any) -> PreferenceDataset:
    """`pairs` as a data set that a plan can be made of."""
    records = []
    for i, row in enumerate(tiny.records(count)):
        worse = Message("gpt", _REJECTED[i % len(_REJECTED)])
        records.append(PairRecord(row, replace(row, messages=(*row.messages[:-1], worse))))
    return PreferenceDataset(records, tiny.tokenizer(), tiny.image_processor(), tiny.config(), **options)


def step(trainer: MPOTrainer, batches: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step on these micro-batches, by what `Trainer` calls."""
    trainer.model.zero_grad()
    samples, weight = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    loss = sum(float(trainer.training_step(trainer.model, batch, weight)) for batch in samples)
    named = trainer.model.named_parameters()
    return loss, {name: p.grad.clone() for name, p in named if p.grad is not None}


def main() -> None:
    """Trains and evaluates as one rank; the first rank writes what the test compares."""
    output, batch, flags = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
    options: dict[str, Any] = {"preference": {"exact_reward_shift": "inexact" not in flags}}
    if "packed" in flags:
        options |= {**runs.PACKED, "max_packed_tokens": 900, "dataset": pair_dataset()}
    if "precomputed" in flags:
        options |= {"preference": {"precompute_reference": True}, "dataset": pair_dataset(), "move": 0}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            folder, batch=batch, accumulation=2 if "twice" in flags else 1, ddp_backend="gloo", **options
        )
        trainer.train()
        # Five pairs in batches of two: the last global batch repeats pairs, which must not count twice.
        evaluation = {} if "precomputed" in flags else trainer.evaluate(pairs(5))
        seen: list[Any] = [None] * trainer.args.world_size
        torch.distributed.all_gather_object(seen, trainer.seen)
        found = {"losses": runs.losses(trainer), "weights": runs.weights(trainer), "evaluation": evaluation}
        if trainer.is_world_process_zero():
            torch.save({**found, "seen": seen, "log": trainer.state.log_history}, output)
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
    leave()
