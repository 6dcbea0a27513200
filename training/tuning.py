"""What of a model is trained: parts frozen, trained whole, or trained by LoRA, as the arguments of a run say.

Works on any `InternVLChatModel`, whatever its language model; `building` makes it. `lora` adds the adapters, `frozen`
keeps frozen parts quiet and cheap, `parameters` has the learning rates, `merging` the way back to a plain model.
Nothing here steps an optimiser.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

from ..configuration_internvl_chat import InternVLChatConfig
from ..modeling_internvl_chat import InternVLChatModel
from .arguments import InternVLTrainingArguments
from .frozen import cut_graph, hold_frozen_in_eval, release
from .lora import add_lora, expert_parameters
from .parts import PARTS


def prepare_for_tuning(model: InternVLChatModel, args: InternVLTrainingArguments) -> nn.Module:
    """Freezes, adds LoRA and cuts the graph where nothing before it is trained, as `args` says; in place.

    Each of vision encoder, projector and language model is trained by LoRA where its rank is above 0 (its own weights
    are frozen then, whatever `freeze_*` says), frozen where `freeze_*` says so, and trained whole otherwise.
    `unfreeze_vit_layers` trains layers of a frozen encoder: `encoder.layers[unfreeze_vit_layers:]`; 0 means none, as
    in the original. `unfreeze_lm_head` trains the output head of a frozen or LoRA-trained language model (the original
    sets an attribute that has no effect). Encoder layers behind `select_layer` are read by nobody and always frozen.

    Parameters that were frozen by hand before stay frozen (without LoRA).

    Frozen parts stay in evaluation mode when a trainer calls `train()`: no dropout, no drop path. No graph is kept
    for a frozen encoder, also under gradient checkpointing, for which transformers makes the output of every embedding
    (patches included) require a gradient.

    With LoRA anywhere the result is a `PeftModel`. Parts that are trained whole beside it become `modules_to_save`:
    `save_pretrained` then writes one adapter folder that holds everything trained, PEFT reloads it, and a trainer
    resumes exactly. The price is one frozen copy of each such part in memory (of a projector: below 1 % of the model).

    Args:
        model: Whole; may be one that this function prepared before without LoRA.
        args: `freeze_*`, `unfreeze_*`, `use_*_lora`, `lora_*`, gradient checkpointing.

    Returns:
        `model`, or the `PeftModel` around it.

    Raises:
        ValueError: nothing would be trained, or settings contradict each other or the model.
        ImportError: LoRA without peft.
    """
    if hasattr(model, "peft_config"):
        raise ValueError("the model has adapters already: merge them first (merge_adapters), or continue with it")
    by_hand = _frozen_by_hand(model)
    release(model)
    ranks = dict(zip(PARTS, (args.use_backbone_lora, args.use_mlp_lora, args.use_llm_lora), strict=True))
    _check(model, args, ranks)
    whole = _trained_whole(model, args, ranks)
    model.requires_grad_(False)
    if any(ranks.values()):
        tuned = add_lora(model, args, ranks, whole)
    else:
        tuned = model
        for name in whole:
            _unfreeze(model.get_submodule(name))
        for parameter in by_hand:
            parameter.requires_grad_(False)
        model._frozen_by_hand = by_hand
    if not any(parameter.requires_grad for parameter in tuned.parameters()):
        raise ValueError(
            "freeze_backbone, freeze_llm and freeze_mlp leave no parameter to train: turn one off, or set a rank"
        )
    hold_frozen_in_eval(model)
    cut_graph(model, _reentrant(args))
    return tuned


def _frozen_by_hand(model: InternVLChatModel) -> list[nn.Parameter]:
    """Parameters that were frozen before the model was first prepared: whoever did it wants them frozen."""
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    return getattr(model, "_frozen_by_hand", frozen)


def _check(model: InternVLChatModel, args: InternVLTrainingArguments, ranks: dict[str, int]) -> None:
    if negative := [f"{part} {rank}" for part, rank in ranks.items() if rank < 0]:
        raise ValueError(f"a LoRA rank must be 0 (none) or more, got {', '.join(negative)}")
    if args.unfreeze_vit_layers:
        if ranks["vision_model"]:
            raise ValueError("unfreeze_vit_layers and use_backbone_lora exclude one another: choose one")
        layers = model.config.vision_config.num_hidden_layers
        if not -layers <= args.unfreeze_vit_layers < layers:
            raise ValueError(
                f"unfreeze_vit_layers={args.unfreeze_vit_layers}, but the encoder has {layers} layers: give the index "
                f"of the first one to train, {-layers} to {layers - 1}"
            )
        if not args.freeze_backbone:
            raise ValueError("unfreeze_vit_layers needs freeze_backbone: without it the whole encoder is trained")
    quantized = any(not parameter.is_floating_point() for parameter in model.language_model.parameters())
    if quantized and not (args.freeze_llm or ranks["language_model"]):
        raise ValueError("a quantized language model cannot be trained itself: set use_llm_lora or freeze_llm")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    lora, llm_lora = any(ranks.values()), ranks["language_model"]
    if tied and lora and (args.unfreeze_lm_head or not (args.freeze_llm or llm_lora)):
        raise ValueError(
            "input and output embeddings of this language model are tied, and an adapter folder would hold two "
            "copies that part ways: freeze the language model, or train it by LoRA without unfreeze_lm_head"
        )
    if llm_lora and args.lora_dropout and (experts := expert_parameters(model)):
        raise ValueError(
            f"lora_dropout={args.lora_dropout} cannot apply to experts ({', '.join(experts)}), which peft adapts as "
            "parameters, without seeing their inputs: set lora_dropout: 0"
        )


def _trained_whole(model: InternVLChatModel, args: InternVLTrainingArguments, ranks: dict[str, int]) -> list[str]:
    """Names of the modules that are trained themselves, each called with positional arguments only."""
    names = []
    used = [f"vision_model.encoder.layers.{i}" for i in range(_used_layers(model.config))]
    if not (args.freeze_backbone or ranks["vision_model"]):
        names += ["vision_model.embeddings", *used]
    elif args.unfreeze_vit_layers:
        first = args.unfreeze_vit_layers % model.config.vision_config.num_hidden_layers
        names += used[first:]
        if not used[first:]:
            raise ValueError(
                f"unfreeze_vit_layers={args.unfreeze_vit_layers} names only layers that select_layer="
                f"{model.config.select_layer} does not read: give a smaller one"
            )
    if not (args.freeze_mlp or ranks["mlp1"]):
        names.append("mlp1")
    if not (args.freeze_llm or ranks["language_model"]):
        names += list(_callable_units(model.language_model, "language_model"))
    elif args.unfreeze_lm_head:
        names.append(_name_of(model, model.get_output_embeddings()))
    return names


def _used_layers(config: InternVLChatConfig) -> int:
    """How many encoder layers the hidden state that `select_layer` picks has gone through."""
    layers = config.vision_config.num_hidden_layers
    return config.select_layer if config.select_layer >= 0 else layers + 1 + config.select_layer


def _callable_units(module: nn.Module, name: str) -> Iterator[str]:
    """The largest modules inside a language model that are called with positional arguments: layers, embeddings."""
    for child_name, child in module.named_children():
        full = f"{name}.{child_name}"
        if isinstance(child, (PreTrainedModel, nn.ModuleList)):
            yield from _callable_units(child, full)
        elif next(child.parameters(), None) is not None:
            yield full


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _unfreeze(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)


def _reentrant(args: InternVLTrainingArguments) -> bool:
    """Whether layers are checkpointed in the way that needs an input with a gradient."""
    names = ("activation_checkpointing", "gradient_checkpointing")  # the second up to transformers 5.2x, and an alias
    on = any(getattr(args, name, False) for name in names)
    settings = [getattr(args, f"{name}_kwargs", None) for name in names]
    return on and any(isinstance(kwargs, dict) and kwargs.get("use_reentrant") for kwargs in settings)
