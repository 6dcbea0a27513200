"""Trainer whose loss is exact: a weighted mean over the global batch, however it is cut into micro-batches and ranks.

With weights w of `losses_internvl.length_to_weight`, a step minimises sum(w x CE) / sum(w) over everything that goes
into it. The original divides inside every micro-batch and averages the quotients: there, the cut matters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..losses_internvl import IGNORE_INDEX, shift_targets
from .arguments import InternVLTrainingArguments
from .collation import InternVLCollator

Batch = dict[str, Any]
_MODULES = ("vision_model", "language_model", "mlp1")


def freeze_modules(model: nn.Module, args: InternVLTrainingArguments) -> None:
    """Turns gradients off in the modules that `args.freeze_*` names; those of the others stay as they are.

    Raises:
        ValueError: no parameter would be trained.
    """
    for name, frozen in zip(_MODULES, (args.freeze_backbone, args.freeze_llm, args.freeze_mlp), strict=True):
        if frozen:
            getattr(model, name).requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("freeze_backbone, freeze_llm and freeze_mlp leave no parameter to train")


def label_weight(batch: Batch) -> torch.Tensor:
    """Sum of the weights of a batch's targets, those the shifted loss really uses: float32 scalar.

    Args:
        batch: `labels` (B, L) and optionally `loss_weight` (B, L); without weights every label counts 1.
    """
    return shift_targets(batch["labels"], batch.get("loss_weight")).weights.sum()


class InternVLTrainer(Trainer):
    """Trains an `InternVLChatModel` on batches of `InternVLCollator`.

    The model divides by `num_items_in_batch`, here the sum of weights over all micro-batches and ranks; `Trainer`
    multiplies by the number of ranks, which cancels the mean that DistributedDataParallel takes of the gradients
    (transformers 5.23, `trainer.py`, `compute_loss`).

    Args:
        model: The model; `args.freeze_*` are applied to it.
        args: Settings.
        data_collator: None for an `InternVLCollator` from `processing_class`, the model and `args`.
        processing_class: Processor or tokenizer; saved with every checkpoint.
        image_processor: Saved with every checkpoint too, where `processing_class` is a tokenizer.
        **kwargs: As for `Trainer`.

    Raises:
        ValueError: several GPUs in one process, or everything is frozen.
    """

    args: InternVLTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: InternVLTrainingArguments,
        data_collator: Any = None,
        *,
        processing_class: Any = None,
        image_processor: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError("one process drives several GPUs; start one per GPU: torchrun --nproc-per-node N ...")
        freeze_modules(model, args)
        if data_collator is None and processing_class is not None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            data_collator = InternVLCollator(tokenizer.pad_token_id, model.config.image_size, args.loss_reduction)
        super().__init__(model, args, data_collator, processing_class=processing_class, **kwargs)
        self.image_processor = image_processor
        self._eval_sums = [0.0, 0.0]

    # ------------------------------------------------------------------------------------------------------ exact loss

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """The micro-batches of one step and the sum of their label weights over all ranks.

        Raises:
            ValueError: that sum is 0, so the step has nothing to learn from.
        """
        batches, total = super().get_batch_samples(epoch_iterator, num_batches, device)
        if total is not None and not bool(total > 0):
            raise ValueError(
                f"step {self.state.global_step + 1} has no supervised token in any micro-batch of any rank: every "
                "label is -100. Check that the template matches the tokenizer and that answers are not empty."
            )
        return batches, total

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | None:
        if not batch_samples or batch_samples[0].get("labels") is None:
            return None
        total = torch.stack([label_weight(batch).to(device) for batch in batch_samples]).sum()
        if self.args.world_size > 1:
            total = self.accelerator.gather(total).sum()
        # Ranks that split one batch between them counted it once each.
        return total / (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())

    # ------------------------------------------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the parent's, with a loss that is the weighted mean over all targets, not a mean of batch means."""
        self._eval_sums = [0.0, 0.0]
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        sums = torch.tensor(self._eval_sums, device=self.args.device)
        loss, weight = self.accelerator.reduce(sums, reduction="sum").tolist()
        if weight > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = loss / weight
        return output

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Batch,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """Loss of one batch, for `evaluation_loop` to add up; logits only where somebody wants them."""
        if inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs({**inputs, "labels": self._without_repeats(inputs["labels"])})
        weight = label_weight(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            one = torch.ones((), device=weight.device)
            outputs = model(**inputs, num_items_in_batch=one, output_logits=not prediction_loss_only)
        loss_sum = outputs.loss.detach().float()
        self._eval_sums[0] += loss_sum.item()
        self._eval_sums[1] += weight.item()
        loss = loss_sum / weight.clamp(min=torch.finfo(torch.float32).tiny)
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits.detach(), inputs["labels"])

    def _without_repeats(self, labels: torch.Tensor) -> torch.Tensor:
        """Masks the rows that accelerate repeats to give every rank a full last batch (as `gather_for_metrics`)."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return labels
        first = self.args.process_index * len(labels)
        kept = max(0, min(len(labels), state.remainder - first))
        return torch.cat([labels[:kept], torch.full_like(labels[kept:], IGNORE_INDEX)])

    # ------------------------------------------------------------------------------------------ optimiser, checkpoints

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As the parent's; `vision_lr` and `mlp_lr` get parameter groups of their own."""
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        rates = {"vision_model.": self.args.vision_lr, "mlp1.": self.args.mlp_lr}
        if fresh and any(rate is not None for rate in rates.values()):
            named = (self.model if model is None else model).named_parameters()
            chosen = {key: rate for key, rate in rates.items() if rate is not None}
            by_id = {id(p): rate for name, p in named for key, rate in chosen.items() if key in name}
            optimizer.param_groups[:] = [part for group in optimizer.param_groups for part in _split(group, by_id)]
        return optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the parent's, which has the model's `load_state_dict` translate names on disk; shards all at once."""
        if not self._load_shards(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """As the parent's, which would go on with the last weights if those of the best checkpoint were not there.

        Raises:
            FileNotFoundError: the best checkpoint has no weights.
        """
        folder = self.state.best_model_checkpoint
        if self._load_shards(folder):
            return
        if not self._has_own_format() and not [*Path(folder).glob("*.safetensors"), *Path(folder).glob("*.bin")]:
            raise FileNotFoundError(
                f"the best checkpoint {folder} has no weights on this machine; was it deleted? On several machines "
                "without a shared disk set save_on_each_node=True"
            )
        super()._load_best_model()

    def _has_own_format(self) -> bool:
        """Whether checkpoints are written by something else than `save_pretrained` of the whole model."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled or hasattr(self.model, "peft_config")

    def _load_shards(self, folder: str) -> bool:
        """Loads a sharded checkpoint, False if it is none.

        The parent takes one file after the other, but a fused weight may need tensors of two (the experts of a
        Qwen3-MoE layer), and compares names on disk with those in memory.
        """
        index = Path(folder, SAFE_WEIGHTS_INDEX_NAME)
        if self._has_own_format() or not index.is_file():
            return False
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        weights = {name: tensor for file in files for name, tensor in load_file(index.parent / file).items()}
        self._issue_warnings_after_load(self.model.load_state_dict(weights, strict=False))
        return True

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuses a checkpoint that does not restore every weight; the parent would go on with the wrong ones."""
        tied = set(getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", None) or ())
        missing = [key for key in load_result.missing_keys if key not in tied]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"the checkpoint does not fit the model: missing {missing[:5]} ({len(missing)} in all), unexpected "
                f"{load_result.unexpected_keys[:5]} ({len(load_result.unexpected_keys)} in all)"
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.image_processor is not None and self.args.should_save:
            self.image_processor.save_pretrained(os.fspath(output_dir or self.args.output_dir))


def _split(group: dict[str, Any], rates: dict[int, float]) -> list[dict[str, Any]]:
    """A parameter group cut by learning rate; `rates` maps ids of parameters, all others keep the group's."""
    parts: dict[float, list[nn.Parameter]] = {}
    for parameter in group["params"]:
        parts.setdefault(rates.get(id(parameter), group["lr"]), []).append(parameter)
    return [{**group, "params": parameters, "lr": rate} for rate, parameters in parts.items()]
