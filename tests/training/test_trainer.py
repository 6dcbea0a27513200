"""The trainer beside its loss: freezing, learning rates, resuming, saving, precision, refusals."""

import sys
import types
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Trainer

from internvl_hub.data.records import Message, Record
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.tests.training import runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.arguments import InternVLTrainingArguments
from internvl_hub.training.generation_metrics import answer_question, mark_answers, question_of


@pytest.mark.parametrize(
    ("switch", "frozen"),
    [("freeze_backbone", "vision_model."), ("freeze_llm", "language_model."), ("freeze_mlp", "mlp1.")],
)
def test_frozen_weights_stay_bit_identical(switch: str, frozen: str, tmp_path: Path) -> None:
    trainer = runs.make_trainer(str(tmp_path), **{switch: True})
    before = runs.weights(trainer)
    trainer.train()
    for name, value in runs.weights(trainer).items():
        assert torch.equal(value, before[name]) == name.startswith(frozen), name


def test_nothing_left_to_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no parameter to train"):
        runs.make_trainer(str(tmp_path), freeze_backbone=True, freeze_llm=True, freeze_mlp=True)


def test_learning_rates_per_module(tmp_path: Path) -> None:
    trainer = runs.make_trainer(str(tmp_path), vision_lr=0.01, mlp_lr=0.0)
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(trainer.model.parameters()))
    for name, parameter in trainer.model.named_parameters():
        expected = {"vision_model": 0.01, "mlp1": 0.0}.get(name.split(".")[0], 0.1)
        assert rates[id(parameter)] == expected, name
        assert (decay[id(parameter)] > 0) == (name in trainer.get_decay_parameter_names(trainer.model)), name


@pytest.mark.parametrize("kind", ["qwen2", "internlm2"])
def test_resuming_continues_the_same_run(kind: str, tmp_path: Path) -> None:
    """Adam, so that its state counts too; InternLM2, because its weights have other names on disk."""
    options = {"kind": kind, "batch": 3, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    options |= {"optim": "adamw_torch", "learning_rate": 1e-3}
    whole = runs.make_trainer(str(tmp_path / "whole"), **options)
    whole.train()
    resumed = runs.make_trainer(str(tmp_path / "resumed"), model=tiny.model(kind, seed=1), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert runs.losses(resumed)[-2:] == runs.losses(whole)[-2:]
    for name, value in runs.weights(whole).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_plain_trainer_resumes_internlm2(tmp_path: Path) -> None:
    """Scripts that use transformers' own Trainer get their weights back as well."""
    trainer = runs.make_trainer(str(tmp_path), kind="internlm2", max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    other = tiny.model("internlm2", seed=1)
    plain = Trainer(other, InternVLTrainingArguments(str(tmp_path), use_cpu=True))
    plain._load_from_checkpoint(str(tmp_path / "saved"))
    for name, value in runs.weights(trainer).items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_resuming_from_other_weights_is_refused(tmp_path: Path) -> None:
    tiny.model(llm_config={"num_hidden_layers": 1}).save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match="does not fit the model: missing"):
        runs.make_trainer(str(tmp_path))._load_from_checkpoint(str(tmp_path / "small"))


def test_resuming_with_tied_embeddings(tmp_path: Path) -> None:
    model = tiny.model(llm_config={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "tied")
    other = tiny.model(seed=1, llm_config={"tie_word_embeddings": True})
    runs.make_trainer(str(tmp_path), model=other)._load_from_checkpoint(str(tmp_path / "tied"))
    assert torch.equal(other.lm_head.weight, model.lm_head.weight)


def test_saved_folder_is_complete(tmp_path: Path) -> None:
    trainer = runs.make_trainer(str(tmp_path))
    trainer.save_model(str(tmp_path / "saved"))
    again = InternVLChatModel.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in runs.weights(trainer).items())
    assert len(PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")) == len(tiny.tokenizer())
    assert InternVLImageProcessor.from_pretrained(tmp_path / "saved").image_size == tiny.IMAGE_SIZE


def test_bf16_steps_stay_near_float32(tmp_path: Path) -> None:
    results = []
    for bf16 in (False, True):
        trainer = runs.make_trainer(str(tmp_path), bf16=bf16, accumulation=2, batch=4)
        trainer.train()
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        results.append(runs.losses(trainer))
    assert results[0] != results[1]
    assert results[1] == pytest.approx(results[0], rel=0.02)


def test_step_without_supervised_token_is_refused(tmp_path: Path) -> None:
    empty = {**tiny.dataset(count=1)[0]}
    empty["labels"] = torch.full_like(empty["labels"], -100)
    rows = [*tiny.dataset(count=2), empty, empty]
    # One empty micro-batch beside a good one is fine.
    runs.make_trainer(str(tmp_path), dataset=rows[1:3], batch=1, accumulation=2, max_steps=1).train()
    with pytest.raises(ValueError, match="step 2 has no supervised token"):
        runs.make_trainer(str(tmp_path), dataset=rows, batch=2).train()


def test_evaluation_with_metrics_gets_logits(tmp_path: Path) -> None:
    trainer = runs.make_trainer(str(tmp_path))
    shapes = []
    trainer.compute_metrics = lambda prediction: {"rows": shapes.append(prediction.predictions.shape) or len(shapes)}
    assert trainer.evaluate(tiny.dataset(count=3))["eval_rows"] == 1
    assert shapes[0][0] == 3
    assert shapes[0][2] == len(tiny.tokenizer())


def test_arguments_that_break_the_loss_are_refused(tmp_path: Path) -> None:
    for name, value in {
        "loss_reduction": "mean", "average_tokens_across_devices": False, "label_smoothing_factor": 0.1,
        "remove_unused_columns": True,
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name):
            InternVLTrainingArguments(str(tmp_path), use_cpu=True, **{name: value})


def test_settings_for_several_processes_run_on_one(tmp_path: Path) -> None:
    trainer = runs.make_trainer(str(tmp_path), ddp_backend="gloo", max_steps=1)
    trainer.train()
    assert trainer.args.world_size == 1 and trainer.state.global_step == 1


def test_labels_may_come_without_weights(tmp_path: Path) -> None:
    """A collator of one's own: every label then counts 1."""
    message = (Message("human", "Q"), Message("gpt", "A B C"))
    rows = [Record(message, where="one")] * 4
    dataset = tiny.dataset()
    dataset.records = rows
    trainer = runs.make_trainer(str(tmp_path), dataset=dataset, batch=2, max_steps=1)
    collate = trainer.data_collator
    trainer.data_collator = lambda batch: {k: v for k, v in collate(batch).items() if k != "loss_weight"}
    trainer.train()
    assert runs.losses(trainer)[0] > 0


def test_liger_goes_into_the_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package itself needs a GPU's compiler; what it is asked for does not."""
    calls: list[tuple] = []
    liger = types.ModuleType("liger_kernel.transformers")
    liger._apply_liger_kernel_to_instance = lambda model, **settings: calls.append((model, settings))
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", liger)
    for module in ("transformers.integrations.liger", "transformers.training_args"):
        monkeypatch.setattr(f"{module}.is_liger_kernel_available", lambda: True, raising=False)
    model = tiny.model()
    runs.make_trainer(str(tmp_path), model=model, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert calls == [
        (model.language_model, {"rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False})
    ]


def test_generated_answers_are_marked(tmp_path: Path) -> None:
    """A model that knows its eight rows by heart, and one that knows nothing."""
    rows = tiny.dataset(count=8)
    options = {"eval_generations": 5, "eval_max_new_tokens": 40, "optim": "adamw_torch", "learning_rate": 1e-2}
    trainer = runs.make_trainer(str(tmp_path), dataset=rows, max_steps=60, logging_steps=60, **options)
    before = trainer.evaluate(rows)
    assert before["eval_exact_match"] == 0 and before["eval_generated"] == 5 and "eval_box_iou" not in before
    trainer.train()
    after = trainer.evaluate(rows)
    assert after["eval_exact_match"] == 1 and after["eval_loss"] < 0.05
    tokenizer = tiny.tokenizer()
    texts = [question_of(rows[i], tokenizer).reference for i in range(8)]
    assert texts == [record.messages[1].text for record in rows.records]
    for i, record in enumerate(rows.records):
        question = question_of(rows[i], tokenizer)
        features = {"pixel_values": question.pixel_values, "num_patches_list": rows[i]["num_patches"]}
        answer = trainer.model.chat(tokenizer, features["pixel_values"], record.messages[0].text,
                                    {"max_new_tokens": 40, "do_sample": False},
                                    num_patches_list=features["num_patches_list"])  # fmt: skip
        assert answer == answer_question(trainer.model, tokenizer, question, 40)


def test_marks_of_answers() -> None:
    box = "<ref>it</ref><box>[[0, 0, 100, 100]]</box>"
    marks = mark_answers(["Yes ", "yes", "[[0, 50, 100, 100]]", "[0,0,100,100] [1,1,2,2]", "none"],
                         ["Yes", "Yes", box, box, box])  # fmt: skip
    assert marks == {"exact_match": [1, 0, 0, 0, 0], "box_iou": [0.5, 0.5, 0]}


def test_hand_frozen_parameters_stay_frozen(tmp_path: Path) -> None:
    model = tiny.model()
    model.mlp1[0].requires_grad_(False)
    trainer = runs.make_trainer(str(tmp_path), model=model)
    before = runs.weights(trainer)
    trainer.train()
    same = {name for name, value in runs.weights(trainer).items() if torch.equal(value, before[name])}
    assert same == {"mlp1.0.weight", "mlp1.0.bias"}
    again = runs.make_trainer(str(tmp_path), model=model, freeze_backbone=True)
    assert not model.mlp1[0].weight.requires_grad and model.mlp1[1].weight.requires_grad
    third = runs.make_trainer(str(tmp_path), model=again.model)
    assert next(third.model.vision_model.parameters()).requires_grad
