"""A packed run whose every loss goes to a file as a float in hex; killed and resumed by `test_kill_and_resume`.

Run as: python killed_run.py FOLDER KIND WORKERS [--resume], or the same under torchrun.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.arguments import InternVLTrainingArguments
from internvl_hub.training.run import leave
from internvl_hub.training.trainer import InternVLTrainer

STEPS, SAVE_EVERY, ACCUMULATION = 14, 4, 2


class Recorder(InternVLTrainer):
    """Writes `step loss` of every micro-batch of this rank, before the step's update, to the disk at once."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        output = super().compute_loss(*args, **kwargs)
        loss = output[0] if isinstance(output, tuple) else output
        path = Path(self.args.output_dir).parent / f"losses-{self.args.process_index}"
        with path.open("a", encoding="utf-8") as file:
            file.write(f"{self.state.global_step} {loss.item().hex()}\n")
            file.flush()
            os.fsync(file.fileno())
        return output


def make(folder: Path, kind: str, workers: int) -> Recorder:
    """Everything that could depend on the random state does: drop path, dropout, shuffling, workers."""
    vision = {**tiny.config(kind).vision_config.to_dict(), "drop_path_rate": 0.3, "dropout": 0.1}
    model = tiny.model(kind, vision_config=vision)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    args = InternVLTrainingArguments(
        output_dir=str(folder / "run"), per_device_train_batch_size=1, packing=True, max_packed_tokens=640,
        num_images_expected=12, gradient_accumulation_steps=ACCUMULATION, max_steps=STEPS, save_steps=SAVE_EVERY,
        learning_rate=1e-2, lr_scheduler_type="cosine", warmup_steps=2, dataloader_num_workers=workers, seed=3,
        report_to="none", use_cpu=True, disable_tqdm=True, ddp_backend="gloo" if ranks > 1 else None,
    )  # fmt: skip
    return Recorder(model, args, train_dataset=tiny.dataset(kind, 24), processing_class=tiny.tokenizer(kind))


def main() -> None:
    """Trains; the first rank leaves a hash of the final weights."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind")
    parser.add_argument("workers", type=int)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    (options.folder / f"pid-{os.environ.get('RANK', '0')}").write_text(str(os.getpid()), encoding="utf-8")
    trainer = make(options.folder, options.kind, options.workers)
    trainer.train(resume_from_checkpoint=options.resume or None)
    if trainer.is_world_process_zero():
        digest = hashlib.sha256()
        for name, value in sorted(trainer.model.state_dict().items()):
            digest.update(name.encode() + value.numpy().tobytes())
        (options.folder / "weights").write_text(digest.hexdigest(), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
    leave()
