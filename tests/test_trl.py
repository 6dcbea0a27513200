"""TRL's trainers run on the model and its processor as they are, and compute what the model computes.

What they cannot: reward-shifted MPO (their `bco_pair` has no shift) and a reference of their own making for a model
that is not on disk; `processor.return_num_patches = False` is for the online trainers, which pass every output of the
processor to a method that knows no `num_patches`.
"""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from tiny import CHAT, QWEN2, load
from transformers import AutoModel, PreTrainedTokenizerFast
from transformers.utils import is_peft_available
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer
from versions import CHECKPOINTING

from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor

COLOURS = ("red", "blue", "green", "white")
MPO = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
needs_peft = pytest.mark.skipif(not is_peft_available(), reason="needs peft")


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


def _lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=r".*language_model.*(q|v)_proj")


def _losses(trainer: Any) -> list[float]:
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


def _dpo(folder: Path, **options: Any) -> DPOTrainer:
    model = load(QWEN2)
    arguments, data = DPOConfig(**_arguments(folder), **MPO), Dataset.from_list(_rows("dpo"))
    return DPOTrainer(model, args=arguments, train_dataset=data, processing_class=_processor(model), **options)


def _assert_first_mpo_loss(trainer: DPOTrainer, first: float) -> None:
    """Policy and reference agree: log 2 of preference, 2 log 2 of quality, and the chosen answers' cross-entropy."""
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    chosen = []
    for batch in batches:
        half = len(batch["input_ids"]) // 2
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        labels[half:] = -100
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "pixel_values")}
        chosen.append(load(QWEN2)(**inputs, labels=labels).loss.item())
    known = 0.8 * math.log(2) + 0.2 * 2 * math.log(2)
    assert min(abs(first - known - loss) for loss in chosen) < 1e-3


def test_dpo_trains_on_the_terms_of_mpo(tmp_path: Path) -> None:
    """Without the reward shift, which TRL has not: `MPOTrainer` has."""
    trainer = _dpo(tmp_path, ref_model=load(QWEN2))
    before = copy.deepcopy(trainer.model.state_dict())
    losses = _losses(trainer)
    _assert_everything_moved(trainer.model, before)
    _assert_first_mpo_loss(_dpo(tmp_path, ref_model=load(QWEN2)), losses[0])
    assert losses[1] != losses[0]


@needs_peft
def test_dpo_trains_adapters_and_takes_the_base_as_reference(tmp_path: Path) -> None:
    trainer = _dpo(tmp_path, peft_config=_lora())
    assert trainer.ref_model is None
    before = copy.deepcopy(trainer.model.state_dict())
    losses = _losses(trainer)
    _assert_first_mpo_loss(_dpo(tmp_path, peft_config=_lora()), losses[0])
    after = trainer.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved and all(".lora_" in name and "language_model" in name for name in moved)


# -------------------------------------------------------------------------------------------------- online: GRPO, RLOO


def _prompts(kind: str) -> list[dict[str, Any]]:
    """Questions of different length: text alone, with one or two images of one or several tiles, or both kinds."""
    rows = []
    for i, colour in enumerate(COLOURS):
        count = {"text": 0, "images": 1 + i // 2, "mixed": i % 3}[kind]
        picture = Image.new("RGB", (60, 60 * (1 + i % 2)), colour)
        row = {"prompt": _turn("user", "Which colour? " * (i + 1)), "colour": colour}
        rows.append(row if kind == "text" else {**row, "images": [picture] * count})
    return rows


def _reward(completions: list[Any], colour: list[str], **_: Any) -> list[float]:
    """Something that differs among the completions of a prompt and knows the row that it belongs to."""
    texts = [completion[0]["content"] for completion in completions]
    return [len(name) / 10 + sum(map(ord, text)) % 7 for name, text in zip(colour, texts, strict=True)]


def _online(kind: str, folder: Path, trainer: type = GRPOTrainer, **options: Any) -> Any:
    """Two steps of four completions, two for each prompt, in micro-batches of two unless the options say otherwise."""
    model = options.pop("model", None) or load(QWEN2)
    processor = _processor(model)
    processor.return_num_patches = False
    fixed = {key: value for key, value in _arguments(folder).items() if key != "max_length"}
    sizes = {"num_generations": 2, "max_completion_length": 6, "gradient_accumulation_steps": 2}
    own = {key: options.pop(key) for key in ("peft_config",) if key in options}
    arguments = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer](**{**fixed, **sizes, **options})
    data = Dataset.from_list(_prompts(kind))
    return trainer(model, reward_funcs=_reward, args=arguments, train_dataset=data, processing_class=processor, **own)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["text", "images", "mixed"])
def test_grpo_trains_on_rewards(kind: str, batch: int, tmp_path: Path) -> None:
    """In batches of one row, some of which have no image."""
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
    trainer = _online(kind, tmp_path, **sizes)
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert len(steps) == 2 and all(entry["reward_std"] > 0 and entry["grad_norm"] > 0 for entry in steps)
    if kind != "text":
        _assert_everything_moved(trainer.model, before)
    else:
        moved = {n.split(".")[0] for n, v in trainer.model.state_dict().items() if not torch.equal(v, before[n])}
        assert moved == {"language_model"}


def _rows_of_batch(trainer: Any, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Of every sample the row that it was made from, found by its question, which must be whole and unpadded."""
    found = []
    for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True):
        own = ids[mask.bool()].tolist()
        fits = [row for row in _prompts("mixed") if own == _encode(trainer.processing_class, row)["input_ids"]]
        assert len(fits) == 1
        found += fits
    return found


def _encode(processor: InternVLProcessor, row: dict[str, Any]) -> Any:
    content = [{"type": "image", "image": image} for image in row["images"]]
    content.append({"type": "text", "text": row["prompt"][0]["content"]})
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer], ids=["grpo", "rloo"])
def test_samples_keep_their_images_and_are_scored_as_by_the_model(kind: type, tmp_path: Path) -> None:
    """One batch of four prompts, cut apart, against a plain forward of each sample with its own tiles, unpadded."""
    trainer = _online("mixed", tmp_path, kind, beta=0.0, per_device_train_batch_size=8, gradient_accumulation_steps=1)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    rows = _rows_of_batch(trainer, batch)
    assert sorted(row["colour"] for row in rows) == sorted(2 * COLOURS)
    tiles = [_encode(trainer.processing_class, row).get("pixel_values") for row in rows]
    counts = [0 if own is None else len(own) for own in tiles]
    assert batch["num_tiles"] == counts and max(counts) > 2 and min(counts) == 0
    torch.testing.assert_close(batch["pixel_values"], torch.cat([own for own in tiles if own is not None]))
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    media = {key: batch[key] for key in ("pixel_values", "num_images", "num_tiles")}
    reference = load(QWEN2)
    for size in (8, 3, 1):
        scored = trainer._get_per_token_logps_and_entropies(
            trainer.model.eval(), ids, mask, length, batch_size=size, **media
        )[0]
        for i, own in enumerate(tiles):
            kept = batch["completion_mask"][i].bool()
            row = ids[i][mask[i].bool()].unsqueeze(0)
            with torch.no_grad():
                logits = reference(input_ids=row, **({} if own is None else {"pixel_values": own})).logits
            expected = logits[0, :-1].log_softmax(-1).gather(1, row[0, 1:, None])[-int(kept.sum()) :, 0]
            torch.testing.assert_close(scored[i][kept], expected, rtol=1e-4, atol=1e-4)


@needs_peft
@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer], ids=["grpo", "rloo"])
def test_adapters_are_held_near_their_base(kind: type, tmp_path: Path) -> None:
    trainer = _online("mixed", tmp_path, kind, peft_config=_lora(), beta=0.1, learning_rate=0.1)
    trainer.train()
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert first == pytest.approx(0, abs=1e-5) and abs(second) > 1e-4


def test_the_reference_is_loaded_from_the_policys_folder(tmp_path: Path) -> None:
    """By TRL itself, with the code that lies in it."""
    source = load(QWEN2)
    source.save_pretrained(tmp_path / "policy")
    _processor(source).save_pretrained(tmp_path / "policy")
    policy = AutoModel.from_pretrained(tmp_path / "policy", trust_remote_code=True)
    trainer = _online("mixed", tmp_path, model=policy, beta=0.1, model_init_kwargs={"trust_remote_code": True})
    trainer.train()
    first, second = (entry["kl"] for entry in trainer.state.log_history if "kl" in entry)
    assert first == pytest.approx(0, abs=1e-5) and second > 1e-4
