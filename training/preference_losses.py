"""Terms of Mixed Preference Optimization as functions of log-probabilities: preference, quality, generation.

Shapes are (P,) for P pairs. Nothing here averages: the trainer divides by what the global batch holds. Nothing runs a
model either; log-probabilities come from `InternVLChatModel.forward(output_log_probs=True)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def sequence_sums(log_probs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Log-probability of each answer: the sum over its tokens, not divided by its length.

    Args:
        log_probs: (M,) of the supervised tokens, sequence after sequence.
        counts: (S,) int64, tokens of each sequence, M in all; a sequence may have none.

    Returns:
        (S,) in float32, or in float64 for float64.

    Raises:
        ValueError: counts and log-probabilities do not fit.
    """
    if int(counts.sum()) != len(log_probs):
        raise ValueError(
            f"label_counts add up to {int(counts.sum())}, but the model returned {len(log_probs)} log-probabilities"
        )
    precise = log_probs if log_probs.dtype == torch.float64 else log_probs.float()
    places = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    return precise.new_zeros(len(counts)).index_add(0, places.to(precise.device), precise)


def rewards(policy: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """Implicit rewards, beta x (log-probability under the policy - under the reference); any shape."""
    return beta * (policy - reference)


def preference_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Preference term: -log sigmoid(margin) (DPO, arXiv 2305.18290).

    With a smoothing e (conservative DPO): (1 - e) x -log sigmoid(margin) + e x -log sigmoid(-margin).

    Returns:
        (P,); log 2 for two answers of one reward.
    """
    margins = chosen_rewards - rejected_rewards
    loss = -F.logsigmoid(margins)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margins)
    return loss


def quality_loss(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, shift: float | torch.Tensor
) -> torch.Tensor:
    """Quality term: each answer alone against the reward shift (BCO on pairs, arXiv 2404.04656).

    -log sigmoid(chosen - shift) - log sigmoid(shift - rejected); the shift is a constant (`reward_shift`).

    Returns:
        (P,).
    """
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(shift - rejected_rewards)


def generation_loss_sum(chosen_log_probs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Generation term: sum of weight x cross-entropy over the tokens of the chosen answers.

    Args:
        chosen_log_probs: (M,).
        weights: (M,) as of `losses_internvl.length_to_weight`.
    """
    return -(weights * chosen_log_probs).sum()
