"""What of a model is trained: freezing, LoRA, learning rates per part, and adapters merged back into the weights.

Works on any `InternVLChatModel`, whatever its language model; `building.py` makes it. Nothing here steps an optimiser.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.modeling_layers import GradientCheckpointingLayer

from ..checkpoint_internvl import CheckpointError, read_json
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversion.convert import ConversionReport, upgrade
from ..conversion.folders import refuse_same, resolve
from ..conversion.tokenizers import FILES
from ..modeling_intern_vit import InternRMSNorm
from ..modeling_internvl_chat import InternVLChatModel
from .arguments import InternVLTrainingArguments, ModelArguments
from .building import OVERRIDES, build, load_own_tokenizer

PARTS = ("vision_model", "mlp1", "language_model")
_ADAPTER = "adapter_config.json"
# Names of layers that choose experts: they stay as they are.
_ROUTERS = ("gate", "router", "shared_expert_gate")
_VISION_TARGETS = r"vision_model\.encoder\.layers\.\d+\.(?:attn\.(?:qkv|proj)|mlp\.fc[12])"
_PROJECTOR_TARGETS = r"mlp1\.[13]"


class TrainableRow(NamedTuple):
    """Parameters of one part of a model: those that are trained, and all that its forward uses."""

    module: str
    trainable: int
    total: int


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
    _release(model)
    ranks = dict(zip(PARTS, (args.use_backbone_lora, args.use_mlp_lora, args.use_llm_lora), strict=True))
    _check(model, args, ranks)
    whole = _trained_whole(model, args, ranks)
    model.requires_grad_(False)
    if any(ranks.values()):
        tuned = _add_lora(model, args, ranks, whole)
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
    _hold_frozen_in_eval(model)
    _cut_graph(model, _reentrant(args))
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
    if llm_lora and args.lora_dropout and (experts := _expert_parameters(model)):
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


# ---------------------------------------------------------------------------------------------------------------- LoRA


def _add_lora(
    model: InternVLChatModel, args: InternVLTrainingArguments, ranks: dict[str, int], whole: list[str]
) -> nn.Module:
    """One `LoraConfig` for all parts; where their ranks differ, patterns say so."""
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
        target_parameters=(_expert_parameters(model) or None) if "language_model" in used else None,
        modules_to_save=whole or None,
    )
    return get_peft_model(model, config)


def _decoder_layers(model: InternVLChatModel) -> dict[str, nn.Module]:
    """The decoder layers of the language model by full name, first to last."""
    modules = model.language_model.named_modules()
    found: dict[str, nn.Module] = {
        f"language_model.{name}": m for name, m in modules if isinstance(m, GradientCheckpointingLayer)
    }
    if not found:
        raise ValueError(f"{type(model.language_model).__name__} has no layers that transformers could checkpoint")
    return found


def _language_targets(model: InternVLChatModel) -> str:
    """A pattern for every linear layer of the decoder but routers and the output head, read off the model itself."""
    inner = set()
    for layer in _decoder_layers(model).values():
        linear = (name for name, module in layer.named_modules() if isinstance(module, nn.Linear))
        inner |= {name for name in linear if name.rpartition(".")[2] not in _ROUTERS}
    prefixes = {name.rpartition(".")[0] for name in _decoder_layers(model)}
    names, before = ("|".join(map(re.escape, sorted(found))) for found in (inner, prefixes))
    return rf"(?:{before})\.\d+\.(?:{names})"


def _expert_parameters(model: InternVLChatModel) -> list[str]:
    """Names, within a layer, of experts that transformers 5 holds as one parameter (E, ., .) of a module."""
    named = [item for layer in _decoder_layers(model).values() for item in layer.named_parameters()]
    return sorted({name for name, value in named if value.ndim == 3 and not name.endswith(".weight")})


# ------------------------------------------------------------------------------------------ modes and borders of graph


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train` of a frozen module."""
    return module


def _hold_frozen_in_eval(model: InternVLChatModel) -> None:
    """Holds everything that belongs to a frozen weight in evaluation mode.

    The layers of a frozen language model itself follow `train()`, only what is in them is held: gradients go through
    them to the projector, and transformers checkpoints layers in training mode only.
    """
    for part in PARTS:
        _hold_untrained(getattr(model, part), checkpointed=part == "language_model")


def _hold_untrained(module: nn.Module, checkpointed: bool, inside_frozen: bool = False) -> None:
    """Without parameters of its own (dropout), a module goes with the one that it is in."""
    parameters = list(module.parameters())
    frozen = not any(p.requires_grad for p in parameters) if parameters else inside_frozen
    layers = checkpointed and any(isinstance(m, GradientCheckpointingLayer) for m in module.modules())
    if frozen and not layers:
        module.eval()
        module.train = MethodType(_stay_in_eval, module)  # type: ignore[method-assign]
    elif frozen or not _is_one_trained_thing(module):
        for child in module.children():
            _hold_untrained(child, checkpointed, frozen)


def _is_one_trained_thing(module: nn.Module) -> bool:
    """A layer or a projection, with adapters or trained itself: what is in it belongs together."""
    return isinstance(module, GradientCheckpointingLayer) or hasattr(module, "base_layer")


def _reentrant(args: InternVLTrainingArguments) -> bool:
    """Whether layers are checkpointed in the way that needs an input with a gradient."""
    names = ("activation_checkpointing", "gradient_checkpointing")  # the second up to transformers 5.2x, and an alias
    on = any(getattr(args, name, False) for name in names)
    settings = [getattr(args, f"{name}_kwargs", None) for name in names]
    return on and any(isinstance(kwargs, dict) and kwargs.get("use_reentrant") for kwargs in settings)


def _cut_graph(model: InternVLChatModel, reentrant: bool) -> None:
    """Detaches the input of a tower's first layer where nothing before it is trained."""
    vision = model.vision_model
    upstream = _trains(vision) or _trains(model.mlp1)
    if not _trains(vision.embeddings):
        _cut(list(vision.encoder.layers), reentrant)
    if not upstream and not _trains(model.get_input_embeddings()):
        _cut(list(_decoder_layers(model).values()), reentrant)


def _cut(layers: list[nn.Module], reentrant: bool) -> None:
    first = next((layer for layer in layers if _trains(layer)), None)
    layers[0].register_forward_pre_hook(_detach_input)
    if reentrant and first is not None:
        first.register_forward_pre_hook(_require_input_gradient)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _detach_input(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].detach(), *inputs[1:])


def _require_input_gradient(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if not torch.is_grad_enabled() or inputs[0].requires_grad:
        return inputs
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _release(model: nn.Module) -> None:
    """Undoes what holds modules in evaluation mode and cuts the graph."""
    for module in model.modules():
        if getattr(module.__dict__.get("train"), "__func__", None) is _stay_in_eval:
            del module.train
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook in (_detach_input, _require_input_gradient):
                del module._forward_pre_hooks[key]
    model.train(model.training)


# ----------------------------------------------------------------------------------------------- optimiser and summary


def part_of(name: str) -> str | None:
    """The part of the model that a parameter belongs to, by its name, also inside a `PeftModel`; None for others."""
    first = name.removeprefix("base_model.model.").partition(".")[0]
    return first if first in PARTS else None


def parameter_groups(model: nn.Module, args: InternVLTrainingArguments) -> list[dict[str, Any]]:
    """Trained parameters in groups of one learning rate and one weight decay, each in exactly one.

    `vision_lr` and `mlp_lr` fall back to `learning_rate`. Decay is the Trainer's choice (no biases, no norms), and
    none either for the RMS norms of the 6B encoder, whose names (`norm1`) its patterns do not know.

    Args:
        model: From `prepare_for_tuning`.
        args: Learning rates and `weight_decay`.

    Returns:
        Groups for a torch optimiser, in the order in which their first parameter comes in the model.
    """
    decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]  # needs no trainer
    norms = {id(p) for module in model.modules() if isinstance(module, InternRMSNorm) for p in module.parameters()}
    rates = {"vision_model": args.vision_lr, "mlp1": args.mlp_lr}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = rates.get(part_of(name) or "")
            rate = args.learning_rate if rate is None else rate
            decay = args.weight_decay if name in decayed and id(parameter) not in norms else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()]


def trainable_summary(model: nn.Module) -> list[TrainableRow]:
    """Parameters by part and in all, for a table.

    Tied weights count once, 4-bit weights by their real number, and of a part that is trained whole beside LoRA only
    the trained copy.
    """
    counts = {part: [0, 0] for part in PARTS}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        if part is None or ".original_module." in name:
            continue
        number = getattr(parameter, "ds_numel", 0) or parameter.numel()  # empty here under ZeRO-3
        if type(parameter).__name__ == "Params4bit":  # two to a byte
            number = parameter.numel() * 2 * parameter.element_size()
        counts[part][0] += number * parameter.requires_grad
        counts[part][1] += number
    rows = [TrainableRow(part, *counts[part]) for part in PARTS]
    return [*rows, TrainableRow("all", sum(row.trainable for row in rows), sum(row.total for row in rows))]


# ------------------------------------------------------------------------------------------------------------- merging


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
    _release(model)
    return model.requires_grad_(True).eval()


def merge_adapter_folder(
    adapter: str | Path, target: str | Path, base: str | Path | None = None, **options: Any
) -> ConversionReport:
    """Writes a self-contained checkpoint with the adapters of a PEFT folder merged into their base.

    Its configuration is the base's. Where the adapter folder holds a `config.json` of the model that was trained,
    whose template, tiles or image size differ from the base's, those are taken over, as they were for training.

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
