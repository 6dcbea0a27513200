"""What would make a training run take less memory, each change with its estimate.

Only changes that `RunSettings` can express; whether a change is worth it (frozen parts learn nothing) is the user's to
judge. They are ordered by how little they change about the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..configuration_internvl_chat import InternVLChatConfig
from .estimate import OVERHEAD, MemoryEstimate, estimate
from .memory_settings import RunSettings


def suggestions(
    config: InternVLChatConfig, settings: RunSettings, overhead: int = OVERHEAD
) -> list[tuple[str, MemoryEstimate]]:
    """Changes that take less memory, those that change the least about the run first, each with its estimate."""
    before = estimate(config, settings, overhead).total
    found, seen = [], {settings}
    for label, changes in _changes(config, settings):
        try:
            changed = replace(settings, **changes)
            if changed in seen:
                continue
            seen.add(changed)
            result = estimate(config, changed, overhead)
        except ValueError:  # this model or these settings do not allow it
            continue
        if result.total < before:
            found.append((label, result))
    return found


def _changes(config: InternVLChatConfig, settings: RunSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    lora = _lora(config, settings)
    small: dict[str, Any] = {"gradient_checkpointing": True, "attn_implementation": settings.attn_implementation}
    if not settings.gradient_checkpointing:
        yield "gradient checkpointing", {"gradient_checkpointing": True}
    if settings.packing or settings.rows > 1:
        small["attn_implementation"] = "flash_attention_2"
        yield "flash attention, which needs no mask", {"attn_implementation": "flash_attention_2"}
    if settings.rows > 1:
        small |= {"per_device_train_batch_size": 1}
        steps = settings.gradient_accumulation_steps * settings.rows
        changes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": steps}
        yield f"one {'pair' if settings.pairs else 'row'} at a time, {steps} accumulation steps", changes
    if settings.reference is not None:
        yield "precomputed reference values", {"reference": None}
    yield from _sharded(settings)
    if not settings.sharded and settings.optim.startswith("adamw_torch"):
        yield "optim adamw_bnb_8bit", {"optim": "adamw_bnb_8bit"}
    if settings.tiles > 1:
        tiles = settings.tiles // 2
        dropped = settings.places - replace(settings, tiles=tiles).places
        tokens = settings.tokens - sum(config.tokens_per_tile(dropped))
        yield f"{tiles} tiles, {tokens} tokens", {"tiles": tiles, "tokens": tokens, "supervised": None}
    frozen = {"freeze_backbone": True, "unfreeze_vit_layers": None, "use_backbone_lora": 0}
    yield "frozen vision encoder", frozen
    rank = lora["use_llm_lora"]
    yield f"LoRA of rank {rank} on the language model alone", lora
    if not settings.shards_weights:
        yield f"QLoRA: the same, rank {rank}, over nf4 weights", {**lora, "quantization": "nf4"}
        yield "QLoRA, checkpointing, one row at a time", {**small, **lora, "quantization": "nf4"}


def _sharded(settings: RunSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    devices = settings.devices if settings.devices > 1 else 8
    more = "" if settings.devices > 1 else f" on {devices} devices"
    if settings.quantization is None and "8bit" not in settings.optim:
        for kind in ("zero1", "zero2", "zero3"):
            yield f"{kind}{more}", {"sharding": kind, "devices": devices}


def _lora(config: InternVLChatConfig, settings: RunSettings) -> dict[str, Any]:
    """As in the recipes of the second fine-tune; adapters switched off are their own reference."""
    text = config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    changes = {
        "freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True, "unfreeze_vit_layers": None,
        "use_backbone_lora": 0, "use_mlp_lora": 0, "use_llm_lora": settings.use_llm_lora or 16, "reference": None,
    }  # fmt: skip
    return {**changes, "lora_dropout": 0.0} if experts else changes
