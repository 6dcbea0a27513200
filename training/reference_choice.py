"""Which reference a run compares with: its settings and its model decide.

The kinds themselves are in `reference` and `reference_pass`.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .preference_arguments import PreferenceArguments
from .reference import AdapterReference, FrozenReference, frozen_copy, load_reference
from .reference_pass import PrecomputedReference

Reference = FrozenReference | AdapterReference | PrecomputedReference


def make_reference(trainer: Any, preference: PreferenceArguments, adapters_given: bool) -> Reference:
    """The reference of a run whose model has its starting weights.

    Args:
        trainer: An `mpo.MPOTrainer` that has prepared its model for tuning.
        preference: `reference_path`, `precompute_reference`, `reference_cache`.
        adapters_given: The model came with adapters. They belong to the reference then, so that switching them off
            would give another one; a frozen copy shares the weights below them.

    Raises:
        ValueError: the weights are not in this process, or rows or checkpoint do not fit.
        ImportError: DeepSpeed or FSDP without trl.
    """
    path = preference.reference_path
    module = None if path is None else load_reference(path, trainer.model)
    if preference.precompute_reference:
        reference = PrecomputedReference(trainer, preference, module, adapters_given)
        trainer.add_callback(_MakeWhenSharded(trainer, reference))
        return reference
    if module is not None:
        return FrozenReference(module, trainer, same_vision=False)
    if hasattr(trainer.model, "peft_config") and not adapters_given:
        return AdapterReference(trainer)
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    return FrozenReference(frozen_copy(trainer.model, share=not sharded), trainer, same_vision=True)


class _MakeWhenSharded(TrainerCallback):
    """Makes precomputed values where only the prepared model can run, under DeepSpeed and FSDP."""

    def __init__(self, trainer: Any, reference: PrecomputedReference) -> None:
        self.trainer, self.reference = trainer, reference

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            self.reference.make(self.trainer.model_wrapped, fresh=state.global_step == 0)
