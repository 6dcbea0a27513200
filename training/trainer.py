"""Trainer whose loss is exact: a weighted mean over the global batch, however it is cut into micro-batches and ranks.

With weights w of `losses_internvl.length_to_weight`, a step minimises sum(w x CE) / sum(w) over everything that goes
into it. The original divides inside every micro-batch and averages the quotients: there, the cut matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback

from ..data.dataset import ConversationDataset
from .accounts import RunAccounts
from .arguments import InternVLTrainingArguments
from .checkpoints import WholeCheckpoints, find_last_checkpoint
from .collation import InternVLCollator
from .evaluation import Batch, ExactEvaluation, label_weight
from .interrupts import SaveOnSignal
from .loading import RunPlan, check_kind, make_loader, plan_run
from .packed_attention import attention_by_row
from .parameters import parameter_groups
from .progress import RunProgress
from .tuning import prepare_for_tuning

__all__ = ["InternVLTrainer", "find_last_checkpoint", "label_weight"]


class InternVLTrainer(ExactEvaluation, WholeCheckpoints, Trainer):
    """Trains an `InternVLChatModel` on batches of `InternVLCollator`.

    The model divides by `num_items_in_batch`, here the sum of weights over all micro-batches and ranks; `Trainer`
    multiplies by the number of ranks, which cancels the mean that DistributedDataParallel takes of the gradients
    (transformers 5.23, `trainer.py`, `compute_loss`).

    A `ConversationDataset` is planned (`loading.plan_run`): every row once an epoch, packed or in padded batches,
    the same after a resumption, on any number of loading workers. Other data sets are sampled by `Trainer`.

    Ctrl-C and SIGTERM save a checkpoint after the step and end the training.

    Args:
        model: The model; prepared as `args` says (`tuning.prepare_for_tuning`) unless it has adapters already.
        args: Settings.
        data_collator: None for an `InternVLCollator` from `processing_class`, the model and `args`.
        processing_class: Processor or tokenizer; saved with every checkpoint.
        image_processor: Saved with every checkpoint too, where `processing_class` is a tokenizer.
        max_skip_share: Share of unusable rows of a data set past which the run stops, see `RunAccounts`.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: several GPUs in one process, everything is frozen, or the data set is one of pairs.
    """

    args: InternVLTrainingArguments
    collator_class: type[InternVLCollator] = InternVLCollator
    takes_pairs = False

    def __init__(
        self,
        model: nn.Module,
        args: InternVLTrainingArguments,
        data_collator: Any = None,
        *,
        processing_class: Any = None,
        image_processor: Any = None,
        max_skip_share: float = 0.01,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError("one process drives several GPUs; start one per GPU: torchrun --nproc-per-node N ...")
        for name in ("train_dataset", "eval_dataset"):
            check_kind(name, kwargs.get(name), type(self).__name__, self.takes_pairs)
        if not hasattr(model, "peft_config"):
            model = prepare_for_tuning(model, args)
        if args.use_liger_kernel:
            _use_liger(model, args)
        eval_collator = data_collator
        if data_collator is None and processing_class is not None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            basics = tokenizer.pad_token_id, model.config.image_size, args.loss_reduction
            eval_collator = self.collator_class(*basics)
            data_collator = self.collator_class(
                *basics, packing=args.packing, max_packed_tokens=args.max_packed_tokens if args.packing else None
            )
        super().__init__(model, args, data_collator, processing_class=processing_class, **kwargs)
        self.image_processor = image_processor
        self._eval_collator = eval_collator
        self._eval_sums = [0.0, 0.0, 0.0]
        self.plan = self._plan()
        self.accounts = RunAccounts(self._entries(), max_skip_share, self.plan and self.plan.fingerprint)
        for row, copies in self.plan.left_out if self.plan else ():
            self.accounts.leave_out(row, copies)
        self._signals = SaveOnSignal()
        self._add_callbacks()

    def _plan(self) -> RunPlan | None:
        planned = isinstance(self.train_dataset, ConversationDataset)
        if planned and self.args.train_sampling_strategy != "sequential":
            return plan_run(self.train_dataset, self.args)
        if self.args.packing and self.train_dataset is not None:
            raise ValueError(
                "packing needs a ConversationDataset to plan, and train_sampling_strategy other than 'sequential'"
            )
        return None

    def _entries(self) -> dict[str, int]:
        if self.plan is not None:
            return self.plan.entries
        if hasattr(self.train_dataset, "source_sizes"):
            return self.train_dataset.source_sizes()
        return {"dataset": len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else 0}

    def _add_callbacks(self) -> None:
        for callback in (self.accounts, self._signals):
            self.add_callback(callback)
        if self.plan is not None:
            self.add_callback(_SetEpoch(self.plan))
        if any(type(callback) is ProgressCallback for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(RunProgress)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the parent's; `True` continues from the last checkpoint that was written to its end.

        Raises:
            ValueError: there is none.
            TooManySkippedError: too many rows cannot be used.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = find_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"{self.args.output_dir} has no complete checkpoint to resume from")
        if resume_from_checkpoint is not None and resume_from_checkpoint is not False:
            resume_from_checkpoint = str(resume_from_checkpoint)
        with ExitStack() as stack:
            stack.callback(self._signals.restore)
            for language_model in self._read_packs() if self.args.packing else ():
                stack.enter_context(attention_by_row(language_model))
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def _read_packs(self) -> list[Any]:
        """The language models that training runs packs through."""
        return [_base(self.model).language_model]

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the last training."""
        return self._signals.agreed

    # -------------------------------------------------------------------------------------------------------- batches

    def get_train_dataloader(self) -> Any:
        """The planned batches of this rank, or the parent's."""
        if self.plan is None:
            return super().get_train_dataloader()
        loader = make_loader(self.train_dataset, self.plan.sampler, self.data_collator, self.args)
        return self.accelerator.prepare(loader)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As the parent's; evaluation never packs."""
        return self._unpacked(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As the parent's; prediction never packs."""
        return self._unpacked(super().get_test_dataloader, test_dataset)

    def _unpacked(self, make: Any, dataset: Any) -> Any:
        collator, self.data_collator = self.data_collator, self._eval_collator or self.data_collator
        try:
            return make(dataset)
        finally:
            self.data_collator = collator

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | None]:
        """The micro-batches of one step and the sum of their label weights over all ranks.

        One small vector tells every rank that sum, the counts of the step and whether a rank was asked to stop.

        Raises:
            ValueError: the sum is 0, so the step has nothing to learn from.
            TooManySkippedError: too many rows cannot be used.
        """
        batches = list(islice(epoch_iterator, num_batches))
        labelled = bool(batches) and batches[0].get("labels") is not None
        weight = sum(float(label_weight(batch)) for batch in batches) if labelled else 0.0
        own = torch.tensor([weight, self._signals.requested], dtype=torch.float64)
        further = self._step_sums(batches)
        vector = self._sum_over_ranks(torch.cat([own, further, self.accounts.take(batches)]), device)
        self._signals.agreed = bool(vector[1] > 0)
        self._begin_step(batches, vector[2 : 2 + len(further)])
        self.accounts.add(vector[2 + len(further) :])
        if not labelled:
            return batches, None
        if not vector[0] > 0:
            raise ValueError(
                f"step {self.state.global_step + 1} has no supervised token in any micro-batch of any rank: every "
                "label is -100. Check that the template matches the tokenizer and that answers are not empty."
            )
        return batches, vector[0].to(torch.float32).to(device)

    def _step_sums(self, batches: list[Batch]) -> torch.Tensor:
        """Further sums over the micro-batches of a step, float64 (n,), to be added up over ranks."""
        return torch.zeros(0, dtype=torch.float64)

    def _begin_step(self, batches: list[Batch], sums: torch.Tensor) -> None:
        """Takes the micro-batches of a step and what `_step_sums` gave, over all ranks."""

    def _sum_over_ranks(self, vector: torch.Tensor, device: torch.device) -> torch.Tensor:
        if self.args.world_size == 1:
            return vector
        total = self.accelerator.reduce(vector.to(device), reduction="sum").cpu()
        # Ranks that split one batch between them counted it once each.
        return total / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    def _prepare_inputs(self, inputs: Batch) -> Batch:
        """As the parent's; DeepSpeed and FSDP cast every floating tensor to bfloat16, but not a list."""
        for name in ("loss_weight", "reference_log_probs"):
            if self._casts_inputs() and isinstance(inputs.get(name), torch.Tensor):
                inputs = {**inputs, name: inputs[name].tolist()}
        return super()._prepare_inputs(inputs)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As the parent's, with a normaliser that nothing casts."""
        if self._casts_inputs() and num_items_in_batch is not None:
            num_items_in_batch = float(num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _casts_inputs(self) -> bool:
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    # --------------------------------------------------------------------------------------------- optimiser, logging

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the parent's; a learning rate per part of the model, and no decay of the 6B encoder's norms."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and len(optimizer.param_groups) <= 2:  # more: an optimiser with groups of its own
            settings = optimizer.param_groups[0]
            groups = parameter_groups(self.model if model is None else model, self.args)
            optimizer.param_groups[:] = [{**settings, **group} for group in groups]
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the parent's; training entries get tokens a second, packing efficiency and skipped rows."""
        super().log({**logs, **self.accounts.rates()} if "loss" in logs else logs, *args, **kwargs)


def _base(model: Any) -> Any:
    """The model without adapters around it."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _use_liger(model: nn.Module, args: InternVLTrainingArguments) -> None:
    """Puts Liger's kernels into the language model; the parent would look for them by the name of the whole.

    Its fused loss stays off, because the loss here is weighted and taken from supervised positions alone.
    """
    from transformers.integrations.liger import apply_liger_kernel

    losses = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    apply_liger_kernel(_base(model).language_model, {**(args.liger_kernel_config or {}), **losses})


class _SetEpoch(TrainerCallback):
    """Tells the sampler the epoch; accelerate's wrappers do not always."""

    def __init__(self, plan: RunPlan) -> None:
        self.sampler = plan.sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))
