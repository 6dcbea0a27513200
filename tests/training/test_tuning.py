"""What is trained: the right parameters per stage, frozen ones to the bit; LoRA on every backbone, saved, merged."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import CHAT, CONTEXT, QWEN2, assert_same, chat_config, llm_dict, vision_6b_dict, vision_dict
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments, set_seed
from versions import CHECKPOINTING

from internvl_hub.checkpoint_internvl import CheckpointError
from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.conversion.convert import upgrade
from internvl_hub.modeling_intern_vit import InternDropPath
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.tests.training import runs, tiny_models
from internvl_hub.training.arguments import InternVLTrainingArguments, ModelArguments
from internvl_hub.training.building import build
from internvl_hub.training.merging import merge_adapter_folder, merge_adapters
from internvl_hub.training.parameters import TrainableRow, parameter_groups, trainable_summary
from internvl_hub.training.tuning import prepare_for_tuning

BACKBONES = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss", "internlm2", "llama", "phi3", "mistral", "gemma2")
VISION, MLP, LLM = "vision_model.", "mlp1.", "language_model."
LAST = "vision_model.encoder.layers.3."
HEAD = "language_model.lm_head."
IDS = torch.tensor([[3, 9, *[CONTEXT] * 4, 10, 50, 60, 4], [5, 60, *[CONTEXT] * 4, 80, 90, 99, 4]])
PIXELS = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
ALL_LORA = {"use_llm_lora": 4, "use_backbone_lora": 2, "use_mlp_lora": 3}


def _model(backbone: str = "qwen2", seed: int = 0, **changes: Any) -> InternVLChatModel:
    model_type, _, tied = backbone.partition("-")
    set_seed(seed)
    llm = llm_dict(model_type, tie_word_embeddings=bool(tied), **changes.pop("llm", {}))
    vision = {**vision_dict(num_hidden_layers=4), **changes.pop("vision", {})}
    return InternVLChatModel(chat_config(llm_config=llm, vision_config=vision, **changes)).eval()


def _arguments(**options: Any) -> InternVLTrainingArguments:
    defaults = {"output_dir": "unused", "report_to": "none", "use_cpu": True, "lora_dropout": 0.0}
    return InternVLTrainingArguments(**{**defaults, **options})


def _logits(model: nn.Module) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    with torch.no_grad():
        return model(pixel_values=PIXELS.to(dtype), input_ids=IDS).logits


def _loss(model: nn.Module) -> torch.Tensor:
    return model(pixel_values=PIXELS, input_ids=IDS, labels=IDS).loss


def _trained(model: nn.Module) -> set[str]:
    """Names of trained parameters, without what PEFT puts around them."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {re.sub(r"^base_model\.model\.|modules_to_save\.default\.", "", name) for name in names}


def _awaken(model: nn.Module) -> nn.Module:
    """Gives the adapters, which start as zero, an effect."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model


def _steps(model: nn.Module, args: InternVLTrainingArguments, count: int = 3) -> None:
    optimiser = torch.optim.AdamW(parameter_groups(model, args))
    for _ in range(count):
        model.train()
        _loss(model).backward()
        optimiser.step()
        optimiser.zero_grad()


# --------------------------------------------------------------------------------------------- stages: what is trained

STAGES = {
    # name: settings, prefixes of what is trained
    "1": ({"freeze_backbone": True, "freeze_llm": True}, (MLP,)),
    "1.5": ({"freeze_llm": True}, (VISION, MLP)),
    "2": ({}, (VISION, MLP, LLM)),
    "second-full": ({"freeze_backbone": True}, (MLP, LLM)),
    "last-layer": ({"freeze_backbone": True, "freeze_llm": True, "unfreeze_vit_layers": -1}, (LAST, MLP)),
    "layer-3": ({"freeze_backbone": True, "freeze_llm": True, "unfreeze_vit_layers": 3}, (LAST, MLP)),
    "zero-layers": ({"freeze_backbone": True, "freeze_llm": True, "unfreeze_vit_layers": 0}, (MLP,)),
    "head": ({"freeze_backbone": True, "freeze_mlp": True, "freeze_llm": True, "unfreeze_lm_head": True}, (HEAD,)),
}


@pytest.mark.parametrize("backbone", ["qwen2", "internlm2", "qwen3_moe"])
@pytest.mark.parametrize("stage", STAGES)
def test_trained_parameters_of_a_stage(stage: str, backbone: str) -> None:
    """Exactly these get a gradient and move; all others keep their bits."""
    settings, prefixes = STAGES[stage]
    args = _arguments(learning_rate=1e-2, **settings)
    model = prepare_for_tuning(_model(backbone), args)
    wanted = {name for name in model.state_dict() if name.startswith(prefixes)}
    assert _trained(model) == wanted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _steps(model, args)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == wanted


LORA_STAGES = {
    "second-lora": (
        {"freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 2},
        r"language_model\..*lora_[AB]\.",
    ),
    "and-projector": ({"freeze_backbone": True, "use_llm_lora": 2}, r"mlp1\.\d|language_model\..*lora_[AB]\."),
    "all-lora": (ALL_LORA, r".*lora_[AB]\."),
    "and-head": (
        {"freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 2, "unfreeze_lm_head": True},
        r"language_model\.(lm_head\.|.*lora_[AB]\.)",
    ),
    "and-last-layer": (
        {"freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 2, "unfreeze_vit_layers": -1},
        r"vision_model\.encoder\.layers\.3\.|language_model\..*lora_[AB]\.",
    ),
    "and-encoder": ({"freeze_mlp": True, "use_llm_lora": 2}, r"vision_model\.|language_model\..*lora_[AB]\."),
    "encoder-lora-and-all": ({"use_backbone_lora": 2}, r"vision_model\..*lora_[AB]\.|mlp1\.|language_model\."),
}


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_trained_parameters_with_lora(stage: str) -> None:
    """What is trained beside adapters is trained whole, and used: the frozen copy of it changes nothing."""
    settings, pattern = LORA_STAGES[stage]
    args = _arguments(learning_rate=1e-2, **settings)
    plain = _model()
    model = prepare_for_tuning(copy.deepcopy(plain), args)
    trained = _trained(model)
    assert trained and all(re.match(pattern, name) for name in trained)
    whole = {name for name in plain.state_dict() if re.match(pattern, name)}
    assert {name for name in trained if "lora_" not in name} == whole
    assert torch.equal(_logits(model), _logits(plain))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _steps(model, args)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not torch.equal(_logits(model.eval()), _logits(plain))


def test_layers_that_nobody_reads_are_frozen() -> None:
    """With `select_layer` -2 the last layer would never get a gradient, which stops DistributedDataParallel."""
    model = prepare_for_tuning(_model(select_layer=-2), _arguments())
    assert not any(name.startswith(LAST) for name in _trained(model))
    _loss(model.train()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="unfreeze_vit_layers=-1 names only layers that select_layer=-2 does not"):
        prepare_for_tuning(_model(select_layer=-2), _arguments(freeze_backbone=True, unfreeze_vit_layers=-1))


def test_stages_in_a_row() -> None:
    """A model prepared for one stage is prepared anew for the next."""
    model = prepare_for_tuning(_model(), _arguments(**STAGES["1"][0]))
    again = prepare_for_tuning(model, _arguments())
    assert again is model and _trained(model) == set(model.state_dict())
    assert all(module.training for module in model.train().modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True}, "leave no parameter to train"),
        ({"use_llm_lora": -1}, "a LoRA rank must be 0 .none. or more, got language_model -1"),
        ({"unfreeze_vit_layers": -1}, "unfreeze_vit_layers needs freeze_backbone"),
        ({"freeze_backbone": True, "unfreeze_vit_layers": -5}, "the encoder has 4 layers.*-4 to 3"),
        ({"freeze_backbone": True, "unfreeze_vit_layers": 4}, "the encoder has 4 layers"),
        ({"use_backbone_lora": 2, "unfreeze_vit_layers": 1}, "unfreeze_vit_layers and use_backbone_lora exclude"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_for_tuning(_model(), _arguments(**options))


def test_refusals_that_depend_on_the_model() -> None:
    with pytest.raises(ValueError, match="embeddings of this language model are tied"):
        prepare_for_tuning(_model("qwen2-tied"), _arguments(use_llm_lora=2, unfreeze_lm_head=True))
    with pytest.raises(ValueError, match="embeddings of this language model are tied"):
        prepare_for_tuning(_model("qwen2-tied"), _arguments(use_backbone_lora=2))
    with pytest.raises(ValueError, match=r"lora_dropout=0.1 cannot apply to experts \(mlp.experts.down_proj"):
        prepare_for_tuning(_model("qwen3_moe"), _arguments(use_llm_lora=2, lora_dropout=0.1))
    with pytest.raises(ValueError, match="the model has adapters already: merge them first"):
        prepare_for_tuning(prepare_for_tuning(_model(), _arguments(use_llm_lora=2)), _arguments())


def test_tied_head_can_be_trained_and_lora_trained() -> None:
    args = _arguments(freeze_backbone=True, freeze_mlp=True, freeze_llm=True, unfreeze_lm_head=True)
    assert _trained(prepare_for_tuning(_model("qwen2-tied"), args)) == {"language_model.model.embed_tokens.weight"}
    model = prepare_for_tuning(_model("qwen2-tied"), _arguments(freeze_backbone=True, use_llm_lora=2))
    assert all("lora_" in name or name.startswith(MLP) for name in _trained(model))


# ------------------------------------------------------------------------------- modes, graphs, gradient checkpointing


def test_frozen_parts_stay_in_evaluation_mode() -> None:
    """Drop path and dropout of a frozen encoder are off, those of a trained one on, whatever the trainer calls."""
    noisy = {"vision": {"drop_path_rate": 0.9, "dropout": 0.5}, "llm": {"attention_dropout": 0.5}}
    frozen = prepare_for_tuning(_model(**noisy), _arguments(**STAGES["1"][0])).train()
    assert frozen.training and frozen.mlp1.training and not frozen.vision_model.training
    assert torch.equal(_loss(frozen), _loss(frozen))
    for settings in ({"freeze_llm": True}, {"freeze_backbone": True}, {"freeze_backbone": True, "use_llm_lora": 2}):
        loud = prepare_for_tuning(_model(**noisy), _arguments(**settings)).train()
        assert not torch.equal(_loss(loud), _loss(loud))


def test_only_trained_layers_drop_paths() -> None:
    settings = {"freeze_backbone": True, "freeze_llm": True, "unfreeze_vit_layers": -1}
    model = prepare_for_tuning(_model(vision={"drop_path_rate": 0.5}), _arguments(**settings)).train()
    paths = [[m.training for m in layer.modules() if isinstance(m, InternDropPath)]
             for layer in model.vision_model.encoder.layers]  # fmt: skip
    assert paths == [[False, False]] * 3 + [[True, True]]


def test_dropout_beside_trained_weights_is_on() -> None:
    """Modules without parameters go with the part that they belong to (Phi-3 has a dropout after its embeddings)."""
    full, frozen = (_model("phi3", llm={"embd_pdrop": 0.5, "resid_pdrop": 0.5}) for _ in range(2))
    prepare_for_tuning(full, _arguments()).train()
    prepare_for_tuning(frozen, _arguments(freeze_llm=True)).train()
    for model, on in ((full, True), (frozen, False)):
        dropouts = [m for m in model.language_model.modules() if isinstance(m, nn.Dropout)]
        assert dropouts and all(m.training is on for m in dropouts)


def _saved_for_backward(model: nn.Module, module: nn.Module) -> int:
    """Tensors that autograd keeps while `module` runs, by a loss of `model`."""
    count, inside = 0, False

    def enter(*_: Any) -> None:
        nonlocal inside
        inside = True

    def leave(*_: Any) -> None:
        nonlocal inside
        inside = False

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += inside
        return tensor

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _loss(model).backward()
    for handle in handles:
        handle.remove()
    return count


MODES = {"plain": None, "non-reentrant": False, "reentrant": True}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "settings",
    [
        {"freeze_backbone": True, "freeze_llm": True},
        {"freeze_backbone": True},
        {"freeze_backbone": True, "freeze_mlp": True, "use_llm_lora": 2},
        {"freeze_backbone": True, "freeze_llm": True, "unfreeze_vit_layers": -1},
        {"freeze_llm": True, "use_backbone_lora": 2},
        {},
    ],
    ids=["stage-1", "second-full", "second-lora", "last-layer", "encoder-lora", "all"],
)
def test_checkpointing_changes_no_gradient_and_keeps_no_graph_of_frozen_layers(
    mode: str, settings: dict[str, Any]
) -> None:
    plain = prepare_for_tuning(_model(), _arguments(**settings)).train()
    model = _checkpointed(_model(), settings, MODES[mode])
    encoder = (model.get_base_model() if isinstance(model, PeftModel) else model).vision_model
    _loss(plain).backward()
    first = next((i for i, layer in enumerate(encoder.encoder.layers) if _any_trained(layer)), 4)
    kept = [_saved_for_backward(model, layer) for layer in encoder.encoder.layers][:first]
    assert kept == [0] * first
    if first == 4:
        assert _saved_for_backward(model, encoder) == 0
    model.zero_grad()
    _loss(model).backward()
    found, wanted = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in (model, plain))
    assert wanted.keys() == {name for name, p in plain.named_parameters() if p.requires_grad}
    assert_same(found, wanted, rtol=1e-5, atol=1e-7)


def _any_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _checkpointed(model: InternVLChatModel, settings: dict[str, Any], reentrant: bool | None) -> nn.Module:
    """As `Trainer` does it: first prepared, then switched on."""
    if reentrant is None:
        return prepare_for_tuning(model, _arguments(**settings)).train()
    kwargs = {"use_reentrant": reentrant}
    args = _arguments(**settings, **{CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": kwargs})
    tuned = prepare_for_tuning(model, args).train()
    getattr(tuned, f"{CHECKPOINTING}_enable")(kwargs)
    return tuned


def test_frozen_language_model_is_still_checkpointed() -> None:
    """Its gradients are needed for the projector; in evaluation mode transformers would keep all activations."""
    settings = {"freeze_backbone": True, "freeze_llm": True}
    counts = [
        _saved_for_backward(model, model.language_model.get_decoder())
        for model in (_checkpointed(_model(), settings, None), _checkpointed(_model(), settings, False))
    ]
    assert counts[1] < counts[0] / 4


# ---------------------------------------------------------------------------------------------------------------- LoRA


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lora_starts_as_the_base_and_merges(backbone: str, tmp_path: Path) -> None:
    """To the bit at first; after training, saved adapters reload to the bit and merged weights agree."""
    base = _model(backbone)
    before = _logits(base)
    model = prepare_for_tuning(copy.deepcopy(base), _arguments(**ALL_LORA))
    assert torch.equal(_logits(model), before)
    wrapped = _logits(_awaken(model))
    assert (wrapped - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), wrapped)
    merged = merge_adapters(model)
    assert type(merged) is InternVLChatModel and merged.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(_logits(merged), wrapped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["qwen2", "qwen3_moe", "gpt_oss", "internlm2", "phi3"])
def test_merging_is_exact_in_double_precision(backbone: str) -> None:
    base = _model(backbone).double()
    base.language_model.config._experts_implementation = "eager"  # torch's grouped product knows no double
    model = _awaken(prepare_for_tuning(base, _arguments(**ALL_LORA)))
    wrapped = _logits(model)
    precision = 1e-6 if backbone == "qwen3_moe" else 1e-9  # its router computes in float32 whatever the model does
    torch.testing.assert_close(_logits(merge_adapters(model)), wrapped, rtol=precision, atol=precision)


def test_merged_weights_by_hand() -> None:
    """W + alpha / rank x B A, alpha twice the rank unless given."""
    for alpha, scaling in ((None, 2.0), (3.0, 3.0 / 4)):
        base = _model()
        model = _awaken(prepare_for_tuning(copy.deepcopy(base), _arguments(use_llm_lora=4, lora_alpha=alpha)))
        name = "language_model.model.layers.1.mlp.up_proj"
        layer = model.get_base_model().get_submodule(name)
        update = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        wanted = base.get_submodule(name).weight.double() + scaling * update
        torch.testing.assert_close(merge_adapters(model).get_submodule(name).weight, wanted.float())


TARGETS = {
    "qwen2": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
              "mlp.up_proj", "mlp.down_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
    "qwen3_moe": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.experts",
                  "mlp.experts.base_layer"},  # one wrapper per parameter of the experts, in one another
}  # fmt: skip
TARGETS |= dict.fromkeys(("qwen3", "internlm2", "llama"), TARGETS["qwen2"]) | {"gpt_oss": TARGETS["qwen3_moe"]}


@pytest.mark.parametrize("backbone", TARGETS)
def test_adapted_layers_and_their_ranks(backbone: str) -> None:
    """The original's targets (InternLM2's under Llama's names), and all experts; each part has a rank of its own."""
    model = prepare_for_tuning(_model(backbone), _arguments(**ALL_LORA)).get_base_model()
    adapted = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    layer = "language_model.model.layers.{}."
    wanted = {layer.format(i) + name for i in range(2) for name in TARGETS[backbone]}
    vision = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    wanted |= {f"vision_model.encoder.layers.{i}.{name}" for i in range(4) for name in vision}
    assert adapted.keys() == wanted | {"mlp1.1", "mlp1.3"}
    ranks = {"language_model": 4, "vision_model": 2, "mlp1": 3}
    for name, module in adapted.items():
        rank = ranks[name.partition(".")[0]]
        assert (module.r["default"], module.scaling["default"]) == (rank, 2.0), name
        assert module.lora_A["default"].weight.shape[0] == rank * getattr(module, "num_experts", 1), name


def test_routers_are_left_alone() -> None:
    """Qwen2-MoE has a linear layer that weighs its shared expert against the others."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    llm = {**llm_dict("qwen2", **experts), "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"]}
    base = InternVLChatModel(chat_config(llm_config=llm))
    model = prepare_for_tuning(base, _arguments(use_llm_lora=2)).get_base_model()
    mlp = model.language_model.model.layers[0].mlp
    assert type(mlp.shared_expert_gate) is nn.Linear and hasattr(mlp.shared_expert.up_proj, "lora_A")


def test_dropout_of_adapters() -> None:
    model = prepare_for_tuning(_model(), _arguments(use_llm_lora=2, lora_dropout=0.5, freeze_backbone=True))
    _awaken(model)
    assert torch.equal(_loss(model.eval()), _loss(model))
    model.train()
    assert not torch.equal(_loss(model), _loss(model))


@pytest.mark.parametrize("stage", LORA_STAGES)
def test_adapter_folder_holds_everything_trained(stage: str, tmp_path: Path) -> None:
    args = _arguments(learning_rate=1e-2, **LORA_STAGES[stage][0])
    base = _model()
    model = prepare_for_tuning(copy.deepcopy(base), args)
    _steps(model, args)
    wrapped = _logits(model.eval())
    model.save_pretrained(tmp_path)
    stored = sum(tensor.numel() for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    assert stored == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert torch.equal(_logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()), wrapped)
    torch.testing.assert_close(_logits(merge_adapters(model)), wrapped, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backbone", ["qwen2", "internlm2"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_trainer_resumes_exactly(backbone: str, dropout: float, tmp_path: Path) -> None:
    """Adapters and a projector trained beside them, with their optimiser and dropout."""
    options = {"use_llm_lora": 2, "use_backbone_lora": 2, "lora_dropout": dropout, "optim": "adamw_torch"}
    options |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "batch": 2, "learning_rate": 1e-2}

    def trainer(folder: str, seed: int) -> Any:
        args = _arguments(**{name: value for name, value in options.items() if name != "batch"})
        tuned = prepare_for_tuning(tiny_models.model(backbone), args)
        set_seed(seed)
        return runs.make_trainer(str(tmp_path / folder), backbone, model=tuned, **options)

    whole = trainer("whole", 1)
    before = runs.weights(whole)
    whole.train()
    after = runs.weights(whole)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name, p in whole.model.named_parameters() if p.requires_grad}
    assert any("mlp1.modules_to_save" in name for name in moved)
    resumed = trainer("resumed", 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert runs.losses(resumed) == runs.losses(whole)
    assert_same(runs.weights(resumed), after)


def test_trainer_resumes_adapted_experts(tmp_path: Path) -> None:
    options = {"use_llm_lora": 2, "lora_dropout": 0.0}
    for backbone in ("qwen3_moe", "gpt_oss"):
        model = _awaken(prepare_for_tuning(_model(backbone), _arguments(**options)))
        model.save_pretrained(tmp_path / backbone)
        other = prepare_for_tuning(_model(backbone), _arguments(**options))
        trainer = runs.make_trainer(str(tmp_path / "run"), model=other, **options)
        trainer._load_from_checkpoint(str(tmp_path / backbone))
        assert_same(dict(other.state_dict()), dict(model.state_dict()))


# ------------------------------------------------------------------------------------------------------------- merging


def _base(folder: Path, name: str = QWEN2, **settings: Any) -> tuple[Path, nn.Module]:
    """A checkpoint on disk, and it with adapters and a projector of its own that do something."""
    upgrade(CHAT / name, folder, progress=False)
    built = build(ModelArguments(model_name_or_path=str(folder), **settings))
    model = _awaken(prepare_for_tuning(built.model, _arguments(use_llm_lora=2, use_backbone_lora=2)))
    model.get_submodule("base_model.model.mlp1.modules_to_save.default.1").bias.data += 0.1
    return folder, model.eval()


def _plain_config(folder: Path) -> dict[str, Any]:
    config = InternVLChatConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in config.items() if name != "_name_or_path"}


@pytest.mark.parametrize("name", [QWEN2, "internlm2-internlm2_chat", "phi3-phi3_chat", "llama-hermes2-vit6b"])
def test_merged_folder_has_the_config_of_its_base(name: str, tmp_path: Path) -> None:
    base, model = _base(tmp_path / "base", name)
    wrapped = _logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter_folder(tmp_path / "adapter", tmp_path / "merged", progress=False)
    merged = AutoModel.from_pretrained(tmp_path / "merged", trust_remote_code=True).eval()
    torch.testing.assert_close(_logits(merged), wrapped, rtol=1e-4, atol=1e-4)
    assert _plain_config(tmp_path / "merged") == _plain_config(base)
    saved, own = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "merged", base))
    assert saved == own and saved["use_llm_lora"] == saved["use_backbone_lora"] == 0
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert files == {path.name for path in base.iterdir()}
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "processor_config.json"):
        assert (tmp_path / "merged" / file).read_bytes() == (base / file).read_bytes(), file


def test_merged_folder_keeps_what_was_changed_for_training(tmp_path: Path) -> None:
    """Where the run left its `config.json` beside the adapters."""
    _, model = _base(tmp_path / "base", conv_style="Hermes-2", force_image_size=112)
    pixels = torch.randn(1, 3, 112, 112)
    wrapped = model.get_base_model().extract_feature(pixels)
    model.save_pretrained(tmp_path / "adapter")
    model.config.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "recipe.yaml").write_text("model: {model_name_or_path: maker/base}\n", encoding="utf-8")
    (tmp_path / "adapter" / "trainer_state.json").write_text('{"global_step": 12345}', encoding="utf-8")
    with pytest.raises(OSError, match="holds adapters, not a model: `internvl merge"):
        InternVLChatModel.from_pretrained(tmp_path / "adapter")
    merge_adapter_folder(tmp_path / "adapter", tmp_path / "merged", progress=False)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert "base_model: maker/base" in card and "12,345 steps" in card
    merged = InternVLChatModel.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged.extract_feature(pixels), wrapped, rtol=1e-4, atol=1e-4)
    assert merged.template == "Hermes-2" and merged.config.vision_config.image_size == 112


def test_adapters_that_cannot_be_merged(tmp_path: Path) -> None:
    base, model = _base(tmp_path / "base")
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        merge_adapter_folder(base, tmp_path / "merged")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="adapter does not fit .*phi3"):
        merge_adapter_folder(tmp_path / "adapter", tmp_path / "merged", CHAT / "phi3-phi3_chat")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    weights.pop(next(name for name in weights if "lora_B" in name))
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lora_B.*\(1 in all\) have no counterpart"):
        merge_adapter_folder(tmp_path / "adapter", tmp_path / "merged")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = None
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="names no base model: give base"):
        merge_adapter_folder(tmp_path / "adapter", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_merging_leaves_nothing_behind() -> None:
    model = prepare_for_tuning(_model(), _arguments(freeze_backbone=True, use_llm_lora=2))
    merged = merge_adapters(model).train()
    hooks = [len(module._forward_pre_hooks) for module in _model().modules()]  # that which keeps packed rows apart
    assert [len(module._forward_pre_hooks) for module in merged.modules()] == hooks
    assert all(module.training for module in merged.modules())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    plain = _model()
    assert merge_adapters(plain) is plain


# ----------------------------------------------------------------------------------------------- optimiser and summary


def _no_decay(name: str) -> bool:
    return name.endswith("bias") or "norm" in name or name in ("mlp1.0.weight",)


@pytest.mark.parametrize("flavour", ["300M", "6B"])
def test_parameter_groups(flavour: str) -> None:
    model = _model(vision=vision_6b_dict(num_hidden_layers=4) if flavour == "6B" else {})
    args = _arguments(learning_rate=1e-3, vision_lr=1e-5, mlp_lr=0.0, weight_decay=0.05)
    groups = parameter_groups(prepare_for_tuning(model, args), args)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names.pop(id(p)): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert not names and len(groups) == 6
    rates = {"vision_model": 1e-5, "mlp1": 0.0, "language_model": 1e-3}
    for name, settings in found.items():
        assert settings == (rates[name.partition(".")[0]], 0.0 if _no_decay(name) else 0.05), name


@pytest.mark.parametrize("settings", [{}, {"use_llm_lora": 2}], ids=["full", "lora"])
def test_groups_are_the_trainers_where_rates_agree(settings: dict[str, Any], tmp_path: Path) -> None:
    args = _arguments(learning_rate=1e-3, **settings)
    model = prepare_for_tuning(_model(), args)
    plain = TrainingArguments(str(tmp_path), learning_rate=1e-3, weight_decay=0.05, report_to="none", use_cpu=True)
    theirs = Trainer(model, plain).create_optimizer().param_groups
    wanted = {id(p): group["weight_decay"] for group in theirs for p in group["params"]}
    assert {id(p): g["weight_decay"] for g in parameter_groups(model, args) for p in g["params"]} == wanted


def test_rates_reach_adapters_and_copies() -> None:
    args = _arguments(use_llm_lora=2, use_backbone_lora=2, learning_rate=1e-3, vision_lr=1e-4, mlp_lr=1e-5)
    model = prepare_for_tuning(_model(), args)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {1e-3: LLM, 1e-4: VISION, 1e-5: MLP}
    for group in parameter_groups(model, args):
        assert all(names[id(p)].startswith(f"base_model.model.{rates[group['lr']]}") for p in group["params"])
    assert sum(len(g["params"]) for g in parameter_groups(model, args)) == len(_trained(model))


def test_trainable_summary() -> None:
    model = _model()
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vision_model", "mlp1")}
    llm = sum(p.numel() for p in model.language_model.parameters())
    model = prepare_for_tuning(model, _arguments(freeze_backbone=True, use_llm_lora=2))
    lora = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert trainable_summary(model) == [
        TrainableRow("vision_model", 0, sizes["vision_model"]),
        TrainableRow("mlp1", sizes["mlp1"], sizes["mlp1"]),
        TrainableRow("language_model", lora, llm + lora),
        TrainableRow("all", sizes["mlp1"] + lora, sum(sizes.values()) + llm + lora),
    ]
    tied = _model("qwen2-tied")
    assert trainable_summary(tied)[2].total == llm - tied.lm_head.weight.numel()
