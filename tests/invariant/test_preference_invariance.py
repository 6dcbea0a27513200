"""One MPO loss, however pairs are cut and laid out: micro-batches, ranks, packs, shared tiles, kinds of reference."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internvl_hub.tests.training import preference_runs, runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.tests.training.two_ranks import run_two_ranks
from internvl_hub.training.preference_collation import PreferenceCollator
from internvl_hub.training.preference_losses import sequence_sums

PADDED = PreferenceCollator(preference_runs.PAD, tiny.IMAGE_SIZE)
PACKED = PreferenceCollator(preference_runs.PAD, tiny.IMAGE_SIZE, packing=True)
# No accuracies: rounding decides about the pair of equal answers.
METRICS = ("loss_preference", "loss_quality", "loss_generation", "rewards/margins", "rewards/accuracies",
           "logps/chosen", "reward_shift")  # fmt: skip


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.allclose(value, second[name].to(value), atol=atol, rtol=1e-5), name


def double(folder: Path, **options: Any) -> preference_runs.Recorder:
    """A trainer in float64; log-probabilities are float32 all the same."""
    return preference_runs.make_trainer(str(folder), model=tiny.model().double(), **options)


@pytest.mark.parametrize("images", [True, False], ids=["mixed", "text"])
def test_layouts_and_cuts_change_nothing(images: bool, tmp_path: Path) -> None:
    """Loss, every gradient and the shift of eight pairs: in one padded batch, packed, and cut into micro-batches."""
    rows, results = preference_runs.pairs(8, images), []
    for collator, sizes in ((PADDED, [8]), (PACKED, [8]), (PADDED, [1] * 8), (PACKED, [3, 5]), (PADDED, [6, 0, 2])):
        parts = iter(rows)
        batches = [collator([next(parts) for _ in range(size)]) for size in sizes]
        trainer = double(tmp_path)
        loss, gradients = preference_runs.step(trainer, batches)
        results.append((loss, gradients, trainer.shift.value))
    for loss, gradients, shift in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6)
        assert shift == pytest.approx(results[0][2], rel=1e-5)
        assert_same(results[0][1], gradients, atol=1e-7)
    assert results[0][2] != 0 and all(
        name in results[0][1] for name in ("mlp1.1.weight", "language_model.lm_head.weight")
    )


def test_an_image_for_both_answers_is_an_image_for_each(tmp_path: Path) -> None:
    """Against the chosen and the rejected rows written out, pixels repeated, by plain torch in float64."""
    rows, trainer = preference_runs.pairs(5), double(tmp_path)
    loss, gradients = preference_runs.step(trainer, [PADDED(rows)])
    policy, reference = (preference_runs.moved(tiny.model().double()), tiny.model().double())
    policy.load_state_dict(trainer.model.state_dict())
    scores = {}
    for name, model in (("policy", policy), ("reference", reference.eval())):
        for answer in ("chosen", "rejected"):
            scores[name, answer] = [_log_probs(model, row, answer) for row in rows]
    sums = {key: torch.stack([x.sum() for x in value]) for key, value in scores.items()}
    chosen, rejected = (0.1 * (sums["policy", a] - sums["reference", a].detach()) for a in ("chosen", "rejected"))
    shift = torch.cat([chosen, rejected]).mean().detach()
    terms = -(chosen - rejected).sigmoid().log().mean()
    quality = -((chosen - shift).sigmoid().log() + (shift - rejected).sigmoid().log()).mean()
    weights = [len(x) ** -0.5 for x in scores["policy", "chosen"]]
    parts = list(zip(weights, scores["policy", "chosen"], strict=True))
    generation = -sum(w * x.sum() for w, x in parts) / sum(w * len(x) for w, x in parts)
    expected = 0.8 * terms + 0.2 * quality + generation
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert trainer.shift.value == pytest.approx(shift.item(), rel=1e-5)
    assert_same({name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, gradients, atol=1e-6)


def _log_probs(model: torch.nn.Module, row: dict[str, Any], answer: str) -> torch.Tensor:
    """Log-probabilities of an answer's labels from full logits."""
    pixels = row["pixel_values"]
    ids, labels = row[f"{answer}_input_ids"][None], row[f"{answer}_labels"][1:]
    logits = model(input_ids=ids, pixel_values=None if pixels is None else pixels.double()).logits[0, :-1]
    return logits.log_softmax(-1)[torch.arange(len(labels)), labels.clamp(min=0)][labels != -100]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_policy_that_is_the_reference(smoothing: float, tmp_path: Path) -> None:
    """log 2, 2 log 2 and the loss of InternVLTrainer on the chosen rows."""
    rows = preference_runs.pairs(8)
    trainer = preference_runs.make_trainer(str(tmp_path), move=0, max_steps=1, dataset=rows,
                                           preference={"label_smoothing": smoothing})  # fmt: skip
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss_preference"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["loss_quality"] == pytest.approx(2 * math.log(2), abs=1e-6)
    assert log["rewards/margins"] == pytest.approx(0, abs=1e-6) and log["reward_shift"] == pytest.approx(0, abs=1e-6)
    chosen = runs.make_trainer(str(tmp_path), dataset=tiny.dataset(count=8), max_steps=1)
    chosen.train()
    assert log["loss_generation"] == pytest.approx(runs.losses(chosen)[0], rel=1e-6)
    assert log["loss"] == pytest.approx(1.2 * math.log(2) + log["loss_generation"], rel=1e-6)


def test_exchanged_answers_flip_the_margins(tmp_path: Path) -> None:
    rows, margins = preference_runs.pairs(4), []
    other = {"chosen": "rejected", "rejected": "chosen"}
    swapped = [
        {(other[k.split("_", 1)[0]] + "_" + k.split("_", 1)[1] if k.split("_", 1)[0] in other else k): v
         for k, v in row.items()} for row in rows
    ]  # fmt: skip
    for part in (rows, swapped):
        trainer = double(tmp_path)
        preference_runs.step(trainer, [PADDED(part)])
        trainer.log({"loss": 0.0})
        margins.append(trainer.state.log_history[-1]["rewards/margins"])
    assert margins[0] != 0 and margins[1] == pytest.approx(-margins[0], rel=1e-5)


def test_equal_answers_have_no_margin(tmp_path: Path) -> None:
    row = preference_runs.pairs(1)[0]
    same = {**row, "rejected_input_ids": row["chosen_input_ids"], "rejected_labels": row["chosen_labels"]}
    trainer = double(tmp_path, preference={"quality_weight": 0.0, "generation_weight": 0.0})
    loss, gradients = preference_runs.step(trainer, [PADDED([same])])
    assert loss == pytest.approx(0.8 * math.log(2), rel=1e-6)
    assert all(float(gradient.abs().max()) < 1e-7 for gradient in gradients.values())


def test_an_inexact_shift_sees_the_batches_so_far(tmp_path: Path) -> None:
    """The original's way: micro-batch i uses the mean over micro-batches 0 to i."""
    trainer = preference_runs.make_trainer(str(tmp_path), batch=2, accumulation=4, max_steps=2,
                                           preference={"exact_reward_shift": False})  # fmt: skip
    trainer.train()
    seen = [np.array(values) for values, _ in trainer.seen]
    assert len(seen) == 8
    for i, (_, shift) in enumerate(trainer.seen):
        assert shift == pytest.approx(np.concatenate(seen[: i + 1]).mean(), rel=1e-6)


# --------------------------------------------------------------------------------------------------------------- ranks


def assert_same_run(ranks: dict[str, Any], trainer: preference_runs.Recorder, rel: float = 2e-5) -> None:
    assert ranks["losses"] == pytest.approx(runs.losses(trainer), rel=rel)
    assert_same(ranks["weights"], runs.weights(trainer))
    entries = ([entry for entry in log if "loss" in entry] for log in (ranks["log"], trainer.state.log_history))
    for entry, own in zip(*entries, strict=True):
        for name in METRICS:
            assert entry[name] == pytest.approx(own[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "flags",
    [pytest.param(["1"], marks=pytest.mark.newest, id="plain"), pytest.param(["1", "twice"], id="accumulated")],
)
def test_two_processes_equal_one(flags: list[str], tmp_path: Path) -> None:
    """Losses, weights, metrics, and an evaluation that ends unevenly; the shift is numpy's running mean."""
    ranks = run_two_ranks(preference_runs.__file__, tmp_path / "ranks.pt", *flags)
    size = 4 if "twice" in flags else 2
    trainer = preference_runs.make_trainer(str(tmp_path), batch=size)
    trainer.train()
    assert_same_run(ranks, trainer)
    own = trainer.evaluate(preference_runs.pairs(5))
    for name in ("loss", *METRICS):
        assert ranks["evaluation"][f"eval_{name}"] == pytest.approx(own[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    rewards = np.array([[values for values, _ in rank] for rank in ranks["seen"]])  # ranks, steps, 2 x pairs
    assert rewards.shape == (2, 3, size)
    for step in range(3):
        mean = rewards[:, : step + 1].mean()
        assert [rank[step][1] for rank in ranks["seen"]] == pytest.approx([mean] * 2, rel=1e-6)
        assert ranks["log"][step]["reward_shift"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.newest
def test_packs_on_two_processes_equal_one(tmp_path: Path) -> None:
    ranks = run_two_ranks(preference_runs.__file__, tmp_path / "ranks.pt", "1", "packed")
    options = {**runs.PACKED, "max_packed_tokens": 900, "dataset": preference_runs.pair_dataset()}
    trainer = preference_runs.make_trainer(str(tmp_path), batch=1, accumulation=2, **options)
    trainer.train()
    assert trainer.accounts.totals["num_samples"] > 9  # pairs share packs
    assert_same_run(ranks, trainer)


@pytest.mark.newest
def test_precomputed_on_two_processes_equals_a_copy_on_one(tmp_path: Path) -> None:
    ranks = run_two_ranks(preference_runs.__file__, tmp_path / "ranks.pt", "2", "precomputed")
    trainer = preference_runs.make_trainer(str(tmp_path), batch=4, move=0, dataset=preference_runs.pair_dataset())
    trainer.train()
    assert_same_run(ranks, trainer)
    assert trainer.state.log_history[2]["rewards/margins"] != 0


def test_evaluation_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    """Nor does it move the shift."""
    rows, results = preference_runs.pairs(7), []
    for size in (1, 3, 7):
        trainer = preference_runs.make_trainer(str(tmp_path), per_device_eval_batch_size=size)
        trainer.shift.update(-3.0, 10.0)
        results.append(trainer.evaluate(rows))
        assert trainer.shift.value == -0.3
    names = [name for name in results[0] if "_loss" in name or "rewards" in name or "logps" in name]
    assert len(names) == 10
    for other in results[1:]:
        assert {name: other[name] for name in names} == pytest.approx({n: results[0][n] for n in names}, rel=1e-5)
    trainer.shift = type(trainer.shift)()
    trainer.shift.update(-3.0, 10.0)
    terms = trainer._terms(trainer.model, {k: v for k, v in PADDED(rows).items() if not k.startswith("num_")})[0]
    loss = terms.loss(trainer.preference, 7, terms.weight)
    assert results[0]["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_sums_of_a_pack_are_those_of_padded_rows() -> None:
    """Labels of a first token, which nothing predicts, are left out of both counts."""
    rows = preference_runs.pairs(3)
    rows[1]["chosen_labels"] = rows[1]["chosen_labels"].clone()
    rows[1]["chosen_labels"][0] = rows[1]["chosen_input_ids"][0]
    model, sums = tiny.model().eval(), []
    for collator in (PADDED, PACKED):
        batch = collator(rows)
        inputs = {k: v for k, v in batch.items() if k in ("input_ids", "labels", "attention_mask", "position_ids",
                                                          "pixel_values", "tile_index")}  # fmt: skip
        scored = model(**inputs, use_cache=False, output_log_probs=True)
        sums.append(sequence_sums(scored.log_probs, batch["label_counts"]))
    torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-4)
