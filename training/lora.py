"""Low-rank adapters (LoRA, arXiv 2106.09685) on a model: which layers of each part get them, and with what rank.

PEFT adds and saves them. Freezing the rest is `tuning`, merging them into the weights `merging`.
"""

from __future__ import annotations

import re

from torch import nn

from ..modeling_internvl_chat import InternVLChatModel
from .arguments import InternVLTrainingArguments
from .parts import named_decoder_layers

# Names of layers that choose experts: they stay as they are.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_VISION_TARGETS = r"vision_model\.encoder\.layers\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])"
_PROJECTOR_TARGETS = r"mlp1\.[13]"


def add_lora(
    model: InternVLChatModel, args: InternVLTrainingArguments, ranks: dict[str, int], whole: list[str]
) -> nn.Module:
    """The `PeftModel` around `model`: one `LoraConfig` for all parts; where their ranks differ, patterns say so.

    Args:
        model: Frozen; changed in place.
        args: `lora_alpha` (None: twice the rank of each part) and `lora_dropout`.
        ranks: Of every part; 0 for none, not for all.
        whole: Names of modules that are trained themselves; they become `modules_to_save`.

    Raises:
        ImportError: peft is missing.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("use_*_lora needs peft: pip install peft") from error
    targets = {
        "vision_model": _VISION_TARGETS,
        "mlp1": _PROJECTOR_TARGETS,
        "language_model": _language_targets(model),
    }
    used = {part: rank for part, rank in ranks.items() if rank}
    alphas = {part: 2 * rank if args.lora_alpha is None else args.lora_alpha for part, rank in used.items()}
    first, *others = used
    config = LoraConfig(
        r=used[first],
        lora_alpha=alphas[first],  # type: ignore[arg-type]  # any number does
        rank_pattern={rf"{part}\..*": used[part] for part in others},
        alpha_pattern={rf"{part}\..*": alphas[part] for part in others},
        lora_dropout=args.lora_dropout,
        target_modules="|".join(targets[part] for part in used),
        target_parameters=(expert_parameters(model) or None) if "language_model" in used else None,
        modules_to_save=whole or None,
    )
    return get_peft_model(model, config)


def _language_targets(model: InternVLChatModel) -> str:
    """A pattern for every linear layer of the decoder but routers and the output head, read off the model itself."""
    inner = set()
    for layer in named_decoder_layers(model).values():
        linear = (name for name, module in layer.named_modules() if isinstance(module, nn.Linear))
        inner |= {name for name in linear if name.rpartition(".")[2] not in _ROUTERS}
    prefixes = {name.rpartition(".")[0] for name in named_decoder_layers(model)}
    names, before = ("|".join(map(re.escape, sorted(found))) for found in (inner, prefixes))
    return rf"(?:{before})\.\d+\.(?:{names})"


def expert_parameters(model: InternVLChatModel) -> list[str]:
    """Names, within a layer, of experts that transformers 5 holds as one parameter (E, ., .) of a module."""
    named = [item for layer in named_decoder_layers(model).values() for item in layer.named_parameters()]
    return sorted({name for name, value in named if value.ndim == 3 and not name.endswith(".weight")})
