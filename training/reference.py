"""The reference of preference optimisation: what the log-probability of an answer is compared with.

A frozen copy of the starting weights, the model below its adapters, or another checkpoint; `reference_choice` decides,
and `reference_pass` has values from the disk instead. A reference runs in evaluation mode, without gradient, and
draws no random number.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..modeling_internvl_chat import InternVLChatModel
from .frozen import release
from .preference_batch import PairBatch


def frozen_copy(model: nn.Module, share: bool = True) -> nn.Module:
    """The model as it is now, in evaluation mode, with nothing to train.

    Args:
        model: With adapters or without; left as it is.
        share: Use the parameters that `model` does not train themselves instead of copies of them, so that the copy
            costs as much memory as what is trained.

    Raises:
        ValueError: the weights are not in this process, so that there is nothing to copy.
    """
    if any(parameter.is_meta or hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(
            "the reference cannot be a copy, because the model's weights are elsewhere (ZeRO-3, or FSDP with "
            "cpu_ram_efficient_loading): set preference.reference_path to the checkpoint that training starts from"
        )
    memo = {id(parameter): parameter for parameter in model.parameters() if share and not parameter.requires_grad}
    copied = copy.deepcopy(model, memo)  # type: ignore[arg-type]
    return freeze(copied)


def freeze(model: nn.Module) -> nn.Module:
    """`model` for good in evaluation mode and without gradients."""
    release(model)
    return model.eval().requires_grad_(False)


def load_reference(path: str, like: Any) -> nn.Module:
    """The checkpoint at `path` with dtype and attention of `like`.

    Raises:
        ValueError: it is a PEFT adapter, or it reads other ids or tiles than `like`.
    """
    from .arguments import ModelArguments  # building needs what only training from a recipe does
    from .building import build

    dtype = str(like.dtype).removeprefix("torch.")
    attention = like.config.get_text_config()._attn_implementation
    model = build(ModelArguments(model_name_or_path=path, dtype=dtype, attn_implementation=attention)).model
    for name in ("img_context_token_id", "image_size", "downsample_ratio"):
        own, other = getattr(like.config, name), getattr(model.config, name)
        if own != other:
            raise ValueError(
                f"reference_path={path} has {name}={other}, the model {own}: they must read the same inputs"
            )
    return freeze(model)


class FrozenReference:
    """A model of its own: a frozen copy, or another checkpoint.

    Args:
        module: In evaluation mode, from `frozen_copy` or `load_reference`.
        trainer: Gives the device, autocast, and DeepSpeed or FSDP.
        same_vision: Vision encoder and projector are those of the model in training while they are not trained.
    """

    def __init__(self, module: nn.Module, trainer: Any, same_vision: bool) -> None:
        self.same_vision = same_vision
        self.trainer = trainer
        self.module = _prepared(module, trainer)

    def log_probs(self, model: nn.Module, batch: PairBatch) -> torch.Tensor:
        """(2P,) of the answers; `model`, the one in training, is not used."""
        with torch.no_grad(), self.trainer.accelerator.autocast():
            return batch.score(self.module).answers

    @property
    def language_models(self) -> list[Any]:
        """Those that read packs beside the one in training."""
        return [_chat_model(self.trainer.accelerator.unwrap_model(self.module)).language_model]


class AdapterReference:
    """The model in training with its adapters switched off, parts that are trained whole (`modules_to_save`) too.

    It costs no memory. The model must have started with adapters that do nothing, as fresh ones do.
    """

    same_vision = True
    language_models: list[Any] = []

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def log_probs(self, model: nn.Module, batch: PairBatch) -> torch.Tensor:
        """(2P,) of the answers."""
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), without_adapters(self.trainer.accelerator.unwrap_model(model)):
                return batch.score(model).answers
        finally:
            model.train(training)


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """As `PeftModel.disable_adapter`, but what is trained stays so, inside and afterwards.

    Without gradient it makes no difference to the result; FSDP, however, would note what requires one at its first
    forward pass, and later leave out what did not.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            _require(trained)
            yield
    finally:
        _require(trained)


def _require(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


def _chat_model(model: Any) -> InternVLChatModel:
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _prepared(module: nn.Module, trainer: Any) -> nn.Module:
    """The module on its device, or sharded as the model in training is."""
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        return module.to(trainer.args.device)
    try:
        from trl.models import prepare_deepspeed, prepare_fsdp
    except ImportError as error:
        raise ImportError("a reference model under DeepSpeed or FSDP needs trl: pip install trl") from error
    prepare: Any = prepare_deepspeed if trainer.is_deepspeed_enabled else prepare_fsdp
    return prepare(module, trainer.accelerator)
