"""Key maps and tensor operations, checked by running the other implementation on the converted weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHAT, CHECKPOINTS, CONTEXT, INTERNLM2, LLAMA, PHI3, QWEN2, assert_same, batch, load
from transformers import InternVLConfig, InternVLForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.weights_internvl import (
    LayoutError,
    fuse_wqkv,
    internlm2_to_llama,
    llama_to_internlm2,
    native_to_original,
    original_to_native,
    split_wqkv,
)

GROUPS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 4), (8, 2), (4, 1)])
HEAD_DIM, WIDTH = 6, 16


def _weights(name: str) -> dict[str, torch.Tensor]:
    return load_file(CHAT / name / "model.safetensors")


def _llama_weights(name: str, prefix: str = "language_model.") -> dict[str, torch.Tensor]:
    """The language model of an InternLM2 checkpoint under Llama's names, relative to itself."""
    own = {k.removeprefix(prefix): v for k, v in _weights(name).items() if k.startswith(prefix)}
    llm = InternVLChatConfig.from_pretrained(CHAT / name).llm_config
    return internlm2_to_llama(own, llm.num_attention_heads, llm.num_key_value_heads)


# --------------------------------------------------------------------------------------------------- fused projections


@GROUPS
@pytest.mark.parametrize("rest", [(WIDTH,), ()], ids=["weight", "bias"])
def test_split_and_fuse_round_trip(heads: int, kv_heads: int, rest: tuple[int, ...]) -> None:
    fused = torch.randn((heads + 2 * kv_heads) * HEAD_DIM, *rest)
    parts = split_wqkv(fused, heads, kv_heads)
    assert [part.shape[0] for part in parts] == [heads * HEAD_DIM, kv_heads * HEAD_DIM, kv_heads * HEAD_DIM]
    assert all(part.is_contiguous() for part in parts)
    assert torch.equal(fuse_wqkv(*parts, heads, kv_heads), fused)


@GROUPS
def test_projecting_then_splitting_equals_splitting_then_projecting(heads: int, kv_heads: int) -> None:
    """The original code projects once and views the result as (groups, queries + 2, head_dim)."""
    fused, states = torch.randn((heads + 2 * kv_heads) * HEAD_DIM, WIDTH), torch.randn(5, WIDTH)
    group = heads // kv_heads
    projected = (states @ fused.T).view(5, kv_heads, group + 2, HEAD_DIM)
    reference = (projected[:, :, :group], projected[:, :, group], projected[:, :, group + 1])
    for part, expected in zip(split_wqkv(fused, heads, kv_heads), reference, strict=True):
        torch.testing.assert_close(states @ part.T, expected.reshape(5, -1))


def test_rows_stand_where_the_layout_says() -> None:
    """Query head h = kv * g + i, for two groups of two: q0 q1 k0 v0 q2 q3 k1 v1."""
    query, key, value = split_wqkv(torch.arange(8.0), heads=4, kv_heads=2)
    assert (query.tolist(), key.tolist(), value.tolist()) == ([0, 1, 4, 5], [2, 6], [3, 7])


# ----------------------------------------------------------------------------------------------------------- InternLM2


@torch.no_grad()
def test_internlm2_is_llama_with_converted_weights() -> None:
    model, ids = load(INTERNLM2), torch.randint(20, 400, (2, 9))
    fields = model.config.llm_config.to_dict()
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "bias")}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    llama.load_state_dict(_llama_weights(INTERNLM2), strict=True)
    assert torch.equal(llama(input_ids=ids).logits, model(input_ids=ids).logits)
    assert_same(llama.state_dict(), model.language_model.state_dict())


def test_llama_names_pass_unchanged() -> None:
    converted = _llama_weights(INTERNLM2)
    assert_same(internlm2_to_llama(converted, 8, 2), converted)


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 90])
def test_dynamic_rope_beyond_the_trained_length(length: int) -> None:
    """Rope is rescaled for prompts longer than `max_position_embeddings`, as transformers' own Llama does."""
    model = load(INTERNLM2)
    fields = {**model.config.llm_config.to_dict(), "max_position_embeddings": 40}
    fields = {k: v for k, v in fields.items() if k not in ("model_type", "architectures", "bias")}
    llama = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    llama.load_state_dict(_llama_weights(INTERNLM2))
    short = type(model.config.llm_config)(**fields)
    own = type(model.language_model)(short).eval()
    own.load_state_dict(model.language_model.state_dict())
    ids = torch.randint(20, 400, (1, length))
    assert torch.equal(own(input_ids=ids).logits, llama(input_ids=ids).logits)


# ------------------------------------------------------------------------------------------ transformers' own InternVL


def _native_config(config: InternVLChatConfig) -> InternVLConfig:
    vision = config.vision_config
    same = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "hidden_act")
    vision_fields: dict[str, Any] = {name: getattr(vision, name) for name in (*same, "layer_norm_eps", "norm_type")}
    vision_fields |= {"attention_bias": vision.qkv_bias, "use_qk_norm": vision.qk_normalization}
    vision_fields |= {"image_size": [56, 56], "patch_size": [14, 14], "use_mean_pooling": True}
    text = {k: v for k, v in config.llm_config.to_dict().items() if k not in ("bias", "architectures")}
    text["model_type"] = "llama" if text["model_type"] == "internlm2" else text["model_type"]
    return InternVLConfig(
        vision_config=vision_fields,
        text_config=text,
        image_token_id=CONTEXT,
        image_seq_length=4,
        downsample_ratio=config.downsample_ratio,
        vision_feature_layer=config.select_layer,
        tie_word_embeddings=False,
    )


def _native_weights(name: str) -> dict[str, torch.Tensor]:
    weights = _weights(name)
    if name == INTERNLM2:
        weights = {k: v for k, v in weights.items() if not k.startswith("language_model.")}
        weights |= {f"language_model.{k}": v for k, v in _llama_weights(name).items()}
    return original_to_native(weights)


def _native_model(name: str, config: InternVLChatConfig, folder: Path) -> InternVLForConditionalGeneration:
    save_file(_native_weights(name), folder / "model.safetensors", metadata={"format": "pt"})
    _native_config(config).save_pretrained(folder)
    model, report = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    return model.eval()


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, PHI3])
@torch.no_grad()
def test_converted_weights_give_the_same_logits_in_transformers(name: str, tmp_path: Path) -> None:
    model, inputs = load(name), batch(name, labels=False)
    native = _native_model(name, model.config, tmp_path)
    seen = inputs["attention_mask"].bool()
    torch.testing.assert_close(native(**inputs).logits[seen], model(**inputs).logits[seen], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_converted_6b_encoder_gives_the_same_features_in_transformers(tmp_path: Path) -> None:
    """Query and key norms included; pixel shuffle v1 does not exist there, so the encoder alone is compared."""
    model, pixels = load(LLAMA), batch(LLAMA)["pixel_values"]
    hidden = _native_model(LLAMA, model.config, tmp_path).model.vision_tower(pixels).last_hidden_state
    torch.testing.assert_close(hidden, model.vision_model(pixels).last_hidden_state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, PHI3])
def test_names_are_those_that_transformers_saves(name: str, tmp_path: Path) -> None:
    _native_model(name, load(name).config, tmp_path).save_pretrained(tmp_path / "again")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), _native_weights(name))


@pytest.mark.parametrize("name", [QWEN2, PHI3])
def test_native_names_lead_back(name: str, tmp_path: Path) -> None:
    """Those on disk and those that transformers has in memory."""
    assert_same(native_to_original(_native_weights(name)), _weights(name))
    in_memory = _native_model(name, load(name).config, tmp_path).state_dict()
    assert_same(native_to_original(in_memory), _weights(name))


def test_internlm2_names_lead_back() -> None:
    llm = load(INTERNLM2).config.llm_config
    own = {k: v for k, v in _weights(INTERNLM2).items() if k.startswith("language_model.")}
    own = {k.removeprefix("language_model."): v for k, v in own.items()}
    assert_same(llama_to_internlm2(_llama_weights(INTERNLM2), llm.num_attention_heads, llm.num_key_value_heads), own)


@pytest.mark.parametrize(
    ("convert", "name", "message"),
    [
        (original_to_native, "audio_model.weight", "audio_model.weight is no name of the original layout"),
        (native_to_original, "vision_tower.head.weight", "is no name of the native layout"),
        (native_to_original, "vision_tower.encoder.layer.0.attention.q_proj.weight", "has no counterpart .*k_proj"),
    ],
)
def test_foreign_names_are_errors(convert: Any, name: str, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        convert({name: torch.zeros(2)})


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_conversion_loses_no_number(name: str) -> None:
    converted = _native_weights(name)
    assert sum(t.numel() for t in converted.values()) == sum(t.numel() for t in _weights(name).values())
    assert all(key.startswith(("vision_tower.", "multi_modal_projector.", "language_model.")) for key in converted)
