"""The memory estimate against what optimisers, quantized formats and real steps take, and the rules it follows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from transformers.utils import is_peft_available

from internvl_hub import losses_internvl
from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.conversion import families
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.training import memory_layers, memory_sharing
from internvl_hub.training.estimate import estimate
from internvl_hub.training.memory_advice import suggestions
from internvl_hub.training.memory_model import measure_step
from internvl_hub.training.memory_settings import RunSettings
from internvl_hub.training.preference_arguments import PreferenceArguments
from internvl_hub.training.preference_batch import PairBatch
from internvl_hub.training.preference_collation import PreferenceCollator
from internvl_hub.training.preference_terms import PairTerms
from internvl_hub.training.recipes import RECIPES
from internvl_hub.training.reference import frozen_copy
from internvl_hub.training.tuning import prepare_for_tuning

VOCABULARY, CONTEXT = 3000, 7
needs_peft = pytest.mark.skipif(not is_peft_available(), reason="needs peft")
PLAIN = {"tokens": 96, "tiles": 2, "dtype": "float32", "mixed_precision": None, "gradient_checkpointing": False}
LORA = {"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True, "use_llm_lora": 4}


def small_config(model_type: str = "qwen2", layers: tuple[int, int] = (5, 6), **changes: Any) -> InternVLChatConfig:
    """By default five encoder and six decoder layers, so that some are repeated; 16 visual tokens a tile."""
    vision = {
        "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": layers[0],
        "image_size": 112, "patch_size": 14, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False,
        "drop_path_rate": 0.1,
    }  # fmt: skip
    language = {
        "model_type": model_type, "hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_hidden_layers": layers[1], "vocab_size": VOCABULARY,
    }  # fmt: skip
    fields = {"vision_config": vision, "llm_config": language, "force_image_size": 112, "ps_version": "v2"}
    return InternVLChatConfig(**{**fields, "img_context_token_id": CONTEXT, **changes})


def settings(**changes: Any) -> RunSettings:
    return RunSettings(**{**PLAIN, **changes})


def real_model(chosen: RunSettings, config: InternVLChatConfig | None = None) -> torch.nn.Module:
    """The model that the settings describe, with real weights."""
    options = {"dtype": getattr(torch, chosen.dtype), "attn_implementation": chosen.attn_implementation}
    model = InternVLChatModel._from_config(config or small_config(), **options)
    tuned = prepare_for_tuning(model, chosen)
    if chosen.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return tuned.train()


def real_batch(config: InternVLChatConfig, chosen: RunSettings) -> dict[str, Any]:
    """Random rows, the last one padded if there are several; or a pack of two."""
    rows, visual = chosen.rows, sum(config.tokens_per_tile(chosen.tiles))
    ids = torch.randint(10, VOCABULARY, (rows, chosen.tokens))
    ids[:, :visual] = CONTEXT
    mask, labels = torch.ones_like(ids), ids.clone()
    labels[:, : chosen.tokens - (chosen.supervised or chosen.tokens - visual)] = -100
    if rows > 1:
        mask[-1, -3:], labels[-1, -3:] = 0, -100
    tiles = max(rows * chosen.tiles, 1)
    batch = {
        "input_ids": ids, "labels": labels, "attention_mask": mask, "loss_weight": torch.ones(ids.shape),
        "pixel_values": torch.randn(tiles, 3, config.image_size, config.image_size),
        "image_flags": torch.full((tiles,), int(chosen.tiles > 0)),
    }  # fmt: skip
    if chosen.packing:
        del batch["attention_mask"]
        parts = torch.arange(chosen.tokens // 3), torch.arange(chosen.tokens - chosen.tokens // 3)
        batch |= {"position_ids": torch.cat(parts).unsqueeze(0), "use_cache": False}
    return batch


class Tracker(MemTracker):
    """PyTorch's tracker, which would hook frozen parameters and fail."""

    def _track_module_params_and_buffers(self, module: Any, install_grad_hooks: bool = True) -> Any:
        trained = all(parameter.requires_grad for parameter in module.parameters())
        return super()._track_module_params_and_buffers(module, install_grad_hooks and trained)


def real_pairs(config: InternVLChatConfig, chosen: RunSettings) -> dict[str, Any]:
    """Pairs as `PreferenceCollator` makes them; the rejected answer is one token shorter, so that there is padding."""
    visual, count = sum(config.tokens_per_tile(chosen.tiles)), chosen.supervised
    pairs = []
    for _ in range(chosen.rows):
        ids = torch.randint(10, VOCABULARY, (chosen.tokens,))
        ids[:visual] = CONTEXT
        labels = ids.clone()
        labels[: chosen.tokens - (count or chosen.tokens - max(visual, 1))] = -100
        pixels = torch.randn(chosen.tiles, 3, config.image_size, config.image_size) if chosen.tiles else None
        pairs.append({
            "chosen_input_ids": ids, "chosen_labels": labels, "rejected_input_ids": ids[:-1],
            "rejected_labels": labels[:-1], "pixel_values": pixels,
        })  # fmt: skip
    batch = PreferenceCollator(0, config.image_size, "token")(pairs)
    return {name: value for name, value in batch.items() if not name.startswith("num_")}


def pairs_loss(tuned: torch.nn.Module, reference: Any, batch: dict[str, Any]) -> torch.Tensor:
    """As `MPOTrainer` computes it, without a trainer; a reference of None is one of values from the disk."""
    pairs = PairBatch.of(batch)
    values = torch.zeros(2 * pairs.pairs)
    if reference is not None:
        with torch.no_grad():
            values = pairs.score(reference).answers
    terms = PairTerms.of(pairs, pairs.score(tuned), values, 0.0, PreferenceArguments())
    return terms.loss(PreferenceArguments(), pairs.pairs, terms.weight)


def make_reference(chosen: RunSettings, tuned: torch.nn.Module, config: InternVLChatConfig) -> Any:
    if chosen.reference == "checkpoint":
        other = InternVLChatModel._from_config(config, dtype=getattr(torch, chosen.dtype))
        return other.eval().requires_grad_(False)
    return frozen_copy(tuned) if chosen.reference == "copy" else None


def tracked_peak(chosen: RunSettings, config: InternVLChatConfig) -> int:
    """Highest point of a real second step on the CPU, as PyTorch's own tracker sees it."""
    tuned = real_model(chosen, config)
    reference = make_reference(chosen, tuned, config)
    parameters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, fused=True)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=chosen.gradient_accumulation_steps == 1)
    batch = real_pairs(config, chosen) if chosen.pairs else real_batch(config, chosen)
    autocast = torch.autocast("cpu", torch.bfloat16) if chosen.mixed_precision else contextlib.nullcontext()
    tracker = Tracker()
    tracker.track_external(tuned, optimizer, *(value for value in batch.values() if isinstance(value, torch.Tensor)))
    if reference is not None:
        own = {id(parameter) for parameter in tuned.parameters()}
        copied = [parameter for parameter in reference.parameters() if id(parameter) not in own]
        tracker.track_external(*copied, *reference.buffers())
    with tracker:
        with autocast:
            loss = (
                pairs_loss(tuned, reference, batch)
                if chosen.pairs
                else tuned(**batch, num_items_in_batch=torch.ones(())).loss
            )
        loss.backward()
        optimizer.step()
    return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


# --------------------------------------------------------------------------------------------------------- real steps

REAL = {
    "full": ("qwen2", {}),
    "accumulation": ("qwen2", {"gradient_accumulation_steps": 4, "gradient_checkpointing": True}),
    "frozen encoder, two padded rows": ("qwen3", {"freeze_backbone": True, "per_device_train_batch_size": 2}),
    "mixed precision, checkpointing": ("llama", {"mixed_precision": "bf16", "gradient_checkpointing": True}),
    "last encoder layers, eager": ("qwen2", {"freeze_backbone": True, "unfreeze_vit_layers": -2,
                                             "attn_implementation": "eager"}),
    "text alone": ("qwen2", {"tiles": 0, "dtype": "bfloat16"}),
    "pack": ("qwen3", {"packing": True, "tokens": 160, "supervised": 40}),
}  # fmt: skip


@pytest.mark.parametrize("case", REAL)
def test_is_what_a_real_step_takes(case: str) -> None:
    model_type, changes = REAL[case]
    config, chosen = small_config(model_type), settings(**changes)
    measured = tracked_peak(chosen, config)
    assert estimate(config, chosen, cuda=False).peak == pytest.approx(measured, rel=0.02)


@pytest.mark.newest
@pytest.mark.parametrize("supervised", [None, 20])
def test_is_what_a_real_step_takes_where_the_loss_is_in_chunks(
    supervised: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses_internvl, "MAX_CHUNK_LOGITS", 24 * VOCABULARY)  # 64 labels are three chunks, 20 one
    config, chosen = small_config(), settings(supervised=supervised, gradient_checkpointing=True, freeze_backbone=True)
    measured = tracked_peak(chosen, config)
    assert estimate(config, chosen, cuda=False).peak == pytest.approx(measured, rel=0.02)


PAIRS = {
    "copy": {"reference": "copy"},
    "copy of what is trained": {"reference": "copy", "freeze_backbone": True, "gradient_checkpointing": True},
    "another checkpoint, two pairs": {"reference": "checkpoint", "freeze_llm": True, "per_device_train_batch_size": 2},
    "mixed precision": {"reference": "copy", "mixed_precision": "bf16", "gradient_checkpointing": True},
    "precomputed": {"reference": None, "dtype": "bfloat16", "supervised": 20},
    "text alone": {"reference": "copy", "tiles": 0},
}


@pytest.mark.newest
@pytest.mark.parametrize("case", PAIRS)
def test_is_what_a_real_step_on_pairs_takes(case: str) -> None:
    config, chosen = small_config(), settings(pairs=True, **PAIRS[case])
    measured = tracked_peak(chosen, config)
    assert estimate(config, chosen, cuda=False).peak == pytest.approx(measured, rel=0.03)


def test_a_reference_is_what_the_model_cannot_share() -> None:
    def reference(**changes: Any) -> int:
        chosen = {"pairs": True, "reference": "copy", "mixed_precision": "bf16", **changes}
        return estimate(small_config(), settings(**chosen)).weights.get("reference", 0)

    model = real_model(settings())
    every, buffers = size(model.parameters()), size(model.buffers())
    trained = every - size(model.vision_model.parameters())
    assert reference() == every + buffers
    assert reference(freeze_backbone=True) == trained + buffers
    assert reference(freeze_backbone=True, reference="checkpoint") == every + buffers
    assert reference(reference=None) == 0
    shared = {"freeze_backbone": True, "devices": 4}
    assert reference(**shared, sharding="ddp") == trained + buffers
    assert reference(**shared, sharding="zero2") == every // 2 + buffers  # 16 bits, nothing shared
    assert reference(**shared, sharding="zero3") == pytest.approx(every / 8 + buffers, abs=8)
    assert reference(**shared, sharding="fsdp") == pytest.approx(every / 4 + buffers, abs=8)


@pytest.mark.newest
@needs_peft
@pytest.mark.parametrize("checkpointing", [False, True])
def test_is_what_a_real_step_with_lora_takes(checkpointing: bool) -> None:
    config, chosen = small_config(), settings(**LORA, gradient_checkpointing=checkpointing)
    measured = tracked_peak(chosen, config)
    assert estimate(config, chosen, cuda=False).peak == pytest.approx(measured, rel=0.05)


@pytest.mark.newest
@pytest.mark.parametrize(
    "changes",
    [
        {}, {"gradient_checkpointing": True}, {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2}, {"freeze_backbone": True, "unfreeze_vit_layers": 2},
        {"sharding": "fsdp", "devices": 4, "mixed_precision": "bf16", "gradient_checkpointing": True},
    ],
    ids=["full", "checkpointing", "mixed", "accumulation", "half-frozen", "fsdp"],
)  # fmt: skip
@pytest.mark.parametrize("selected", [-1, -3, 4])
def test_a_few_layers_stand_for_all(changes: dict, selected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config(layers=(9, 8), select_layer=selected)
    few = measure_step(config, settings(**changes))
    monkeypatch.setattr(memory_layers, "_representatives", lambda kinds: ([*range(len(kinds))], [1] * len(kinds)))
    assert measure_step(config, settings(**changes)) == few


def test_layers_of_two_kinds_are_not_mixed_up() -> None:
    kept, repeats = memory_layers._representatives([*"aaaaa", *"bb", *"cccc"])
    assert kept == [0, 1, 4, 5, 6, 7, 8, 10] and repeats == [1, 3, 1, 1, 1, 1, 2, 1]


# ---------------------------------------------------------------------------------------------------------- identities


def size(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_those_of_the_model(dtype: str) -> None:
    chosen = settings(dtype=dtype)
    model = real_model(chosen)
    weights = estimate(small_config(), chosen).weights
    parts = {"vision encoder": model.vision_model, "projector": model.mlp1, "language model": model.language_model}
    assert weights == {name: size([*part.parameters(), *part.buffers()]) for name, part in parts.items()}


def test_a_tied_head_counts_once() -> None:
    untied, tied = small_config(), small_config()
    tied.llm_config.tie_word_embeddings = True
    weights = [sum(estimate(config, settings()).weights.values()) for config in (untied, tied)]
    assert weights[0] - weights[1] == 4 * VOCABULARY * 96


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "sgd"])
def test_states_are_those_of_the_optimizer(optim: str, dtype: str) -> None:
    chosen = settings(optim=optim, dtype=dtype, freeze_backbone=True)
    trained = [parameter for parameter in real_model(chosen).parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(trained) if optim == "sgd" else torch.optim.AdamW(trained)
    optimizer.step()
    states = (value for state in optimizer.state.values() for name, value in state.items() if name != "step")
    expected = size(value for value in states if value is not None)
    assert estimate(small_config(), chosen).states == expected
    assert expected == (0 if optim == "sgd" else 2 * size(trained))


def test_eight_bit_adam_keeps_embeddings_and_small_tensors_in_float32() -> None:
    chosen = settings(optim="adamw_bnb_8bit")
    model = real_model(chosen)
    embedding = model.get_input_embeddings().weight
    small = [p.numel() for p in model.parameters() if p is embedding or p.numel() < 4096]
    large = [p.numel() for p in model.parameters() if not (p is embedding or p.numel() < 4096)]
    expected = 8 * sum(small) + sum(2 * n + 2 * 4 * n / 256 for n in large)
    assert estimate(small_config(), chosen).states == pytest.approx(expected, rel=1e-3)


def test_zero_divides_one_thing_after_the_other() -> None:
    chosen = {"mixed_precision": "bf16", "dtype": "bfloat16", "gradient_accumulation_steps": 2}
    number = sum(parameter.numel() for parameter in real_model(settings()).parameters())
    found = {}
    for kind in ("zero1", "zero2", "zero3"):
        found[kind] = estimate(small_config(), settings(**chosen, sharding=kind, devices=4))
        assert found[kind].states == 12 * number // 4  # float32 weights and moments: ZeRO, arXiv 1910.02054
    weights = {kind: sum(result.weights.values()) for kind, result in found.items()}
    buffers = size(real_model(settings()).buffers())
    assert weights["zero1"] == weights["zero2"] == 2 * number + buffers
    assert weights["zero3"] == pytest.approx(2 * number / 4 + buffers, abs=8)
    gradients = {
        kind: measure_step(small_config(), result.settings).peak["gradients"] for kind, result in found.items()
    }
    assert gradients == {"zero1": 2 * number, "zero2": 2 * number // 4, "zero3": 2 * number // 4}


def test_zero_has_the_buffers_of_the_bundled_configurations() -> None:
    read = {kind: json.loads((RECIPES / "deepspeed" / f"{kind}.json").read_text()) for kind in ("zero2", "zero3")}
    chosen = {"mixed_precision": "bf16", "dtype": "bfloat16", "devices": 4, "freeze_backbone": True}
    found = {kind: estimate(small_config(), settings(**chosen, sharding=kind)) for kind in ("zero1", "zero2", "zero3")}
    model = real_model(settings(freeze_backbone=True))
    everything = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert found["zero1"].communication == 2 * trained  # fewer than a bucket holds
    assert found["zero2"].communication == 2 * 2 * read["zero2"]["zero_optimization"]["reduce_bucket_size"]
    bucket = read["zero3"]["zero_optimization"]["reduce_bucket_size"]
    assert found["zero3"].communication == 2 * (bucket + everything)
    assert found["zero3"].gradients == 2 * trained // 4  # a buffer that is there all the time


def test_buffers_of_the_backward_pass_are_gone_in_the_update() -> None:
    chosen = {"tokens": 40, "tiles": 0, "supervised": 1, "gradient_checkpointing": True, "devices": 2}
    result = estimate(small_config(), settings(**chosen, optim="adamw_torch"))
    trained = size(real_model(settings()).parameters())
    assert (result.moment, result.activations) == ("optimizer step", {})
    assert (result.gradients, result.temporary, result.communication) == (trained, trained, trained)
    assert estimate(small_config(), settings(**chosen, optim="adamw_torch"), cuda=False).temporary < trained


def test_fsdp_keeps_float32_for_the_update() -> None:
    chosen = settings(mixed_precision="bf16", dtype="bfloat16", sharding="fsdp", devices=4, freeze_backbone=True)
    result, model = estimate(small_config(), chosen), real_model(chosen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert result.states == 8 * trained // 4
    buffers = size(model.vision_model.buffers())
    assert (
        result.weights["vision encoder"] == 2 * sum(p.numel() for p in model.vision_model.parameters()) // 4 + buffers
    )
    assert result.weights["projector"] == 4 * sum(p.numel() for p in model.mlp1.parameters()) // 4


def test_ddp_holds_a_copy_of_the_gradients() -> None:
    alone, shared = (estimate(small_config(), settings(devices=devices)) for devices in (1, 8))
    assert shared.settings.kind == "ddp" and alone.communication == 0
    assert shared.communication == size(real_model(settings()).parameters())
    assert shared.peak == alone.peak + shared.communication


def test_accumulated_gradients_are_there_during_the_whole_step() -> None:
    step = measure_step(small_config(), settings(gradient_accumulation_steps=2))
    assert step.peak["gradients"] == size(real_model(settings()).parameters())


@needs_peft
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_weights_are_those_of_bitsandbytes(kind: str) -> None:
    config, chosen = small_config(), settings(**LORA, dtype="bfloat16")
    model = InternVLChatModel._from_config(config, dtype=torch.bfloat16).language_model
    linear = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    replaced = {id(module.weight) for module in linear}
    rest = size(p for p in model.parameters() if id(p) not in replaced) + size(model.buffers())
    numbers = [module.weight.numel() for module in linear]
    if kind == "nf4":  # half a byte, a byte for 64, four for 64 * 256
        expected = sum(n / 2 + n / 64 + 4 * -(-n // (64 * 256)) for n in numbers)
    else:
        expected = sum(n + 4 * module.out_features for n, module in zip(numbers, linear, strict=True))
    weights = estimate(config, dataclasses.replace(chosen, quantization=kind)).weights["language model"]
    assert weights == rest + expected


def test_a_released_model_has_its_published_size() -> None:
    config = families.find("InternVL3-8B").config()
    weights = estimate(config, RunSettings(tokens=1024, tiles=1)).weights
    assert sum(weights.values()) == pytest.approx(2 * families.parameter_count(config)["total"], rel=1e-5)


# ---------------------------------------------------------------------------------------------------------- directions


def peak(**changes: Any) -> int:
    return estimate(small_config(), settings(**changes)).peak


@pytest.mark.newest
@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({}, {"tokens": 192}),
        ({"tiles": 1}, {"tiles": 3}),
        ({}, {"per_device_train_batch_size": 2}),
        ({"gradient_checkpointing": True}, {}),
        ({"freeze_backbone": True}, {}),
        ({"freeze_llm": True}, {}),
        ({"freeze_backbone": True}, {"freeze_backbone": True, "unfreeze_vit_layers": -1}),
        ({"dtype": "bfloat16"}, {}),
        ({"optim": "sgd"}, {}),
        ({"packing": True, "attn_implementation": "flash_attention_2"}, {"packing": True}),
        ({"attn_implementation": "sdpa"}, {"attn_implementation": "eager"}),
        ({"supervised": 8}, {}),
        ({}, {"pairs": True}),
        ({"pairs": True, "tiles": 3}, {"per_device_train_batch_size": 2, "tiles": 3}),  # tiles once
        ({"pairs": True}, {"pairs": True, "reference": "copy"}),
        ({"pairs": True, "packing": True, "tiles": 1}, {"pairs": True, "packing": True, "tiles": 2}),
    ],
    ids=str,
)
def test_more_takes_more(less: dict, more: dict) -> None:
    assert peak(**less) < peak(**more)


@needs_peft
def test_lora_over_fewer_bits_takes_less() -> None:
    sizes = [peak(**LORA, dtype="bfloat16", quantization=kind) for kind in (None, "int8", "nf4")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3


def test_a_frozen_encoder_keeps_nothing() -> None:
    result = estimate(small_config(), settings(freeze_backbone=True))
    assert "vision encoder" not in result.activations and "language model" in result.activations


def test_memory_is_reported_by_part_and_adds_up() -> None:
    result = estimate(small_config(), settings(), overhead=5)
    assert sum(value for _, value in result.rows()) == result.peak == result.total - 5
    assert result.verdict(result.total) == "tight" and result.verdict(result.total - 1) == "does not fit"
    assert result.verdict(2 * result.total) == "fits"


def test_leaves_the_configuration_alone() -> None:
    config = small_config()
    before = config.to_dict()
    estimate(config, settings())
    assert config.to_dict() == before


# --------------------------------------------------------------------------------------------------- errors, interface


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 32}, "tokens=32 cannot hold the 32 visual tokens of tiles=2"),
        ({"dtype": "float64"}, "dtype must be one of"),
        ({"sharding": "zero4"}, "sharding must be one of"),
        ({"devices": 0}, "devices must be at least 1, got 0"),
        ({"devices": 2, "sharding": "none"}, "choose ddp"),
        ({"packing": True, "per_device_train_batch_size": 2}, "per_device_train_batch_size at 1"),
        ({"quantization": "nf4", "sharding": "zero3"}, "not sharded"),
        ({"quantization": "nf4"}, "cannot be trained itself"),
        ({"reference": "copy"}, "without pairs"),
        ({"reference": "other", "pairs": True}, "reference must be one of None, copy, checkpoint"),
        ({"reference": "copy", "pairs": True, **LORA, "quantization": "nf4"}, "adapters need no reference"),
        ({"pairs": True, "packing": True, "tiles": 4}, "in a pack of pairs each tile stands twice"),
        ({"optim": "adamw_8bit", "sharding": "zero2"}, "not modelled"),
        ({"supervised": 96}, "supervised must be 1 to tokens - 1 = 95"),
        ({"freeze_backbone": True, "freeze_llm": True, "freeze_mlp": True}, "no parameter to train"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_bad_settings_say_what_to_do(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimate(small_config(), settings(**changes))


SMALL_BUFFERS = {
    "reduce_bucket_size": 1000, "overlap_comm": True, "stage3_max_live_parameters": 1000, "sub_group_size": 1000,
}  # fmt: skip


@needs_peft
@pytest.mark.newest
@pytest.mark.parametrize("small_buffers", [True, False])
def test_suggestions_help_and_can_be_run(small_buffers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if small_buffers:
        monkeypatch.setattr(memory_sharing, "_deepspeed", lambda kind: SMALL_BUFFERS)
    config = small_config(layers=(2, 2))
    chosen = settings(per_device_train_batch_size=2, gradient_checkpointing=False, mixed_precision="bf16")
    before, found = estimate(config, chosen).total, suggestions(config, chosen)
    labels = [label for label, _ in found]
    assert labels[:2] == ["gradient checkpointing", "flash attention, which needs no mask"]
    assert any("QLoRA" in label for label in labels)
    # DeepSpeed's real buffers, gigabytes, are larger than this model.
    assert any("zero3 on 8 devices" in label for label in labels) == small_buffers
    assert all(result.total < before for _, result in found)
    assert found[-1][1] == estimate(config, found[-1][1].settings)
