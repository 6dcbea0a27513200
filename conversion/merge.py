"""Adapters merged into the weights that they adapt: `merge` writes a plain checkpoint with the base's settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint_internvl import CheckpointError, scan_weights
from ..weights_internvl import holds_lora
from .convert import ConversionReport, upgrade
from .folders import refuse_same, resolve

_ADAPTER = "adapter_config.json"


def merge(
    name_or_path: str | Path, target: str | Path, base: str | Path | None = None, **options: Any
) -> ConversionReport:
    """Merges adapters and writes a checkpoint as `upgrade` does.

    Two kinds are understood: original checkpoints with adapters inside their weights (`use_backbone_lora` or
    `use_llm_lora` > 0), which are merged tensor by tensor, and PEFT adapter folders, for which the base is loaded into
    memory and PEFT merges. The result has the base's configuration but for the two LoRA fields, and for what the
    run changed of it (`training.merging.merge_adapter_folder`).

    Args:
        name_or_path: A folder or a Hub repository; never changed.
        target: Must be absent or empty.
        base: Of a PEFT adapter; None takes the one that the adapter names.
        **options: As for `upgrade`.

    Raises:
        CheckpointError: there is no adapter, or the base is unknown or does not fit.
        ValueError: `base` is given for a checkpoint that carries its own.
    """
    hub = {key: options[key] for key in ("revision", "cache_dir", "token", "local_files_only") if key in options}
    folder = resolve(name_or_path, **hub)
    refuse_same(folder, target)
    if (folder / _ADAPTER).is_file():
        from ..training.merging import merge_adapter_folder  # rebuilds the model as it was built for training

        return merge_adapter_folder(folder, target, base, **{k: v for k, v in options.items() if k not in hub})
    if base is not None:
        raise ValueError(f"{folder} carries its own base weights: leave base out.")
    if not holds_lora(scan_weights(folder).checked().tensors):
        raise CheckpointError(f"{folder} has no adapter, neither {_ADAPTER} nor LoRA tensors: nothing to merge.")
    return upgrade(name_or_path, target, **options)
