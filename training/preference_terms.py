"""The terms of a batch of pairs, their loss, and the metrics that are logged of them.

Metrics are exact means over pairs, whatever the batches and ranks: sums travel, never means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .preference_arguments import PreferenceArguments
from .preference_batch import PairBatch, Scores
from .preference_losses import generation_loss_sum, preference_loss, quality_loss, rewards

# Means over pairs, by the name they are logged under; the generation term is a mean over label weights.
PAIR_METRICS = (
    "loss_preference", "loss_quality", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies",
    "logps/chosen", "logps/rejected",
)  # fmt: skip
_SUMS = len(PAIR_METRICS) + 4  # further: pairs, generation, weight, router


@dataclass(frozen=True)
class PairTerms:
    """What a loss is made of.

    Attributes:
        preference, quality: (P,), see `preference_losses`.
        generation: Sum of weight x cross-entropy of the chosen answers' labels.
        weight: Sum of those weights.
        router: Router loss times its coefficient and `weight`; 0 without a mixture of experts.
        rewards, log_probs: (P, 2), of chosen and rejected, without gradient.
    """

    preference: torch.Tensor
    quality: torch.Tensor
    generation: torch.Tensor
    weight: torch.Tensor
    router: torch.Tensor
    rewards: torch.Tensor
    log_probs: torch.Tensor

    @classmethod
    def of(
        cls,
        pairs: PairBatch,
        scores: Scores,
        reference: torch.Tensor,
        shift: float,
        preference: PreferenceArguments,
        router_coefficient: float = 0.0,
        kept: Sequence[bool] | None = None,
    ) -> PairTerms:
        """Terms of a batch.

        Args:
            pairs: The batch.
            scores: Of the policy.
            reference: (2P,) log-probabilities of the answers under the reference.
            shift: The reward shift.
            preference: `beta` and `label_smoothing`.
            router_coefficient: Weight of the router loss.
            kept: (P,) which pairs count; None for all.
        """
        values = rewards(scores.answers, reference, preference.beta).reshape(-1, 2)
        log_probs, weights = scores.answers.detach().reshape(-1, 2), pairs.weights
        if kept is not None:
            chosen_pairs = torch.tensor(kept, dtype=torch.bool, device=values.device)
            weights = weights * chosen_pairs.repeat_interleave(2).repeat_interleave(pairs.counts)
            values, log_probs = values[chosen_pairs], log_probs[chosen_pairs]
        chosen, rejected = values.unbind(dim=1)
        weight, learned = weights.sum(), weights > 0
        router = weight.new_zeros(())
        if scores.router_loss is not None:
            router = router_coefficient * weight * scores.router_loss.to(weight.device)
        return cls(
            preference_loss(chosen, rejected, preference.label_smoothing),
            quality_loss(chosen, rejected, shift),
            generation_loss_sum(scores.labels[learned], weights[learned]),
            weight,
            router,
            values.detach(),
            log_probs,
        )

    def loss(self, preference: PreferenceArguments, pairs: float, weight: torch.Tensor | float) -> torch.Tensor:
        """The part of this batch in the loss of a global batch.

        Args:
            preference: The weights of the terms.
            pairs: Pairs of the global batch.
            weight: Sum of its label weights.
        """
        of_pairs = (
            preference.preference_weight * self.preference.sum() + preference.quality_weight * self.quality.sum()
        )
        return of_pairs / pairs + (preference.generation_weight * self.generation + self.router) / weight

    def sums(self) -> torch.Tensor:
        """float64 (n,) on the CPU, for `mean_metrics`."""
        chosen, rejected = self.rewards.unbind(dim=1)
        columns = [self.preference, self.quality, chosen, rejected, chosen - rejected, (chosen > rejected).float()]
        columns += [*self.log_probs.unbind(dim=1), torch.ones_like(chosen)]
        table = torch.stack([column.detach().double().sum() for column in columns])
        rest = torch.stack([part.detach().double() for part in (self.generation, self.weight, self.router)])
        return torch.cat([table, rest.to(table.device)]).cpu()


def no_sums() -> torch.Tensor:
    """The sums of no batch."""
    return torch.zeros(_SUMS, dtype=torch.float64)


def mean_metrics(sums: torch.Tensor, preference: PreferenceArguments) -> dict[str, float]:
    """Means from `PairTerms.sums`, added up over batches and ranks; {} for no pair.

    Returns:
        `PAIR_METRICS`, `loss_generation`, and `loss`, all terms together.
    """
    *of_pairs, pairs, generation, weight, router = sums.tolist()
    if not pairs:
        return {}
    means = {name: value / pairs for name, value in zip(PAIR_METRICS, of_pairs, strict=True)}
    means["loss_generation"] = generation / weight if weight else 0.0
    total = preference.preference_weight * means["loss_preference"]
    total += preference.quality_weight * means["loss_quality"]
    total += preference.generation_weight * means["loss_generation"] + (router / weight if weight else 0.0)
    return {"loss": total, **means}
