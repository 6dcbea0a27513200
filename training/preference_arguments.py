"""Settings of preference optimisation (MPO), the section `preference` of a recipe.

How to train is `arguments.InternVLTrainingArguments`, the loss itself `preference_losses`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arguments import _setting

_WEIGHTS = ("preference_weight", "quality_weight", "generation_weight")


@dataclass
class PreferenceArguments:
    """Arguments of `mpo.MPOTrainer`; the defaults are those of the published MPO checkpoints.

    The loss of a step is `preference_weight` x mean(preference) + `quality_weight` x mean(quality) over the pairs of
    the global batch, plus `generation_weight` x the weighted mean of the chosen answers' cross-entropy (MPO,
    arXiv 2411.10442; InternVL3, arXiv 2504.10479).

    Args:
        beta: How many units of reward a difference of 1 in log-probability is worth.
        preference_weight: Weight of the preference term (DPO, sigmoid): chosen above rejected.
        quality_weight: Weight of the quality term (BCO on pairs): chosen above the running mean of rewards, rejected
            below it.
        generation_weight: Weight of the generation term, the cross-entropy of the chosen answers.
        label_smoothing: Share of pairs whose answers are taken to be exchanged, 0 to below 0.5; preference term only.
        exact_reward_shift: The reward shift of a step includes the rewards of its whole global batch. With several
            micro-batches a step they are found beforehand, by one more forward pass of the policy without gradient
            (about a fifth to a quarter of a step's time; the reference's values are kept and not computed again).
            False: as in the original, each micro-batch updates the shift before it uses it, and the cut of the batch
            matters a little.
        precompute_reference: Compute the reference's log-probabilities of all rows before training, keep them on the
            disk, and need no reference model in memory.
        reference_path: Checkpoint of the reference; None for the starting weights.
        reference_cache: Folder of precomputed values; None for one beside the Hugging Face cache.

    Raises:
        ValueError: a value out of range, all weights 0, or settings that exclude one another.
    """

    beta: float = _setting(0.1, "Reward of a difference of 1 in log-probability.")
    preference_weight: float = _setting(0.8, "Weight of the preference term (DPO, sigmoid).")
    quality_weight: float = _setting(0.2, "Weight of the quality term (BCO on pairs).")
    generation_weight: float = _setting(1.0, "Weight of the chosen answers' cross-entropy.")
    label_smoothing: float = _setting(0.0, "Share of pairs taken to be exchanged, 0 to below 0.5.")
    exact_reward_shift: bool = _setting(True, "The reward shift includes the whole global batch; see docs/mpo.md.")
    precompute_reference: bool = _setting(False, "Compute the reference's values before training, on the disk.")
    reference_path: str | None = _setting(None, "Checkpoint of the reference; None for the starting weights.")
    reference_cache: str | None = _setting(None, "Folder of precomputed values; None for the Hugging Face cache's.")

    def __post_init__(self) -> None:
        if not (math.isfinite(self.beta) and self.beta > 0):
            raise ValueError(f"beta must be above 0, got {self.beta}; the published checkpoints use 0.1")
        for name in _WEIGHTS:
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or more, got {value}")
        if not any(getattr(self, name) for name in _WEIGHTS):
            raise ValueError(f"{', '.join(_WEIGHTS)} are all 0, so nothing is learned: set one above 0")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(
                f"label_smoothing must be 0 or more and below 0.5, got {self.label_smoothing}; at 0.5 neither answer "
                "is preferred"
            )
        if self.reference_cache is not None and not self.precompute_reference:
            raise ValueError("reference_cache is the folder of precomputed values: set precompute_reference too")
