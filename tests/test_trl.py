"""TRL's trainers run on the model and its processor as they are, and compute the loss that the model computes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import CHAT, QWEN2, load
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from versions import CHECKPOINTING

from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor

COLOURS = ("red", "blue", "green", "white")


def _processor(model: InternVLChatModel) -> InternVLProcessor:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN2)
    return InternVLProcessor.from_model_config(model.config, tokenizer)


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _rows(kind: str) -> list[dict[str, Any]]:
    """Images of one and of several tiles, each with a question and one or two answers."""
    rows = []
    for i, colour in enumerate(COLOURS):
        ask, answer, worse = (
            _turn("user", "Which colour?"),
            _turn("assistant", colour * (i + 1)),
            _turn("assistant", "?"),
        )
        fields = {
            "sft": {"messages": ask + answer},
            "completion": {"prompt": ask, "completion": answer},
            "dpo": {"prompt": ask, "chosen": answer, "rejected": worse},
        }
        rows.append({**fields[kind], "images": [Image.new("RGB", (60, 60 * (1 + i % 2)), colour)]})
    return rows


def _arguments(folder: Path) -> dict[str, Any]:
    fixed = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True}
    cpu = {"use_cpu": True, "bf16": False, "max_length": None}
    return {"output_dir": str(folder), **fixed, **quiet, **cpu}


def _losses(trainer: SFTTrainer | DPOTrainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _assert_everything_moved(model: InternVLChatModel, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in after.values())
    assert not [name for name in after if torch.equal(after[name], before[name])]


def _sft(folder: Path, kind: str = "sft", **options: Any) -> SFTTrainer:
    model = load(QWEN2)
    arguments = SFTConfig(**_arguments(folder), **options)
    data = Dataset.from_list(_rows(kind))
    return SFTTrainer(model, arguments, train_dataset=data, processing_class=_processor(model))


@pytest.mark.parametrize("options", [{}, {CHECKPOINTING: True}], ids=["plain", "checkpointing"])
def test_sft_trains_on_images(options: dict[str, Any], tmp_path: Path) -> None:
    trainer = _sft(tmp_path, **options)
    before = copy.deepcopy(trainer.model.state_dict())
    losses = _losses(trainer)
    assert len(losses) == 2 and losses[1] < losses[0]
    _assert_everything_moved(trainer.model, before)


@pytest.mark.parametrize("kind", ["sft", "completion"])
def test_sft_loss_is_the_models_own(kind: str, tmp_path: Path) -> None:
    """On whole conversations, and on answers alone."""
    trainer = _sft(tmp_path, kind)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["num_patches"].sum() == batch["pixel_values"].shape[0] > 2
    unsupervised = (batch["labels"] == -100) & (batch["attention_mask"] == 1)
    assert bool(unsupervised.any()) == (kind == "completion")
    own = load(QWEN2)(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), own, rtol=1e-5, atol=1e-5)


def test_dpo_trains_on_images(tmp_path: Path) -> None:
    model = load(QWEN2)
    arguments, data = DPOConfig(**_arguments(tmp_path)), Dataset.from_list(_rows("dpo"))
    trainer = DPOTrainer(model, load(QWEN2), arguments, train_dataset=data, processing_class=_processor(model))
    before = copy.deepcopy(trainer.model.state_dict())
    losses = _losses(trainer)
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # log 2: the policy still is the reference
    assert losses[1] != losses[0]
    _assert_everything_moved(trainer.model, before)
