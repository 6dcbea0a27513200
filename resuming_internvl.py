"""Lets `load_state_dict` take weights under their names on disk, as transformers' Trainer gives them when it resumes.

transformers 5 holds some models under other names and shapes than their files have: the experts of Qwen3-MoE are one
tensor, InternLM2 is a Llama. `from_pretrained` and `save_pretrained` convert; `load_state_dict` does not, and Trainer
calls it with `strict=False`, so that nothing fitted and nothing was restored. A hook closes the gap with the very
conversions of loading. It reads no files, and leaves missing and unexpected names to `load_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)


class IncompleteWeightsError(ValueError):
    """The tensors given for a weight that is stored in several do not make it."""


def accept_disk_names(model: PreTrainedModel, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook for `register_load_state_dict_pre_hook`: translates names on disk, leaves names in memory alone.

    Args:
        model: The model that the hook is registered on.
        state_dict: Changed in place; entries outside `prefix` stay.
        prefix: Of the model inside the module that is loaded.
        *args: The rest of what torch passes to a hook; not used.

    Raises:
        IncompleteWeightsError: see `to_memory_names`.
    """
    own = {key[len(prefix) :]: key for key in state_dict if key.startswith(prefix)}
    if own.keys() <= model.state_dict().keys():
        return
    tensors = {name: state_dict.pop(key) for name, key in own.items()}
    state_dict.update({prefix + name: tensor for name, tensor in to_memory_names(model, tensors).items()})


def to_memory_names(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as it is on disk under the names and in the shapes that a model has in memory.

    The conversions are those that the model was loaded with, else those that transformers has for it. Names that they
    do not lead to a weight of the model pass unchanged.

    Args:
        model: The model; not changed.
        tensors: All of them, or those of one file; a weight must not be cut across files.

    Raises:
        IncompleteWeightsError: parts of a fused weight are missing, or of another size.
    """
    known = model.state_dict()
    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    conversions = deepcopy(conversions)  # they take notes
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    output: dict[str, torch.Tensor] = {}
    fused: dict[str, WeightConverter] = {}
    for key in sorted(tensors, key=dot_natural_key):  # experts by number
        name, pattern = rename_source_key(key, renamings, converters)
        if name in known and pattern is not None:
            converter = fused.setdefault(name, deepcopy(by_pattern[pattern]))
            converter.add_tensor(name, key, pattern, tensors[key])
        else:
            output[name if name in known else key] = tensors[key]
    for name, converter in fused.items():
        output.update(_convert(model, name, converter, known))
    return output


def _convert(
    model: PreTrainedModel, name: str, converter: WeightConverter, known: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What a converter makes of the tensors that it has collected, by name in memory."""
    try:
        made = converter.convert(name, model=model, config=model.config)
    except (RuntimeError, ValueError) as error:  # parts of different number or size cannot be joined
        raise _misfit(model, name, converter, str(error)) from error
    output = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
    for key, value in output.items():
        if key in known and value.shape != known[key].shape:
            shapes = f"its tensors on disk make {tuple(value.shape)}, the model needs {tuple(known[key].shape)}"
            raise _misfit(model, name, converter, shapes)
    return output


def _misfit(model: PreTrainedModel, name: str, converter: WeightConverter, reason: str) -> IncompleteWeightsError:
    shapes = {key: value.to("meta") for key, value in model.state_dict().items()}
    given = converter.layer_targets[name]
    parts = [key for key in revert_weight_conversion(model, shapes) if converter.rename_source_key(key)[0] == name]
    absent = [key for key in parts if key not in given]
    if not absent:
        return IncompleteWeightsError(f"{name} cannot be restored: {reason}. Is this a model of another size?")
    return IncompleteWeightsError(
        f"{name} cannot be restored: {len(absent)} of the {len(parts)} tensors that it is stored in are missing, the "
        f"first is {absent[0]}. The checkpoint is damaged, or this is one file of several: load all of them as one "
        "state dict, as InternVLTrainer does."
    )
