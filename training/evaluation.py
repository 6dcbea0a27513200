"""Evaluation whose loss is exact: the weighted mean over all targets, whatever the batch size and number of ranks.

`ExactEvaluation` is a part of `InternVLTrainer`; it relies on `Trainer`'s attributes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..data.dataset import ConversationDataset
from ..losses_internvl import IGNORE_INDEX, shift_targets
from .accounts import MEASURES
from .generation_metrics import evaluate_generation

logger = logging.getLogger(__name__)

Batch = dict[str, Any]
_Base = Trainer if TYPE_CHECKING else object


def label_weight(batch: Batch) -> torch.Tensor:
    """Sum of the weights of a batch's targets, those the shifted loss really uses: float32 scalar.

    Args:
        batch: `labels` (B, L) and optionally `loss_weight` (B, L); without weights every label counts 1.
    """
    return shift_targets(batch["labels"], batch.get("loss_weight")).weights.sum()


class ExactEvaluation(_Base):
    """The evaluation loop, as `Trainer`'s but for the loss."""

    _eval_sums: list[float]

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the parent's, with a loss that is the weighted mean over all targets, not a mean of batch means.

        Rows that cannot be used are logged and counted as `eval_skipped`. With `eval_generations` answers are
        generated and marked too.
        """
        self._eval_sums = [0.0, 0.0, 0.0]
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        found = self._summed_metrics()
        if self.args.eval_generations and isinstance(dataloader.dataset, ConversationDataset):
            limits = self.args.eval_generations, self.args.eval_max_new_tokens
            found |= evaluate_generation(self, self._rows_to_answer(dataloader.dataset), *limits)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def _summed_metrics(self) -> dict[str, float]:
        """Metrics from the sums of all batches and ranks, without their prefix."""
        sums = torch.tensor(self._eval_sums, device=self.args.device)
        loss, weight, skipped = self.accelerator.reduce(sums, reduction="sum").tolist()
        found = {"loss": loss / weight} if weight > 0 else {}
        return {**found, "skipped": round(skipped)} if skipped else found

    def _rows_to_answer(self, dataset: Any) -> Any:
        """The rows whose answers are generated: `len`, features by index, and a `tokenizer`."""
        return dataset

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss of one batch, for `evaluation_loop` to add up; logits only where somebody wants them."""
        inputs = self._without_counts(inputs)
        if inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs({**inputs, "labels": self._without_repeats(inputs["labels"])})
        weight = label_weight(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, num_items_in_batch=1.0, output_logits=not prediction_loss_only)
        loss_sum = outputs.loss.detach().float()
        self._eval_sums[0] += loss_sum.item()
        self._eval_sums[1] += weight.item()
        loss = loss_sum / weight.clamp(min=torch.finfo(torch.float32).tiny)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits.detach(), inputs["labels"])

    def _without_counts(self, inputs: Batch) -> Batch:
        skipped = inputs.get("skipped", ())
        self._eval_sums[2] += len(skipped)
        for entry in skipped:
            logger.warning("%s: not evaluated: %s: %s", entry.source, entry.where, entry.reason)
        return {key: value for key, value in inputs.items() if key not in (*MEASURES, "skipped")}

    def _without_repeats(self, labels: torch.Tensor) -> torch.Tensor:
        """Masks the rows that accelerate repeats to give every rank a full last batch (as `gather_for_metrics`)."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        first = self.args.process_index * len(labels)
        kept = max(0, min(len(labels), state.remainder - first))
        return torch.cat([labels[:kept], torch.full_like(labels[kept:], IGNORE_INDEX)])
