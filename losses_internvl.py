"""Weighted next-token loss, and log-probabilities of answers, that never build the full logits.

Only supervised positions reach the output head, in chunks whose logits are recomputed in the backward pass: one more
head matmul per chunk, in exchange for a peak that does not grow with sequence length times vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

IGNORE_INDEX = -100
LOSS_REDUCTIONS = ("token", "sample", "square")
# Logits of one chunk: 2**25 float32 values, 128 MiB.
MAX_CHUNK_LOGITS = 2**25


def length_to_weight(count: int, reduction: str) -> float:
    """Weight of each label of a sample with `count` labels: 1, 1/x or x**-0.5; 0 for a sample without any.

    Args:
        count: Labels of the sample that are not -100, counted before the shift.
        reduction: `"token"`, `"sample"` or `"square"` (InternVL 2.5 report, arXiv 2412.05271, square averaging).

    Raises:
        ValueError: unknown reduction.
    """
    if reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"loss_reduction must be one of {LOSS_REDUCTIONS}, got {reduction!r}.")
    if count == 0:
        return 0.0
    return {"token": 1.0, "sample": 1.0 / count, "square": count**-0.5}[reduction]


@dataclass
class Targets:
    """Supervised positions of a batch, flattened.

    Attributes:
        positions: (B, L - 1) bool; position t predicts token t + 1.
        labels: (M,) token ids of the M supervised positions.
        weights: (M,) float32.
    """

    positions: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor

    def select(self, states: torch.Tensor) -> torch.Tensor:
        """Rows of (B, L, D) `states` that predict a label: (M, D)."""
        return states[:, :-1][self.positions.to(states.device)]


def shift_targets(labels: torch.Tensor, loss_weight: torch.Tensor | Sequence | None = None) -> Targets:
    """Prepares next-token targets.

    Args:
        labels: (B, L), -100 where no loss is taken.
        loss_weight: (B, L) weight of each label, None for ones; lists are accepted since existing scripts pass them so
            that no autocast rounds them.

    Raises:
        ValueError: shapes differ.
    """
    shifted = labels[:, 1:]
    positions = shifted != IGNORE_INDEX
    if loss_weight is None:
        weights = torch.ones(positions.shape, dtype=torch.float32, device=labels.device)
    else:
        weights = torch.as_tensor(loss_weight, dtype=torch.float32, device=labels.device)
        if weights.shape != labels.shape:
            raise ValueError(f"loss_weight has shape {tuple(weights.shape)}, labels have {tuple(labels.shape)}.")
        weights = weights[:, 1:]
    return Targets(positions, shifted[positions], weights[positions])


def label_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log-probability of each label, float32 (M,), from logits (M, V) and labels (M,)."""
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def weighted_cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over rows of weight x cross-entropy, in float32. Shapes (M, V), (M,), (M,)."""
    return -(label_log_probs(logits, labels) * weights).sum()


def head_log_probs(
    states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, vocab_size: int
) -> torch.Tensor:
    """`label_log_probs(head(states), labels)` in chunks of `MAX_CHUNK_LOGITS // vocab_size` rows.

    Args:
        states: (M, D) hidden states of the supervised positions.
        head: Maps (m, D) to (m, V) logits; called as a module, so that hooks of PEFT, FSDP and ZeRO-3 work.
        labels: (M,) token ids.
        vocab_size: V, for the chunk size.

    Returns:
        (M,), float32.
    """
    labels = labels.to(states.device)
    rows = max(1, MAX_CHUNK_LOGITS // vocab_size)

    def chunk_log_probs(chunk: torch.Tensor, chunk_labels: torch.Tensor) -> torch.Tensor:
        logits = head(chunk)
        return label_log_probs(logits, chunk_labels.to(logits.device))

    if states.shape[0] <= rows:
        return chunk_log_probs(states, labels)
    parts = zip(states.split(rows), labels.split(rows), strict=True)
    return torch.cat([checkpoint(chunk_log_probs, *part, use_reentrant=False) for part in parts])


def head_cross_entropy_sum(
    states: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], targets: Targets, vocab_size: int
) -> torch.Tensor:
    """`weighted_cross_entropy_sum(head(states), ...)` without full logits; arguments as of `head_log_probs`."""
    log_probs = head_log_probs(states, head, targets.labels, vocab_size)
    return -(log_probs * targets.weights.to(log_probs.device)).sum()


@dataclass
class LabelLogProbsOutput(ModelOutput):
    """What a model returns when it is asked for `output_log_probs`.

    Attributes:
        log_probs: (M,) float32, of the supervised labels, row by row, in order.
        aux_loss: Router loss of a mixture of experts, else None.
    """

    log_probs: torch.FloatTensor | None = None
    aux_loss: torch.FloatTensor | None = None


def normalise_loss(
    loss_sum: torch.Tensor,
    weights: torch.Tensor,
    num_items_in_batch: torch.Tensor | float | None = None,
    all_gather: bool = False,
) -> torch.Tensor:
    """Divides a weighted sum by its normaliser.

    Args:
        loss_sum: Sum of weight x cross-entropy of this batch.
        weights: (M,) weights of this batch.
        num_items_in_batch: Sum of weights over the global batch, if the trainer knows it.
        all_gather: Otherwise, average the sum of weights over ranks (`loss_reduction_all_gather` of the original).

    Raises:
        ValueError: there is no supervised token, so the loss is undefined.
    """
    if num_items_in_batch is not None:
        return loss_sum / torch.as_tensor(num_items_in_batch, device=loss_sum.device)
    total = weights.sum().to(loss_sum.device)
    if all_gather and torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.SUM)
        total = total / torch.distributed.get_world_size()
    if not torch.compiler.is_compiling() and not bool(total > 0):
        raise ValueError(
            "The batch has no supervised token: every label is -100 (or its weight is 0). Check that the conversation "
            "template matches the checkpoint and that answers are not empty."
        )
    return loss_sum / total
