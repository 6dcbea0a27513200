"""Adapters merged into the weights that they adapt: `merge` writes a plain checkpoint with the base's settings."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint_internvl import CheckpointError, read_json, scan_weights
from ..modeling_internvl_chat import InternVLChatModel
from ..weights_internvl import holds_lora
from .convert import ConversionReport, upgrade, write_checkpoint
from .folders import refuse_same, resolve
from .source import open_checkpoint

_ADAPTER = "adapter_config.json"


def merge(
    name_or_path: str | Path, target: str | Path, base: str | Path | None = None, **options: Any
) -> ConversionReport:
    """Merges adapters and writes a checkpoint as `upgrade` does.

    Two kinds are understood: original checkpoints with adapters inside their weights (`use_backbone_lora` or
    `use_llm_lora` > 0), which are merged tensor by tensor, and PEFT adapter folders, for which the base is loaded into
    memory and PEFT merges. The result has the base's configuration but for the two LoRA fields.

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
        return _merge_peft(folder, target, base, options)
    if base is not None:
        raise ValueError(f"{folder} carries its own base weights: leave base out.")
    if not holds_lora(scan_weights(folder).checked().tensors):
        raise CheckpointError(f"{folder} has no adapter, neither {_ADAPTER} nor LoRA tensors: nothing to merge.")
    return upgrade(name_or_path, target, **options)


def _merge_peft(
    adapter: Path, target: str | Path, base: str | Path | None, options: dict[str, Any]
) -> ConversionReport:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ImportError("merging a PEFT adapter needs peft: pip install peft") from error
    base = base or read_json(adapter / _ADAPTER).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{adapter / _ADAPTER} names no base model: give base.")
    source = open_checkpoint(base)
    model = InternVLChatModel.from_pretrained(source.folder)
    try:
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except ValueError as error:
        raise CheckpointError(f"{adapter} does not fit {base}: {str(error).splitlines()[0]}") from error
    with tempfile.TemporaryDirectory(dir=Path(target).resolve().parent, prefix=".merged.") as temporary:
        merged.save_pretrained(temporary)
        source.weights = scan_weights(temporary).checked()
        source.tensors = source.weights.tensors
        return write_checkpoint(source, target, **options)
