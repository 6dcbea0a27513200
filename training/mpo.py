"""Mixed Preference Optimization: a trainer on pairs of answers, whose loss does not depend on how a batch is cut.

The terms are in `preference_losses` and `preference_terms`, what answers are compared with in `reference`, batches in
`preference_collation`. Everything that does not concern the loss is `trainer.InternVLTrainer`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modeling_internvl_chat import InternVLChatModel
from .arguments import InternVLTrainingArguments
from .evaluation import Batch
from .preference_arguments import PreferenceArguments
from .preference_batch import PairBatch, Scores, count_pairs
from .preference_collation import PreferenceCollator
from .preference_evaluation import PairEvaluation
from .preference_losses import rewards
from .preference_terms import PairTerms, mean_metrics, no_sums
from .reference_choice import make_reference
from .reference_pass import PrecomputedReference
from .reward_shift import RewardShift
from .trainer import InternVLTrainer


class MPOTrainer(PairEvaluation, InternVLTrainer):
    """Trains an `InternVLChatModel` on a `PreferenceDataset`, or on any data set of pair features (MPO,
    arXiv 2411.10442; original `internvl/train/trainer_dpo.py`).

    A step minimises, with P pairs and label weights w in its global batch,

        (preference_weight x sum(preference) + quality_weight x sum(quality)) / P
        + generation_weight x sum(w x CE of chosen labels) / sum(w)

    plus a mixture of experts' router loss, as `InternVLTrainer` does: exactly this, whatever the micro-batches, ranks
    and packs. The images of a pair are encoded once for both answers.

    The reference is the model as it is given here, so that a resumed run compares with the same weights: under a
    disabled adapter where this trainer adds LoRA; else a frozen copy that shares what is not trained; see
    `PreferenceArguments` for other ways. While vision encoder and projector are not trained, policy and reference
    share the features of an image too.

    The reward shift of a step includes its whole global batch. With one micro-batch a step that takes one sum over
    ranks. With several, all of them go through policy and reference without gradient first (same mode, same random
    numbers), and the policy, but not the reference, once more; `exact_reward_shift=False` spares that.

    Logged are means over all pairs since the last entry: `loss_preference`, `loss_quality`, `loss_generation`,
    `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies`, `logps/chosen`, `logps/rejected`,
    and `reward_shift` as it stands. Evaluation gives the same names after `eval_`, with that shift.

    Args:
        model: With the starting weights, also where a run is resumed.
        args: As for `InternVLTrainer`; `loss_reduction` weighs the labels of the generation term.
        preference: Settings of the loss and the reference; None for the defaults.
        data_collator: None for a `PreferenceCollator`.
        **kwargs: As for `InternVLTrainer`.

    Raises:
        ValueError: as of `InternVLTrainer`; the data set is not one of pairs; settings that would be inexact.
    """

    collator_class = PreferenceCollator
    takes_pairs = True

    def __init__(
        self,
        model: nn.Module,
        args: InternVLTrainingArguments,
        preference: PreferenceArguments | None = None,
        data_collator: Any = None,
        **kwargs: Any,
    ) -> None:
        self.preference = PreferenceArguments() if preference is None else preference
        _refuse(args, kwargs)
        adapters_given = hasattr(model, "peft_config")
        super().__init__(model, args, data_collator, **kwargs)
        self.shift = RewardShift()
        self.add_callback(self.shift)
        self.reference = make_reference(self, self.preference, adapters_given)
        self._pairs_of_step = 0.0
        self._ahead: list[Batch] = []
        self._shift_is_found = False
        self._terms_since_log = no_sums()

    # ------------------------------------------------------------------------------------------------------ reference

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; with `precompute_reference` the values are made first."""
        self._terms_since_log = no_sums()
        if isinstance(self.reference, PrecomputedReference) and not self._casts_inputs():
            self.reference.make(self.model)  # type: ignore[arg-type]  # there is one
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _read_packs(self) -> list[Any]:
        return [*super()._read_packs(), *self.reference.language_models]

    def _reference_of(self, model: nn.Module, pairs: PairBatch) -> torch.Tensor:
        """(2P,) log-probabilities of the answers under the reference."""
        return self.reference.log_probs(model, pairs) if pairs.reference is None else pairs.reference

    def _taken_apart(self, model: nn.Module, inputs: Batch) -> PairBatch:
        """The batch, with the features of its tiles where policy and reference share them."""
        pairs = PairBatch.of(inputs)
        chat = _chat_model(self.accelerator.unwrap_model(model))
        shares = self.reference.same_vision and not self._casts_inputs() and _sees_the_same(chat)
        if pairs.reference is not None or not shares:
            return pairs
        with self.accelerator.autocast():
            return pairs.with_features(chat)

    # ----------------------------------------------------------------------------------------------------------- loss

    def _step_sums(self, batches: list[Batch]) -> torch.Tensor:
        """The pairs of a step."""
        return torch.tensor([sum(map(count_pairs, batches))], dtype=torch.float64)

    def _begin_step(self, batches: list[Batch], sums: torch.Tensor) -> None:
        self._pairs_of_step = float(sums)
        self._shift_is_found = False
        several = len(batches) > 1 and self.preference.quality_weight > 0
        self._ahead = batches if several and self.preference.exact_reward_shift else []

    def training_step(self, model: nn.Module, inputs: Batch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As the parent's; before the first of several micro-batches their rewards are found.

        Not in `get_batch_samples`: a resumed run has not got its random state back there.
        """
        if self._ahead:
            self._find_rewards(model)
        return super().training_step(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _find_rewards(self, model: nn.Module) -> None:
        """Updates the shift with the rewards of all micro-batches; they keep the reference's values."""
        batches, self._ahead = self._ahead, []
        model.train()
        optimizer: Any = self.optimizer
        if callable(getattr(optimizer, "train", None)):  # schedule-free optimisers have weights for training
            optimizer.train()
        found = []
        with _same_random_numbers_again(self.args.device), self.compute_loss_context_manager():
            for batch in batches:
                pairs = self._taken_apart(model, self._prepare_inputs(batch))
                reference = self._reference_of(model, pairs)
                found.append(rewards(pairs.score(model).answers, reference, self.preference.beta))
                batch["reference_log_probs"] = reference.reshape(-1, 2)
        self._update_shift(torch.cat(found))
        self._shift_is_found = True

    def _update_shift(self, values: torch.Tensor) -> None:
        own = torch.stack([values.detach().double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
        total, count = self._sum_over_ranks(own.cpu(), self.args.device).tolist()
        self.shift.update(total, count)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The part of a micro-batch in the loss of its step, times the number of ranks (as the parent's).

        Args:
            model: The policy, wrapped.
            inputs: A batch of `PreferenceCollator`.
            return_outputs: Return the policy's `Scores` too.
            num_items_in_batch: Sum of the label weights of the step; None: the batch stands alone.
        """
        terms, scores = self._terms(model, inputs, updates=model.training)
        self._terms_since_log += terms.sums()
        alone = num_items_in_batch is None
        pairs = len(terms.preference) if alone else self._pairs_of_step
        loss = terms.loss(self.preference, pairs, terms.weight if alone else float(num_items_in_batch))
        if not alone:  # gradients are averaged over ranks
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, scores) if return_outputs else loss

    def _terms(
        self, model: nn.Module, inputs: Batch, kept: Sequence[bool] | None = None, updates: bool = False
    ) -> tuple[PairTerms, Scores]:
        """Terms of a batch and the policy's scores.

        Args:
            model: The policy, wrapped.
            inputs: On its device.
            kept: Which pairs count; None for all.
            updates: Update the shift with the rewards of the batch, unless those of the step have been found.
        """
        pairs = self._taken_apart(model, inputs)
        reference = self._reference_of(model, pairs)
        scores = pairs.score(model)
        if updates and not self._shift_is_found:
            self._update_shift(rewards(scores.answers, reference, self.preference.beta))
        text = _chat_model(self.accelerator.unwrap_model(model)).config.get_text_config()
        coefficient = getattr(text, "router_aux_loss_coef", 0.0)
        terms = PairTerms.of(pairs, scores, reference, self.shift.value, self.preference, coefficient, kept)
        return terms, scores

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the parent's; training entries get the means over pairs since the last one."""
        if "loss" in logs:
            sums, self._terms_since_log = self._terms_since_log, no_sums()
            means = mean_metrics(self._sum_over_ranks(sums, self.args.device), self.preference)
            logs = {**means, **logs, "reward_shift": self.shift.value}
        super().log(logs, *args, **kwargs)


def _refuse(args: InternVLTrainingArguments, options: dict[str, Any]) -> None:
    for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
        if options.get(name) is not None:
            raise ValueError(f"{name} is not supported by MPOTrainer, which makes no logits: leave it out")
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(f"{name} would cast weights that the reference shares: turn it off; bf16 is enough")


def _chat_model(model: Any) -> InternVLChatModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _sees_the_same(model: InternVLChatModel) -> bool:
    """Whether nothing that is trained, nor anything random, comes before the visual features."""
    parts = (model.vision_model, model.mlp1)
    return not any(part.training or any(p.requires_grad for p in part.parameters()) for part in parts)


@contextmanager
def _same_random_numbers_again(device: torch.device) -> Iterator[None]:
    """Afterwards the random state is what it was, so that what is drawn inside is drawn again."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
        return
    index = torch.accelerator.current_device_index() if device.index is None else device.index
    with torch.random.fork_rng(devices=[index], device_type=device.type):
        yield
