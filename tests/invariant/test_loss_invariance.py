"""One loss trajectory, however a global batch is cut: micro-batches, ranks, checkpointing; numbers by brute force."""

from pathlib import Path

import pytest
import torch

from internvl_hub.losses_internvl import LOSS_REDUCTIONS, length_to_weight
from internvl_hub.tests.training import runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.tests.training.two_ranks import run_two_ranks
from internvl_hub.training.collation import InternVLCollator


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], atol: float = 2e-6) -> None:
    for name, value in first.items():
        assert torch.allclose(value, second[name], atol=atol), name


@pytest.mark.parametrize(("reduction", "expected"), [("token", 1.2), ("sample", 1.5), ("square", 4 / 3)])
def test_reductions_by_hand(reduction: str, expected: float) -> None:
    """4 labels of loss 2 and 16 labels of loss 1."""
    first, second = length_to_weight(4, reduction), length_to_weight(16, reduction)
    assert (4 * first * 2 + 16 * second * 1) / (4 * first + 16 * second) == pytest.approx(expected)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_model_loss_is_the_weighted_mean(reduction: str) -> None:
    """Against cross-entropies of full logits, position by position."""
    rows, model = list(tiny.dataset(count=5)), tiny.model().eval()
    batch = InternVLCollator(2, tiny.IMAGE_SIZE, reduction)(rows)
    logits, numerator, denominator = model(**batch, output_logits=True).logits.detach(), 0.0, 0.0
    for i, row in enumerate(rows):
        weight = length_to_weight(int((row["labels"] != -100).sum()), reduction)
        for t in range(1, len(row["labels"])):
            if (label := int(row["labels"][t])) != -100:
                numerator -= weight * float(logits[i, t - 1].double().log_softmax(-1)[label])
                denominator += weight
    assert float(model(**batch).loss) == pytest.approx(numerator / denominator, rel=1e-5)


@pytest.mark.parametrize("reduction", LOSS_REDUCTIONS)
def test_accumulation_changes_nothing(reduction: str, tmp_path: Path) -> None:
    results = []
    for batch, accumulation in ((8, 1), (1, 8), (2, 4)):
        trainer = runs.make_trainer(
            str(tmp_path), batch=batch, accumulation=accumulation, loss_reduction=reduction, max_grad_norm=0.5
        )
        trainer.train()
        results.append((runs.losses(trainer), runs.weights(trainer)))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=2e-5)
        assert_same_weights(results[0][1], weights)
    assert len({round(loss, 3) for loss in results[0][0]}) == 3  # it does train


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Real gloo ranks, the second of which sees text alone: losses, weights, and the loss of an odd evaluation set."""
    ranks = run_two_ranks(runs.__file__, tmp_path / "ranks.pt", "1")
    trainer = runs.make_trainer(str(tmp_path), batch=2)
    trainer.train()
    assert ranks["losses"] == pytest.approx(runs.losses(trainer), rel=2e-5)
    assert_same_weights(ranks["weights"], runs.weights(trainer))
    assert ranks["eval_loss"] == pytest.approx(trainer.evaluate(tiny.dataset(count=5))["eval_loss"], rel=2e-5)


@pytest.mark.newest
def test_packs_on_two_processes_equal_one(tmp_path: Path) -> None:
    """The plan of two ranks is that of two micro-batches."""
    ranks = run_two_ranks(runs.__file__, tmp_path / "ranks.pt", "1", "packed")
    trainer = runs.make_trainer(str(tmp_path), batch=1, accumulation=2, **runs.PACKED)
    trainer.train()
    assert trainer.accounts.totals["num_samples"] > 9  # rows share packs
    assert ranks["losses"] == pytest.approx(runs.losses(trainer), rel=2e-5)
    assert_same_weights(ranks["weights"], runs.weights(trainer))
    assert ranks["eval_loss"] == pytest.approx(trainer.evaluate(tiny.dataset(count=5))["eval_loss"], rel=2e-5)


def test_a_packed_epoch_is_the_padded_epoch(tmp_path: Path) -> None:
    """All rows in one step: the same loss and the same update, packed or padded, whatever the order."""
    results = []
    for options in ({"batch": 24}, {"batch": 24, "train_sampling_strategy": "random"}, {"batch": 1, **runs.PACKED}):
        trainer = runs.make_trainer(str(tmp_path), max_steps=1, **options)
        if trainer.args.packing:
            packs = len(trainer.plan.sampler.planner)
            trainer = runs.make_trainer(str(tmp_path), max_steps=1, accumulation=packs, **options)
        trainer.train()
        assert trainer.accounts.totals["num_samples"] == 24
        results.append((runs.losses(trainer), runs.weights(trainer)))
    for losses, weights in results[1:]:
        assert losses == pytest.approx(results[0][0], rel=2e-5)
        assert_same_weights(weights, results[0][1])


def test_evaluation_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    rows, model = list(tiny.dataset(count=7)), tiny.model().eval()
    exact = float(model(**InternVLCollator(2, tiny.IMAGE_SIZE)(rows)).loss)
    for size in (1, 3, 7):
        trainer = runs.make_trainer(str(tmp_path), per_device_eval_batch_size=size, model=model)
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(exact, rel=1e-5)


def test_text_only_batch_gives_zero_gradients_not_missing_ones() -> None:
    rows, model = list(tiny.dataset(count=3, with_images=False)), tiny.model().train()
    batch = InternVLCollator(2, tiny.IMAGE_SIZE)(rows)
    loss = model(**batch).loss
    loss.backward()
    for module in (model.vision_model, model.mlp1):
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None, name
            assert torch.count_nonzero(parameter.grad) == 0, name
    bare = {key: value for key, value in batch.items() if key not in ("pixel_values", "image_flags")}
    assert float(model(**bare).loss) == pytest.approx(float(loss))


def test_gradient_checkpointing_changes_nothing() -> None:
    batch, results = InternVLCollator(2, tiny.IMAGE_SIZE)(list(tiny.dataset(count=4))), []
    for checkpointing in (False, True):
        model = tiny.model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            assert model.is_gradient_checkpointing
        loss = model(**batch).loss
        loss.backward()
        results.append((loss, {name: p.grad for name, p in model.named_parameters()}))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_weights(results[0][1], results[1][1], atol=1e-7)
