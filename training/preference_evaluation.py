"""Evaluation on pairs: the terms of the loss and the rewards, exact means over all pairs of a data set.

`PairEvaluation` is a part of `mpo.MPOTrainer`; it relies on `Trainer`'s attributes and on the trainer's `_terms`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import EvalLoopOutput

from .evaluation import Batch, ExactEvaluation
from .preference_arguments import PreferenceArguments
from .preference_terms import mean_metrics, no_sums
from .reference_pass import PrecomputedReference
from .reward_shift import RewardShift


class ChosenAnswers:
    """The chosen answers of a `PreferenceDataset` as rows of their own, for generation to be compared with."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.tokenizer = dataset.tokenizer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Any:
        features = self.dataset[row]
        if not isinstance(features, dict):  # skipped
            return features
        answer = {name: features[f"chosen_{name}"] for name in ("input_ids", "labels")}
        return {**answer, "pixel_values": features["pixel_values"]}


class PairEvaluation(ExactEvaluation):
    """The evaluation loop on pairs: `eval_loss` and the metrics that training logs, with the shift as it stands."""

    preference: PreferenceArguments
    shift: RewardShift
    reference: Any
    _eval_terms: torch.Tensor

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the parent's; with `eval_generations` the chosen answers are what generated ones are compared with."""
        self._eval_terms = no_sums()
        if not isinstance(self.reference, PrecomputedReference):
            return super().evaluation_loop(dataloader, *args, **kwargs)
        if not self._casts_inputs():
            self.reference.make(self.model, fresh=self.state.global_step == 0)
        before = self.reference.read_from(dataloader.dataset)
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self.reference.read_from(before)

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Adds up the terms of one batch; pairs that accelerate repeats to fill the last one do not count."""
        rows = len(inputs.get("places", ())) + len(inputs.get("skipped", ()))
        inputs = self._without_counts(inputs)
        kept = self._kept(inputs["places"], rows)
        with torch.no_grad(), self.compute_loss_context_manager():
            terms, _ = self._terms(model, self._prepare_inputs(inputs), kept)
        sums = terms.sums()
        self._eval_terms += sums
        return torch.tensor(mean_metrics(sums, self.preference).get("loss", 0.0), device=self.args.device), None, None

    def _kept(self, places: list[int], rows: int) -> list[bool]:
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return [True] * len(places)
        first = self.args.process_index * rows
        return [first + place < state.remainder for place in places]

    def _summed_metrics(self) -> dict[str, float]:
        found = super()._summed_metrics()  # of rows: only what was skipped
        means = mean_metrics(self._sum_over_ranks(self._eval_terms, self.args.device), self.preference)
        return {**found, **means, **({"reward_shift": self.shift.value} if means else {})}

    def _rows_to_answer(self, dataset: Any) -> Any:
        return ChosenAnswers(dataset)
