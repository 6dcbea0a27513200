"""From the language model to a loss or log-probabilities: which way past the output head, with which normaliser.

The arithmetic is `losses_internvl.py`; embeddings with images in them come from the model.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from .losses_internvl import (
    LabelLogProbsOutput,
    Targets,
    head_cross_entropy_sum,
    head_log_probs,
    label_log_probs,
    normalise_loss,
    shift_targets,
    weighted_cross_entropy_sum,
)

# Language models that do more to hidden states than one linear head: their logits must come from their own forward.
_HEAD_MODIFIERS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "logits_mup_width_multiplier",
    "unpadded_vocab_size",
)


class InternVLSupervisionMixin:
    """Methods of `InternVLChatModel` for `forward` with labels."""

    def _supervised(
        self,
        inputs: dict[str, Any],
        labels: torch.Tensor,
        loss_weight: torch.Tensor | None,
        num_items_in_batch: Any,
        all_gather: bool,
        wants_logits: bool,
        logits_to_keep: int | torch.Tensor,
    ) -> CausalLMOutputWithPast:
        """The language model's output with the loss; `inputs` are its arguments, the others those of `forward`."""
        _check_loss_normaliser(loss_weight, num_items_in_batch)
        targets = shift_targets(labels, loss_weight)
        if wants_logits or self._needs_full_logits():
            outputs, loss_sum = self._loss_with_logits(inputs, targets, logits_to_keep)
        else:
            outputs, loss_sum = self._loss_without_logits(inputs, targets)
        loss = normalise_loss(loss_sum, targets.weights, num_items_in_batch, all_gather)
        router_loss = getattr(outputs, "aux_loss", None)  # mixture of experts with llm_config.output_router_logits
        if router_loss is not None:
            share = 1.0 if num_items_in_batch is None else targets.weights.sum() / num_items_in_batch
            coefficient = self.config.get_text_config().router_aux_loss_coef
            # By its share of the global batch, so that micro-batches and ranks add up to a weighted mean.
            loss = loss + coefficient * torch.as_tensor(share, device=loss.device) * router_loss.to(loss.device)
        return type(outputs)(**{**outputs, "loss": loss})  # anew: a loss set later would come last in a tuple

    def _needs_full_logits(self) -> bool:
        """Whether the loss needs more of the language model's own forward than its head."""
        text = self.config.get_text_config()
        if getattr(text, "output_router_logits", False):
            return True
        return any(getattr(text, name, None) not in (None, 1, 1.0) for name in _HEAD_MODIFIERS)

    def _label_log_probs(self, inputs: dict[str, Any], labels: torch.Tensor | None) -> LabelLogProbsOutput:
        if labels is None:
            raise ValueError("output_log_probs needs labels: the log-probabilities are theirs.")
        targets = shift_targets(labels)
        if self._needs_full_logits():
            outputs = self.language_model(**inputs)
            logits = targets.select(outputs.logits)
            log_probs = label_log_probs(logits, targets.labels.to(logits.device))
            return LabelLogProbsOutput(log_probs=log_probs, aux_loss=getattr(outputs, "aux_loss", None))
        states = targets.select(self.language_model.get_decoder()(**inputs).last_hidden_state)
        vocab_size = self.config.get_text_config().vocab_size
        return LabelLogProbsOutput(
            log_probs=head_log_probs(states, self.get_output_embeddings(), targets.labels, vocab_size)
        )

    def _loss_with_logits(
        self, inputs: dict[str, Any], targets: Targets, logits_to_keep: int | torch.Tensor
    ) -> tuple[CausalLMOutputWithPast, torch.Tensor]:
        outputs = self.language_model(**inputs)
        logits = outputs.logits
        rows = targets.select(logits)
        loss_sum = weighted_cross_entropy_sum(rows, targets.labels.to(rows.device), targets.weights.to(rows.device))
        if isinstance(logits_to_keep, torch.Tensor):
            outputs.logits = logits[:, logits_to_keep]
        elif logits_to_keep:
            outputs.logits = logits[:, -logits_to_keep:]
        return outputs, loss_sum

    def _loss_without_logits(
        self, inputs: dict[str, Any], targets: Targets
    ) -> tuple[CausalLMOutputWithPast, torch.Tensor]:
        hidden = self.language_model.get_decoder()(**inputs)
        states = targets.select(hidden.last_hidden_state)
        vocab_size = self.config.get_text_config().vocab_size
        loss_sum = head_cross_entropy_sum(states, self.get_output_embeddings(), targets, vocab_size)
        outputs = CausalLMOutputWithPast(
            past_key_values=getattr(hidden, "past_key_values", None),  # recurrent models have none
            hidden_states=hidden.hidden_states,
            attentions=getattr(hidden, "attentions", None),
        )
        return outputs, loss_sum


def _check_loss_normaliser(loss_weight: Any, num_items_in_batch: Any) -> None:
    integral = isinstance(num_items_in_batch, int) or (
        isinstance(num_items_in_batch, torch.Tensor) and not num_items_in_batch.is_floating_point()
    )
    if loss_weight is not None and integral:
        raise ValueError(
            "loss_weight was given, but num_items_in_batch counts tokens; it must be the sum of the weights over the "
            "global batch. Train with InternVLTrainer, which computes it, or drop loss_weight."
        )
