"""Resuming restores every weight of every language model, also where the file has other names and shapes than memory.

Experts of Qwen3-MoE are stored one by one and held fused, InternLM2 is stored fused and held as a Llama. What the file
holds is read with `from_pretrained`, so that a weight is never compared with what the same code restored.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CHAT, CONTEXT, QWEN2, assert_same, chat_config, llm_dict
from torch import nn
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.resuming_internvl import IncompleteWeightsError
from internvl_hub.training.arguments import InternVLTrainingArguments
from internvl_hub.training.collation import InternVLCollator
from internvl_hub.training.trainer import InternVLTrainer

BACKBONES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm2", "llama", "phi3", "qwen2-tied", "qwen3-tied")
# Names or shapes differ between file and memory, and a third whose fused experts are stored as they are held.
CONVERTED = ("qwen3_moe", "internlm2", "gpt_oss")
EXPERT = "language_model.model.layers.1.mlp.experts.2.up_proj.weight"
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}


def _model(backbone: str, seed: int = 0) -> InternVLChatModel:
    model_type, _, tied = backbone.partition("-")
    set_seed(seed)
    return InternVLChatModel(chat_config(llm_config=llm_dict(model_type, tie_word_embeddings=bool(tied))))


@cache
def _rows(count: int = 12) -> list[dict[str, torch.Tensor | None]]:
    """Questions of one tile or none, with answers of different length."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        text = torch.randint(20, 400, (6 + i % 5,), generator=generator)
        ids = torch.cat([torch.tensor([3, 9, *[CONTEXT] * 4 * (i % 2), 10]), text, torch.tensor([4])])
        labels = torch.where(torch.arange(len(ids)) >= len(ids) - 4, ids, -100)
        pixels = torch.randn(1, 3, 56, 56, generator=generator) if i % 2 else None
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return rows


def _plain_collator(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """For transformers' own Trainer, which counts labels and knows nothing of their weights."""
    batch = InternVLCollator(2, 56)(rows)
    batch.pop("loss_weight")
    return batch


def _options(folder: Path, **options: Any) -> dict[str, Any]:
    fixed = {"learning_rate": 1e-2, "weight_decay": 0.0, "warmup_steps": 0, "lr_scheduler_type": "linear"}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
    sizes = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "remove_unused_columns": False}
    return {"output_dir": str(folder), **fixed, **quiet, **sizes, **STEPS, **options}


def _own(folder: Path, model: nn.Module, **options: Any) -> Trainer:
    data = {"train_dataset": _rows(), "eval_dataset": _rows(3)}
    arguments = InternVLTrainingArguments(**_options(folder, **options))
    return InternVLTrainer(model, arguments, data_collator=InternVLCollator(2, 56), **data)


def _stock(folder: Path, model: nn.Module, **options: Any) -> Trainer:
    data = {"train_dataset": _rows(), "eval_dataset": _rows(3)}
    return Trainer(model, TrainingArguments(**_options(folder, **options)), data_collator=_plain_collator, **data)


def _sft(folder: Path, model: InternVLChatModel, **options: Any) -> Trainer:
    """TRL's trainer on pictures and words."""
    rows = []
    for colour in ("red", "blue", "green", "white", "black", "grey"):
        turns = [{"role": "user", "content": "Which colour?"}, {"role": "assistant", "content": colour}]
        rows.append({"messages": turns, "images": [Image.new("RGB", (60, 60), colour)]})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN2)
    processor = InternVLProcessor.from_model_config(model.config, tokenizer)
    arguments = SFTConfig(**{**_options(folder, **options), "max_length": None, "bf16": False})
    data = Dataset.from_list(rows)
    return SFTTrainer(model, arguments, train_dataset=data, eval_dataset=data, processing_class=processor)


def _losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def _weights(source: Trainer | Path) -> dict[str, torch.Tensor]:
    """A copy of a trainer's weights, or those of a checkpoint folder as `from_pretrained` reads them."""
    model = InternVLChatModel.from_pretrained(source) if isinstance(source, Path) else source.model
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _assert_differ(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """The comparisons would show nothing if training had not moved every weight."""
    assert not [name for name in left if torch.equal(left[name], right[name])]


def _assert_resumes(make: Callable[..., Trainer], backbone: str, folder: Path, **options: Any) -> None:
    whole = make(folder / "whole", _model(backbone), **options)
    whole.train()
    _assert_differ(_weights(folder / "whole" / "checkpoint-2"), _weights(folder / "whole" / "checkpoint-4"))
    resumed = make(folder / "resumed", _model(backbone, seed=1), **options)
    resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-2"))
    assert len(_losses(whole)) == 4
    assert _losses(resumed) == _losses(whole)  # the first two are read from the checkpoint
    assert_same(_weights(resumed), _weights(whole))
    assert_same(_weights(resumed), _weights(folder / "whole" / "checkpoint-4"))


def _assert_loads_best(make: Callable[..., Trainer], backbone: str, folder: Path) -> None:
    """The first of two evaluations is made the best, so that the last weights are the wrong ones."""
    trainer = make(folder, _model(backbone), **BEST, metric_for_best_model="eval_loss", greater_is_better=True)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")
    assert_same(_weights(trainer), _weights(folder / "checkpoint-2"))
    _assert_differ(_weights(trainer), _weights(folder / "checkpoint-4"))


# ------------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("backbone", BACKBONES)
def test_resumed_run_is_the_uninterrupted_run(backbone: str, tmp_path: Path) -> None:
    _assert_resumes(_own, backbone, tmp_path)


@pytest.mark.parametrize("backbone", CONVERTED)
@pytest.mark.parametrize("make", [_stock, _sft], ids=["transformers", "trl"])
def test_other_trainers_resume_too(make: Callable[..., Trainer], backbone: str, tmp_path: Path) -> None:
    """They call `load_state_dict(strict=False)` with names on disk: restored nothing before, and logged a line."""
    _assert_resumes(make, backbone, tmp_path)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_best_weights_come_back(backbone: str, tmp_path: Path) -> None:
    _assert_loads_best(_own, backbone, tmp_path)


@pytest.mark.parametrize("backbone", CONVERTED)
@pytest.mark.parametrize("make", [_stock, _sft], ids=["transformers", "trl"])
def test_best_weights_come_back_in_other_trainers(make: Callable[..., Trainer], backbone: str, tmp_path: Path) -> None:
    _assert_loads_best(make, backbone, tmp_path)


@pytest.mark.parametrize("backbone", CONVERTED)
def test_frozen_weights_are_restored_and_stay_frozen(backbone: str, tmp_path: Path) -> None:
    """Also when the best checkpoint is loaded; the optimiser keeps the parameters that it was made for."""
    _model(backbone).save_pretrained(tmp_path / "start")
    options = {"freeze_llm": True, **BEST, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    first = _own(tmp_path / "whole", InternVLChatModel.from_pretrained(tmp_path / "start"), **options)
    first.train()
    resumed = _own(tmp_path / "resumed", _model(backbone, seed=1), **options)
    parameters = dict(resumed.model.named_parameters())
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        assert parameter is parameters[name], name
        assert parameter.requires_grad is not name.startswith("language_model."), name
    assert_same(_weights(resumed), _weights(first))
    start = _weights(tmp_path / "start")
    unchanged = {name for name, value in _weights(resumed).items() if torch.equal(value, start[name])}
    assert unchanged == {name for name in start if name.startswith("language_model.")}


def test_adapters_are_left_to_transformers(tmp_path: Path) -> None:
    def adapted(seed: int) -> nn.Module:
        set_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        return get_peft_model(_model("qwen3_moe"), lora)

    whole = _own(tmp_path / "whole", adapted(0))
    whole.train()
    resumed = _own(tmp_path / "resumed", adapted(1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert _losses(resumed) == _losses(whole)
    assert_same(_weights(resumed), _weights(whole))


# ---------------------------------------------------------------------------------------------------------- many files


def _save_in_two_files(model: InternVLChatModel, folder: Path) -> None:
    """Every other tensor in the second file, so that each fused weight needs both."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    place = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in tensors if place[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}), encoding="utf-8")


@pytest.mark.parametrize("backbone", CONVERTED)
def test_sharded_checkpoints_are_restored(backbone: str, tmp_path: Path) -> None:
    reference = _model(backbone)
    _save_in_two_files(reference, tmp_path / "shards")
    resumed, best = _own(tmp_path, _model(backbone, seed=1)), _own(tmp_path, _model(backbone, seed=1))
    resumed._load_from_checkpoint(str(tmp_path / "shards"))
    best.state.best_model_checkpoint = str(tmp_path / "shards")
    best._load_best_model()
    assert_same(_weights(resumed), reference.state_dict())
    assert_same(_weights(best), reference.state_dict())


def test_shards_with_parts_of_a_weight_are_refused_by_other_trainers(tmp_path: Path) -> None:
    """They load file after file; what fits in one file (InternLM2) is restored."""
    for backbone in ("qwen3_moe", "internlm2"):
        _save_in_two_files(_model(backbone), tmp_path / backbone)
    other = _model("internlm2", seed=1)
    _stock(tmp_path, other)._load_from_checkpoint(str(tmp_path / "internlm2"))
    assert_same(other.state_dict(), _model("internlm2").state_dict())
    with pytest.raises(IncompleteWeightsError, match="one file of several: load all of them as one state dict"):
        _stock(tmp_path, _model("qwen3_moe", seed=1))._load_from_checkpoint(str(tmp_path / "qwen3_moe"))


# ------------------------------------------------------------------------------------------------------------ refusals


def _without(backbone: str, key: str, folder: Path) -> str:
    """A saved model that lacks one tensor."""
    _model(backbone).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[key]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize("make", [_own, _stock], ids=["own", "transformers"])
def test_a_missing_expert_is_named(make: Callable[..., Trainer], tmp_path: Path) -> None:
    folder = _without("qwen3_moe", EXPERT, tmp_path / "damaged")
    with pytest.raises(IncompleteWeightsError, match=f"1 of the 8 tensors .* the first is {EXPERT}"):
        make(tmp_path, _model("qwen3_moe", seed=1))._load_from_checkpoint(folder)


@pytest.mark.parametrize(
    ("backbone", "key", "named"),
    [
        ("qwen3", "mlp1.1.bias", "mlp1.1.bias"),
        ("gpt_oss", "language_model.model.layers.0.self_attn.sinks", "layers.0.self_attn.sinks"),
        ("internlm2", "language_model.model.layers.1.attention.wqkv.weight", "layers.1.self_attn.q_proj.weight"),
        ("qwen2-tied", "language_model.model.embed_tokens.weight", "embed_tokens.weight"),
    ],
)
def test_a_missing_weight_stops_the_run(backbone: str, key: str, named: str, tmp_path: Path) -> None:
    folder = _without(backbone, key, tmp_path / "damaged")
    trainer = _own(tmp_path, _model(backbone, seed=1))
    with pytest.raises(ValueError, match=f"does not fit the model: missing .*{named}"):
        trainer._load_from_checkpoint(folder)
    trainer.state.best_model_checkpoint = folder
    with pytest.raises(ValueError, match=f"does not fit the model: missing .*{named}"):
        trainer._load_best_model()


def test_another_number_of_experts_is_named(tmp_path: Path) -> None:
    llm = llm_dict("qwen3_moe", num_experts=6)
    InternVLChatModel(chat_config(llm_config=llm)).save_pretrained(tmp_path / "six")
    with pytest.raises(IncompleteWeightsError, match=r"make \(6, 32, 24\), the model needs \(4, 32, 24\)"):
        _own(tmp_path, _model("qwen3_moe"))._load_from_checkpoint(str(tmp_path / "six"))


def test_a_deleted_best_checkpoint_stops_the_run(tmp_path: Path) -> None:
    """transformers logs a line and keeps the last weights, as if they were the best."""
    trainer = _own(tmp_path, _model("qwen2"), **BEST)
    trainer.train()
    shutil.rmtree(trainer.state.best_model_checkpoint)
    with pytest.raises(FileNotFoundError, match="has no weights on this machine"):
        trainer._load_best_model()


# ----------------------------------------------------------------------------------------------------- the translation


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_file_is_a_state_dict(backbone: str, tmp_path: Path) -> None:
    """Under a prefix too, as where the model is part of another module; names in memory still work."""
    reference = _model(backbone)
    reference.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    wrapped = nn.ModuleDict({"policy": _model(backbone, seed=1), "head": nn.Linear(2, 2)})
    tied = {f"policy.{name}" for name in reference.all_tied_weights_keys}
    result = wrapped.load_state_dict({f"policy.{name}": tensor for name, tensor in file.items()}, strict=False)
    assert set(result.missing_keys) == {"head.weight", "head.bias", *tied} and not result.unexpected_keys
    assert_same(wrapped["policy"].state_dict(), reference.state_dict())
    again = _model(backbone, seed=2)
    assert str(again.load_state_dict(reference.state_dict(), strict=True)) == "<All keys matched successfully>"
    assert_same(again.state_dict(), reference.state_dict())


def test_foreign_names_are_reported_unchanged(tmp_path: Path) -> None:
    reference = _model("internlm2")
    reference.save_pretrained(tmp_path)
    file = {**load_file(tmp_path / "model.safetensors"), "language_model.output.scale": torch.ones(1)}
    result = _model("internlm2", seed=1).load_state_dict(file, strict=False)
    assert result.unexpected_keys == ["language_model.output.scale"] and not result.missing_keys


def test_bare_internlm2_takes_its_file(tmp_path: Path) -> None:
    reference = _model("internlm2").language_model
    reference.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.attention.wqkv.weight" in file
    other = _model("internlm2", seed=1).language_model
    other.load_state_dict(file, strict=True)
    assert_same(other.state_dict(), reference.state_dict())
