"""The terms of MPO against float64 and autograd, numbers of the paper's formulas, arguments and their refusals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from internvl_hub.training.preference_arguments import PreferenceArguments
from internvl_hub.training.preference_losses import (
    generation_loss_sum,
    preference_loss,
    quality_loss,
    rewards,
    sequence_sums,
)
from internvl_hub.training.reward_shift import RewardShift

CHOSEN, REJECTED = torch.tensor([0.2, -3.0, 40.0, 0.0]), torch.tensor([-0.2, 5.0, -60.0, 0.0])


def _log_sigmoid(value: float) -> float:
    """In plain float64."""
    return -math.log1p(math.exp(-value)) if value > 0 else value - math.log1p(math.exp(value))


def test_numbers_by_hand() -> None:
    """beta 0.1; log-probabilities (policy, reference): chosen (-10, -12), rejected (-20, -18)."""
    chosen = rewards(torch.tensor([-10.0]), torch.tensor([-12.0]), 0.1)
    rejected = rewards(torch.tensor([-20.0]), torch.tensor([-18.0]), 0.1)
    assert (chosen.item(), rejected.item()) == pytest.approx((0.2, -0.2))
    first, second = preference_loss(chosen, rejected).item(), quality_loss(chosen, rejected, 0.0).item()
    assert first == pytest.approx(0.51302, abs=1e-5) and second == pytest.approx(1.19628, abs=1e-5)
    assert 0.8 * first + 0.2 * second == pytest.approx(0.64967, abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_preference_loss_is_the_formula(smoothing: float) -> None:
    expected = [
        -(1 - smoothing) * _log_sigmoid(c - r) - smoothing * _log_sigmoid(r - c)
        for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)
    ]
    assert preference_loss(CHOSEN, REJECTED, smoothing).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.5, -20.0])
def test_quality_loss_is_the_formula(shift: float) -> None:
    expected = [
        -_log_sigmoid(c - shift) - _log_sigmoid(-(r - shift))
        for c, r in zip(CHOSEN.tolist(), REJECTED.tolist(), strict=True)
    ]
    assert quality_loss(CHOSEN, REJECTED, shift).tolist() == pytest.approx(expected, rel=1e-5)


def test_gradients_are_those_of_float64() -> None:
    """And of the signs they must have: chosen rewards up, rejected ones down."""
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        chosen, rejected = (x.to(dtype).requires_grad_() for x in (CHOSEN, REJECTED))
        loss = (preference_loss(chosen, rejected, 0.1) + quality_loss(chosen, rejected, 0.3)).sum()
        gradients[dtype] = torch.autograd.grad(loss, (chosen, rejected))
    for low, high in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-7)
    chosen, rejected = (x.double().requires_grad_() for x in (CHOSEN[:2], REJECTED[:2]))
    down, up = torch.autograd.grad((preference_loss(chosen, rejected) + quality_loss(chosen, rejected, 0.0)).sum(),
                                   (chosen, rejected))  # fmt: skip
    assert bool((down < 0).all()) and bool((up > 0).all())


def test_functions_pass_gradcheck() -> None:
    chosen, rejected = (x.double().requires_grad_() for x in (CHOSEN[:2], REJECTED[:2]))
    assert torch.autograd.gradcheck(lambda c, r: preference_loss(c, r, 0.2), (chosen, rejected))
    assert torch.autograd.gradcheck(lambda c, r: quality_loss(c, r, 0.7), (chosen, rejected))
    values = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: sequence_sums(x, torch.tensor([2, 0, 3])), (values,))


def test_equal_answers_and_exchanged_ones() -> None:
    same = torch.tensor([7.0, -7.0])
    assert preference_loss(same, same).tolist() == pytest.approx([math.log(2)] * 2)
    assert preference_loss(same, same, 0.3).tolist() == pytest.approx([math.log(2)] * 2)
    margin = CHOSEN - REJECTED
    # -log s(m) + log s(-m) = -m: exchanging the answers flips the margin.
    difference = preference_loss(CHOSEN, REJECTED) - preference_loss(REJECTED, CHOSEN)
    torch.testing.assert_close(difference, -margin)


def test_extreme_rewards_stay_finite() -> None:
    huge = torch.tensor([1e4, -1e4], requires_grad=True)
    loss = (preference_loss(huge, -huge) + quality_loss(huge, -huge, 0.0)).sum()
    (gradient,) = torch.autograd.grad(loss, huge)
    assert bool(loss.isfinite()) and bool(gradient.isfinite().all())


def test_sequence_sums_add_in_order_and_in_float32() -> None:
    values = torch.arange(1.0, 7.0)
    assert sequence_sums(values, torch.tensor([1, 0, 3, 2])).tolist() == [1.0, 0.0, 9.0, 11.0]
    low = torch.full((3000,), -1.0, dtype=torch.bfloat16)  # bfloat16 would stop at -256
    assert sequence_sums(low, torch.tensor([3000])).tolist() == [-3000.0]
    assert sequence_sums(values[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)
    with pytest.raises(ValueError, match="add up to 5, but the model returned 6"):
        sequence_sums(values, torch.tensor([2, 3]))


def test_generation_loss_is_weighted_cross_entropy() -> None:
    logits, labels, weights = torch.randn(6, 9), torch.arange(6), torch.rand(6)
    log_probs = logits.log_softmax(-1)[torch.arange(6), labels]
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none") @ weights.double()
    assert generation_loss_sum(log_probs, weights).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_shift_is_a_running_mean() -> None:
    values, shift = np.random.default_rng(0).normal(size=(5, 8)), RewardShift()
    assert shift.value == 0.0
    for step in range(5):
        assert shift.update(values[step].sum(), 8) == pytest.approx(values[: step + 1].mean(), rel=1e-12)
    assert shift.state()["attributes"] == {"total": shift.total, "count": 40.0}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("beta", 0.0, "beta must be above 0"), ("beta", -1.0, "beta must be above 0"),
        ("beta", math.nan, "beta must be above 0"), ("label_smoothing", 0.5, "below 0.5"),
        ("label_smoothing", -0.1, "0 or more"), ("quality_weight", -0.2, "quality_weight must be 0 or more"),
        ("generation_weight", math.inf, "generation_weight must be 0 or more"),
        ("reference_cache", "x", "set precompute_reference"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceArguments(**{name: value})


def test_arguments() -> None:
    with pytest.raises(ValueError, match="all 0, so nothing is learned"):
        PreferenceArguments(preference_weight=0, quality_weight=0, generation_weight=0)
    fields = dataclasses.fields(PreferenceArguments)
    assert all(field.metadata["help"].endswith(".") for field in fields)
    assert all(f"{field.name}:" in (PreferenceArguments.__doc__ or "") for field in fields)
