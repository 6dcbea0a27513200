"""The trainer on pairs: TRL's losses, resuming, random numbers of the pass ahead, metrics, evaluation, refusals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from trl import DPOConfig, DPOTrainer

from internvl_hub.data.skipped import Skipped
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.tests.training import preference_runs, runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.arguments import InternVLTrainingArguments
from internvl_hub.training.mpo import MPOTrainer
from internvl_hub.training.preference_collation import PreferenceCollator
from internvl_hub.training.reward_shift import RewardShift
from internvl_hub.training.trainer import InternVLTrainer

COLLATOR = PreferenceCollator(preference_runs.PAD, tiny.IMAGE_SIZE, "token")

# ----------------------------------------------------------------------------------------------------------------- TRL


def _turn(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text}]


def _trl_trainer(folder: Path, model: Any, reference: Any) -> DPOTrainer:
    rows = [
        {"prompt": _turn("user", "Which colour?"), "chosen": _turn("assistant", colour * (i + 1)),
         "rejected": _turn("assistant", "None at all" if i % 2 else "?"),
         "images": [Image.new("RGB", (60, 60 * (1 + i % 2)), colour)]}
        for i, colour in enumerate(("red", "blue", "green", "white"))
    ]  # fmt: skip
    args = DPOConfig(
        output_dir=str(folder), loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0], beta=0.1,
        per_device_train_batch_size=4, max_length=None, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        disable_dropout=False, gradient_checkpointing=False,
    )  # fmt: skip
    processor = InternVLProcessor.from_model_config(model.config, tiny.tokenizer())
    return DPOTrainer(model, reference, args, train_dataset=Dataset.from_list(rows), processing_class=processor)


def _as_pairs(batch: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
    """TRL's batch (chosen rows, then rejected ones, every image in both halves) as rows of ours."""
    half, tiles = len(batch["input_ids"]) // 2, batch["num_patches"].tolist()
    pixels = batch["pixel_values"].split(tiles)
    rows = []
    for i in range(half):
        row: dict[str, Any] = {"pixel_values": pixels[i]}
        assert torch.equal(pixels[i], pixels[i + half])
        for name, place in (("chosen", i), ("rejected", i + half)):
            real = batch["attention_mask"][place].bool()
            ids, learned = batch["input_ids"][place][real], batch["completion_mask"][place][real].bool()
            row |= {f"{name}_input_ids": ids, f"{name}_labels": ids.masked_fill(~learned, -100)}
        rows.append(row)
    return rows


def test_the_loss_is_trls_where_the_definitions_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DPO, BCO without a shift and SFT through both trainers: loss, its terms' rewards, and every gradient."""
    reference, policy = tiny.model(), preference_runs.moved(tiny.model())
    other = _trl_trainer(tmp_path, copy.deepcopy(policy), copy.deepcopy(reference))
    batch = next(iter(other.get_train_dataloader()))
    expected = other.compute_loss(other.model.train(), dict(batch))
    expected.backward()
    monkeypatch.setattr(RewardShift, "update", lambda self, total, count: 0.0)
    rows = _as_pairs(batch)
    own = preference_runs.make_trainer(
        str(tmp_path), model=reference, move=0, dataset=rows, loss_reduction="token", logging_steps=1
    )
    own.model.load_state_dict(policy.state_dict())
    loss, gradients = preference_runs.step(own, [COLLATOR(rows)])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    for name, parameter in other.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    own.log({"loss": loss})
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
        assert own.state.log_history[-1][name] == pytest.approx(np.mean(other._metrics["train"][name]), rel=1e-4), name
    assert own.state.log_history[-1]["rewards/margins"] != 0


# ---------------------------------------------------------------------------------------------- resuming, random state


def _random_model(seed: int = 0) -> Any:
    vision = {**tiny.config().vision_config.to_dict(), "drop_path_rate": 0.4, "dropout": 0.2}
    return tiny.model(seed=seed, vision_config=vision)


@pytest.mark.parametrize("step", [2, 3], ids=["in_an_epoch", "between_epochs"])
def test_resuming_continues_the_same_run(step: int, tmp_path: Path) -> None:
    """To the last bit, with drop path: the shift, the random state and the STARTING weights as reference."""
    options = {"batch": 2, "accumulation": 4, "max_steps": 5, "save_strategy": "steps", "save_steps": 1, "move": 0}
    options |= {"optim": "adamw_torch", "learning_rate": 1e-2, "train_sampling_strategy": "random"}
    whole = preference_runs.make_trainer(str(tmp_path / "whole"), model=_random_model(), **options)
    whole.train()
    resumed = preference_runs.make_trainer(str(tmp_path / "other"), model=_random_model(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    names = ("loss", "loss_quality", "rewards/margins", "reward_shift")
    logs = [
        [{n: e[n] for n in names} for e in t.state.log_history if "loss" in e][-(5 - step) :] for t in (whole, resumed)
    ]
    assert logs[0] == logs[1]
    assert resumed.shift.count == whole.shift.count == 5 * 16
    for name, value in runs.weights(whole).items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_rewards_found_ahead_are_those_of_the_step(tmp_path: Path) -> None:
    """Drop path draws the same in both passes: the shift of the step is the mean of what it then trains on."""
    trainer = preference_runs.make_trainer(str(tmp_path), model=_random_model(), batch=2, accumulation=4, max_steps=2)
    seen: list[tuple[np.ndarray, float]] = []
    terms = trainer._terms

    def spy(*args: Any, **kwargs: Any) -> Any:
        found = terms(*args, **kwargs)
        seen.append((found[0].rewards.numpy(), trainer.shift.value))
        return found

    trainer._terms = spy  # type: ignore[method-assign]
    trainer.train()
    assert len(seen) == 8
    for step in range(2):
        mean = np.concatenate([rewards for rewards, _ in seen[: 4 * step + 4]]).mean()
        assert [shift for _, shift in seen[4 * step : 4 * step + 4]] == pytest.approx([mean] * 4, rel=1e-5)
    # Another state gives other rewards, so that the above says something.
    pairs = trainer._taken_apart(trainer.model.train(), COLLATOR(preference_runs.pairs(5)))
    assert not torch.allclose(pairs.score(trainer.model).answers, pairs.score(trainer.model).answers)


def test_a_pass_ahead_only_where_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(MPOTrainer, "_find_rewards", lambda self, model: (calls.append(1), self._ahead.clear()))
    for accumulation, preference, expected in (
        (1, {}, 0), (4, {}, 3), (4, {"exact_reward_shift": False}, 0), (4, {"quality_weight": 0.0}, 0),
    ):  # fmt: skip
        calls.clear()
        preference_runs.make_trainer(str(tmp_path), 2, accumulation, preference=preference).train()
        assert len(calls) == expected


def test_a_second_training_starts_without_a_shift(tmp_path: Path) -> None:
    trainer = preference_runs.make_trainer(str(tmp_path), max_steps=1)
    trainer.train()
    trainer.train()
    assert trainer.shift.count == 16


# ------------------------------------------------------------------------------------------------- metrics, evaluation


def test_metrics_are_means_over_all_pairs_since_the_last_entry(tmp_path: Path) -> None:
    """Of three steps, whose batches differ in size, logged once; against the same logged one by one."""
    rows = preference_runs.pairs(21)  # 8, 8 and 5 pairs
    one, each = (
        preference_runs.make_trainer(str(tmp_path), dataset=rows, logging_steps=n, learning_rate=0.0) for n in (3, 1)
    )
    one.train()
    each.train()
    (entry,) = [e for e in one.state.log_history if "loss" in e]
    parts = [e for e in each.state.log_history if "loss" in e]
    for name in ("loss_preference", "loss_quality", "rewards/chosen", "rewards/margins", "logps/rejected"):
        assert entry[name] == pytest.approx(np.average([e[name] for e in parts], weights=[8, 8, 5]), rel=1e-6), name
    assert entry["reward_shift"] == pytest.approx(parts[-1]["reward_shift"], rel=1e-6)
    for part in parts:
        assert part["loss"] == pytest.approx(
            0.8 * part["loss_preference"] + 0.2 * part["loss_quality"] + part["loss_generation"], rel=1e-6
        )
        assert part["rewards/margins"] == pytest.approx(part["rewards/chosen"] - part["rewards/rejected"], abs=1e-6)


def test_training_raises_margins_and_accuracy(tmp_path: Path) -> None:
    rows = [row for i, row in enumerate(preference_runs.pairs(8)) if i != 2]  # without the pair of equal answers
    trainer = preference_runs.make_trainer(
        str(tmp_path), dataset=rows, batch=7, max_steps=25, optim="adamw_torch", learning_rate=3e-3, move=0,
        logging_steps=25,
    )  # fmt: skip
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    assert after["eval_rewards/accuracies"] == 1.0 and after["eval_rewards/margins"] > 1.0
    assert after["eval_loss"] < before["eval_loss"] - 1 and after["eval_loss_preference"] < 0.4
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_weights_of_the_terms(tmp_path: Path) -> None:
    """Each alone; together they add up."""
    names = ("preference_weight", "quality_weight", "generation_weight")
    total, parts = {n: w for n, w in zip(names, (0.5, 0.3, 2.0), strict=True)}, []
    for kept in (names, *[(name,) for name in names]):
        weights = {name: total[name] if name in kept else 0.0 for name in names}
        trainer = preference_runs.make_trainer(str(tmp_path), max_steps=1, preference=weights)
        parts.append(preference_runs.step(trainer, [COLLATOR(preference_runs.pairs(8))]))
    assert parts[0][0] == pytest.approx(sum(loss for loss, _ in parts[1:]), rel=1e-6)
    for name, gradient in parts[0][1].items():
        torch.testing.assert_close(sum(g[name] for _, g in parts[1:]), gradient, rtol=1e-4, atol=1e-6)


def test_skipped_pairs_are_counted_and_left_out(tmp_path: Path) -> None:
    rows: list[Any] = preference_runs.pairs(24)
    rows[3] = rows[4] = Skipped("dataset", "row", "broken")
    trainer = preference_runs.make_trainer(str(tmp_path), dataset=rows, max_steps=1)
    trainer.accounts.max_skip_share = 1.0
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["skipped"] == 2 and trainer.shift.count == 12 and trainer.accounts.totals["num_samples"] == 6
    evaluation = trainer.evaluate(rows[:7])
    assert evaluation["eval_skipped"] == 2
    clean = trainer.evaluate([row for row in rows[:7] if isinstance(row, dict)])
    assert evaluation["eval_loss"] == pytest.approx(clean["eval_loss"], rel=1e-6)


@pytest.mark.newest
def test_answers_are_generated_and_compared_with_the_chosen_ones(tmp_path: Path) -> None:
    rows = preference_runs.pair_dataset(8)
    trainer = preference_runs.make_trainer(
        str(tmp_path), dataset=rows, max_steps=60, logging_steps=60, optim="adamw_torch", learning_rate=1e-2, move=0,
        eval_generations=4, eval_max_new_tokens=40,
    )  # fmt: skip
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    assert before["eval_exact_match"] == 0 and after["eval_exact_match"] == 1 and after["eval_generated"] == 4


def test_bf16_stays_near_float32(tmp_path: Path) -> None:
    """Autocast reaches policy and reference alike: equal weights still have no margin."""
    results = []
    for bf16 in (False, True):
        trainer = preference_runs.make_trainer(str(tmp_path), bf16=bf16, batch=4, accumulation=2, move=0)
        trainer.train()
        results.append(runs.losses(trainer))
        assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=2e-3)
    assert results[0] != results[1] and results[1] == pytest.approx(results[0], rel=0.02)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_nothing(lora: bool, tmp_path: Path) -> None:
    options = {"freeze_backbone": True, "use_llm_lora": 4, "lora_dropout": 0.0} if lora else {}
    results = []
    for on in (False, True):
        trainer = preference_runs.make_trainer(
            str(tmp_path), batch=4, accumulation=2, gradient_checkpointing=on,
            gradient_checkpointing_kwargs={"use_reentrant": False}, **options,
        )  # fmt: skip
        trainer.train()
        results.append(runs.losses(trainer))
    assert results[0] == pytest.approx(results[1], rel=1e-6) and len(set(results[0])) == 3


def test_a_router_loss_counts_by_its_share(tmp_path: Path) -> None:
    """A mixture of experts: with equal policy and reference, what the model adds to its own loss on these rows."""
    text = {
        "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8,
        "moe_intermediate_size": 24, "output_router_logits": True, "router_aux_loss_coef": 0.5,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    model = tiny.model(llm_config=text)
    trainer = preference_runs.make_trainer(str(tmp_path), model=model, move=0)
    batch = COLLATOR(preference_runs.pairs(3))
    inputs = {k: batch[k] for k in ("input_ids", "labels", "attention_mask", "pixel_values", "tile_index")}
    aux = model.train()(**inputs, use_cache=False, output_log_probs=True).aux_loss.item()
    loss, _ = preference_runs.step(trainer, [batch])
    trainer.log({"loss": loss})
    log = trainer.state.log_history[-1]
    of_terms = 0.8 * log["loss_preference"] + 0.2 * log["loss_quality"] + log["loss_generation"]
    assert aux > 0 and loss == pytest.approx(of_terms + 0.5 * aux, rel=1e-6)


# ------------------------------------------------------------------------------------------------------------ refusals


def _trainer(kind: type, folder: Path, **options: Any) -> Any:
    args = InternVLTrainingArguments(str(folder), use_cpu=True, report_to="none", **options.pop("args", {}))
    return kind(tiny.model(), args, processing_class=tiny.tokenizer(), **options)


def test_data_sets_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    pairs, rows = preference_runs.pair_dataset(4), tiny.dataset(count=4)
    with pytest.raises(ValueError, match="train_dataset is a ConversationDataset, but MPOTrainer trains on pairs"):
        _trainer(MPOTrainer, tmp_path, train_dataset=rows)
    with pytest.raises(ValueError, match="eval_dataset is a ConversationDataset"):
        _trainer(MPOTrainer, tmp_path, train_dataset=pairs, eval_dataset={"held": rows})
    with pytest.raises(ValueError, match="is a PreferenceDataset, but InternVLTrainer .* train with MPOTrainer"):
        _trainer(InternVLTrainer, tmp_path, train_dataset=pairs)
    with pytest.raises(ValueError, match="needs pairs of answers"):
        preference_runs.make_trainer(str(tmp_path), dataset=list(rows)).train()
    with pytest.raises(ValueError, match="train on pairs with MPOTrainer"):
        runs.make_trainer(str(tmp_path), dataset=preference_runs.pairs(8)).train()


def test_what_needs_logits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="compute_metrics is not supported"):
        _trainer(MPOTrainer, tmp_path, train_dataset=preference_runs.pairs(2), compute_metrics=lambda _: {})
    with pytest.raises(ValueError, match="bf16_full_eval would cast weights"):
        _trainer(MPOTrainer, tmp_path, train_dataset=preference_runs.pairs(2), args={"bf16_full_eval": True})
