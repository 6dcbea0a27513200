"""Short training runs on the tiny models, for the tests; as a script, one rank of a run on several processes.

Run as: torchrun --nproc-per-node 2 runs.py OUTPUT.pt BATCH [packed]
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch

from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.arguments import InternVLTrainingArguments
from internvl_hub.training.run import leave
from internvl_hub.training.trainer import InternVLTrainer


def make_trainer(
    folder: str, kind: str = "qwen2", batch: int = 8, accumulation: int = 1, dataset: Any = None, **options: Any
) -> InternVLTrainer:
    """A trainer of three steps of plain SGD, whose updates are linear in the gradients, on rows in order."""
    defaults = {
        "output_dir": folder, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation,
        "max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "warmup_steps": 0,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": 2,
    }  # fmt: skip
    rows = tiny.dataset(kind, 24) if dataset is None else dataset
    return InternVLTrainer(
        options.pop("model", None) or tiny.model(kind),
        InternVLTrainingArguments(**{**defaults, **options}),
        train_dataset=rows,
        processing_class=tiny.tokenizer(kind),
        image_processor=tiny.image_processor(),
    )


# Budgets that make packs of two to five of the rows.
PACKED = {
    "packing": True, "max_packed_tokens": 640, "num_images_expected": 12, "train_sampling_strategy": "random",
}  # fmt: skip


def losses(trainer: InternVLTrainer) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def weights(trainer: InternVLTrainer) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}


def main() -> None:
    """Trains and evaluates as one rank; the first rank writes what the test compares."""
    output, batch = sys.argv[1], int(sys.argv[2])
    options = PACKED if "packed" in sys.argv[3:] else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, batch=batch, ddp_backend="gloo", **options)
        trainer.train()
        # Five rows in batches of two: the last global batch repeats rows, which must not count twice.
        evaluation = trainer.evaluate(tiny.dataset(count=5))["eval_loss"]
        if trainer.is_world_process_zero():
            torch.save({"losses": losses(trainer), "weights": weights(trainer), "eval_loss": evaluation}, output)
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
    leave()
