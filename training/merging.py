"""Adapters merged back into the weights: of a model in memory, or of a PEFT folder into a self-contained checkpoint.

For adapters that an original checkpoint holds inside its own weights see `conversion.merge`, which also calls this.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint_internvl import CheckpointError, read_json
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversion.convert import RUN_FILES, ConversionReport, copy_files, upgrade
from ..conversion.folders import refuse_same, resolve
from ..conversion.tokenizers import FILES
from ..modeling_internvl_chat import InternVLChatModel
from .arguments import ModelArguments
from .building import build
from .frozen import release
from .overrides import OVERRIDES
from .vocabulary import load_own_tokenizer

_ADAPTER = "adapter_config.json"


def merge_adapters(model: nn.Module) -> InternVLChatModel:
    """The plain model with its adapters merged into its weights, nothing frozen.

    Args:
        model: A `PeftModel` from `prepare_for_tuning` or `PeftModel.from_pretrained`; not to be used afterwards. A
            model without adapters is returned as it is.

    Raises:
        ValueError: the weights are quantized, or a merged one is not finite.
    """
    if hasattr(model, "peft_config"):
        quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
        if quantized:
            raise ValueError(
                "merging into quantized weights would round the adapters away: save them and merge them into the "
                "unquantized base (merge_adapter_folder)"
            )
        model = model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    release(model)
    return model.requires_grad_(True).eval()


def merge_adapter_folder(
    adapter: str | Path, target: str | Path, base: str | Path | None = None, **options: Any
) -> ConversionReport:
    """Writes a self-contained checkpoint with the adapters of a PEFT folder merged into their base.

    Its configuration is the base's. Where the adapter folder holds a `config.json` of the model that was trained,
    whose template, tiles or image size differ from the base's, those are taken over, as they were for training. What
    the run says of itself (recipe, report, curve) goes along, for the model card.

    Args:
        adapter: Folder or Hub repository with `adapter_config.json`; parts trained whole are in it too.
        target: Must be absent or empty.
        base: Checkpoint of any layout; None takes the one that the adapter names.
        **options: `max_shard_size`, `overwrite`, `progress` as for `conversion.convert.upgrade`.

    Returns:
        What was written.

    Raises:
        CheckpointError: no adapter, no base, or an adapter that does not fit its base.
        ImportError: peft is missing.
    """
    folder = resolve(adapter)
    if not (folder / _ADAPTER).is_file():
        raise CheckpointError(f"{adapter} has no {_ADAPTER}: it holds no PEFT adapter")
    refuse_same(folder, target)
    base = base or read_json(folder / _ADAPTER).get("base_model_name_or_path")
    if not base:
        raise CheckpointError(f"{folder / _ADAPTER} names no base model: give base")
    base_folder = resolve(base)
    built = build(_base_arguments(folder, base_folder, str(base)))
    model = merge_adapters(_load_adapter(built.model, folder, str(base)))
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.merged.") as merged:
        model.save_pretrained(merged)
        built.processor.save_pretrained(merged)
        _keep_files(base_folder, Path(merged), built.tokenizer)
        copy_files(RUN_FILES, folder, Path(merged))
        return upgrade(merged, target, **options)


def _keep_files(base: Path, merged: Path, tokenizer: Any) -> None:
    """The licence, and the tokenizer as its files are in the base unless training added tokens to it."""
    if (base / "LICENSE").is_file():
        shutil.copyfile(base / "LICENSE", merged / "LICENSE")
    if load_own_tokenizer(base).get_vocab() != tokenizer.get_vocab():
        return
    for name in FILES:
        (merged / name).unlink(missing_ok=True)
        if (base / name).is_file():
            shutil.copyfile(base / name, merged / name)


def _base_arguments(adapter: Path, folder: Path, base: str) -> ModelArguments:
    """How the base was built for training."""
    if not (adapter / "config.json").is_file():
        return ModelArguments(model_name_or_path=base)
    trained, own = (InternVLChatConfig.from_pretrained(place) for place in (adapter, folder))
    changed = {name: getattr(trained, field) for name, field in OVERRIDES.items()
               if getattr(trained, field) != getattr(own, field)}  # fmt: skip
    if trained.vision_config.image_size != own.vision_config.image_size:
        changed["force_image_size"] = trained.image_size
    return ModelArguments(model_name_or_path=base, **changed)


def _load_adapter(model: InternVLChatModel, folder: Path, base: str) -> nn.Module:
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ImportError("merging a PEFT adapter needs peft: pip install peft") from error
    config = PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    try:
        tuned = get_peft_model(model, config)
        report = tuned.load_adapter(str(folder), "default")
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} does not fit {base}: {str(error).splitlines()[0]}") from error
    wrong = [*report.missing_keys, *report.unexpected_keys]
    if wrong:
        raise CheckpointError(f"{folder} does not fit {base}: {wrong[:3]} ({len(wrong)} in all) have no counterpart")
    return tuned
