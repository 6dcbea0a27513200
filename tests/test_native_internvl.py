"""Checkpoints of transformers' own InternVL and adapter-wrapped originals through this package's classes."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CHAT, INTERNLM2, LLAMA, PHI3, QWEN2, assert_same, batch, chat_config, llm_dict, load
from transformers import AutoModel, GenerationConfig, InternVLForConditionalGeneration

from internvl_hub.checkpoint_internvl import LazyTensor, scan_weights
from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.native_internvl import (
    NativeLayoutError,
    config_from_native,
    config_to_native,
    tensors_to_native,
    tensors_to_original,
)
from internvl_hub.weights_internvl import LayoutError, merge_lora

NATIVE = pytest.mark.parametrize("name", [QWEN2, INTERNLM2, PHI3])
BACKENDS = pytest.mark.parametrize("backend", ["qwen2", "qwen3", "qwen3_moe", "gpt_oss", "llama", "phi3", "internlm2"])
RANK = 4


def _native_folder(model: InternVLChatModel, source: Path, folder: Path) -> Path:
    """A checkpoint as transformers' own class has it; `source` holds the original weights."""
    folder.mkdir(exist_ok=True)
    tensors = tensors_to_native(scan_weights(source).checked().tensors, model.config)
    weights = {name: tensor.read() for name, tensor in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_to_native(model.config)))
    return folder


def _complete(report: dict[str, Any]) -> bool:
    return not any(report.values())


# ---------------------------------------------------------------------------------------------------- loading natively


@NATIVE
@torch.no_grad()
def test_native_checkpoint_gives_the_same_model(name: str, tmp_path: Path) -> None:
    model, inputs = load(name), batch(name, labels=False)
    folder = _native_folder(model, CHAT / name, tmp_path / "native")
    own, report = InternVLChatModel.from_pretrained(folder, output_loading_info=True)
    assert _complete(report) and type(own.language_model) is type(model.language_model)
    assert torch.equal(own(**inputs).logits, model(**inputs).logits)
    own.save_pretrained(tmp_path / "saved")
    assert_same(load_file(tmp_path / "saved" / "model.safetensors"), load_file(CHAT / name / "model.safetensors"))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == "internvl_chat"


@NATIVE
def test_configuration_comes_back_whole(name: str) -> None:
    config = load(name).config
    again = InternVLChatConfig.from_dict(config_from_native(json.loads(json.dumps(config_to_native(config)))))
    ours, theirs = config.to_dict(), again.to_dict()
    ignored = {"_name_or_path", "transformers_version"}
    assert {k: v for k, v in theirs.items() if k not in ignored} == {k: v for k, v in ours.items() if k not in ignored}


@BACKENDS
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@torch.no_grad()
def test_every_backend_goes_there_and_back(backend: str, tied: bool, tmp_path: Path) -> None:
    model = InternVLChatModel(chat_config(backend, llm_config=llm_dict(backend, tie_word_embeddings=tied))).eval()
    model.save_pretrained(tmp_path / "original")
    folder = _native_folder(model, tmp_path / "original", tmp_path / "native")
    native, report = InternVLForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert _complete(report)
    ids, pixels = torch.tensor([[3, 9, *[11] * 4, 10, 40, 41]]), torch.randn(1, 3, 56, 56)
    expected = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(native.eval()(input_ids=ids, pixel_values=pixels).logits, expected)
    own, report = InternVLChatModel.from_pretrained(folder, output_loading_info=True)
    assert _complete(report) and torch.equal(own(input_ids=ids, pixel_values=pixels).logits, expected)
    back = tensors_to_original(scan_weights(folder).checked().tensors, model.config)
    weights = {name: tensor.read() for name, tensor in back.items()}
    assert_same(weights, load_file(tmp_path / "original" / "model.safetensors"))


@torch.no_grad()
def test_files_written_by_transformers_itself(tmp_path: Path) -> None:
    """Without this package's record: fields come from what every release has in common."""
    model, inputs = load(QWEN2), batch(QWEN2, labels=False)
    folder = _native_folder(model, CHAT / QWEN2, tmp_path / "native")
    native = InternVLForConditionalGeneration.from_pretrained(folder)
    delattr(native.config, "internvl_original")
    native.generation_config = GenerationConfig(eos_token_id=[4, 7])
    native.save_pretrained(tmp_path / "theirs")
    assert "internvl_original" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    own = InternVLChatModel.from_pretrained(tmp_path / "theirs")
    assert torch.equal(own(**inputs).logits, model(**inputs).logits)
    config = own.config
    assert (config.template, config.max_dynamic_patch, config.use_thumbnail) == ("internvl2_5", 12, True)
    assert own.generation_config.eos_token_id == [4, 7]
    assert isinstance(AutoModel.from_pretrained(tmp_path / "theirs").language_model, torch.nn.Module)


@NATIVE
@torch.no_grad()
def test_native_offload_and_precision(name: str, tmp_path: Path) -> None:
    folder = _native_folder(load(name), CHAT / name, tmp_path / "native")
    inputs, expected = batch(name, labels=False), load(name)
    device_map = {"vision_model": "cpu", "mlp1": "cpu", "language_model": "disk"}
    own = InternVLChatModel.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert torch.equal(own(**inputs).logits, expected(**inputs).logits)
    half = InternVLChatModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert_same(half.state_dict(), load(name, dtype=torch.bfloat16).state_dict())


# ----------------------------------------------------------------------------------------------- what does not convert


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"pad2square": True}, "pad2square"),
        ({"img_context_token_id": None}, "img_context_token_id unknown"),
        ({"dynamic_image_size": True, "use_thumbnail": False}, "dynamic_image_size without use_thumbnail"),
        ({"use_llm_lora": 8}, "adapters stored in the weights"),
        (
            {"vision_config": {"qk_normalization": True, "layer_norm_eps": 1e-3, "hidden_size": 16,
                               "num_attention_heads": 2}},
            "layer_norm_eps 0.001 with qk_normalization",
        ),
    ],
)  # fmt: skip
def test_what_native_classes_cannot_represent(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NativeLayoutError, match=message):
        config_to_native(chat_config(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_layer": [-1, -2]}, "several vision_feature_layers"),
        ({"vision_feature_select_strategy": "full"}, "'full'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
        ({"vision_config": {"use_mean_pooling": False}}, "use_mean_pooling"),
        ({"vision_config": {"image_size": [448, 224]}}, "not square"),
    ],
)
def test_what_the_original_layout_cannot_represent(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(NativeLayoutError, match=message):
        config_from_native({**config_to_native(chat_config()), **changes})


def test_pixel_shuffle_v1_checkpoint_is_refused() -> None:
    with pytest.raises(NativeLayoutError, match="pixel shuffle is v2"):
        config_to_native(load(LLAMA).config)


# ------------------------------------------------------------------------------------------------------------ adapters


def _wrapped(model: InternVLChatModel, folder: Path) -> InternVLChatModel:
    """As the original training script saves after `wrap_backbone_lora` and `wrap_llm_lora` (alpha = 2 * rank)."""
    model = copy.deepcopy(model)
    for tower, targets in (("vision_model", ["qkv", "fc1"]), ("language_model", ["q_proj", "v_proj", "down_proj"])):
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets)
        wrapped = get_peft_model(getattr(model, tower), lora)
        for key, parameter in wrapped.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.2)
        setattr(model, tower, wrapped)
    folder.mkdir()
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = {**model.config.to_dict(), "use_backbone_lora": RANK, "use_llm_lora": RANK}
    (folder / "config.json").write_text(json.dumps(values, default=str))
    return model.eval()


@torch.no_grad()
def test_adapters_are_merged_when_read(tmp_path: Path) -> None:
    base, inputs = load(QWEN2), batch(QWEN2, labels=False)
    wrapped = _wrapped(base, tmp_path / "wrapped")
    merged, report = InternVLChatModel.from_pretrained(tmp_path / "wrapped", output_loading_info=True)
    assert _complete(report)
    assert (merged.config.use_backbone_lora, merged.config.use_llm_lora) == (0, 0)
    expected = wrapped(**inputs).logits
    torch.testing.assert_close(merged(**inputs).logits, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(base(**inputs).logits, expected, atol=0.1)
    untouched = {k: v for k, v in load_file(tmp_path / "wrapped" / "model.safetensors").items() if "mlp1" in k}
    assert_same({k: v for k, v in merged.state_dict().items() if "mlp1" in k}, untouched)


@torch.no_grad()
def test_adapters_on_fused_internlm2_weights(tmp_path: Path) -> None:
    weights = load_file(CHAT / INTERNLM2 / "model.safetensors")
    name = "language_model.model.layers.0.attention.wqkv.weight"
    rows, columns = weights[name].shape
    down, up = torch.randn(RANK, columns), torch.randn(rows, RANK)
    prefix = "language_model.base_model.model."
    stored = {k.replace("language_model.", prefix): v for k, v in weights.items() if k != name}
    module = prefix + name.removeprefix("language_model.").removesuffix(".weight")
    stored |= {f"{module}.base_layer.weight": weights[name], f"{module}.lora_A.default.weight": down,
               f"{module}.lora_B.default.weight": up}  # fmt: skip
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((CHAT / INTERNLM2 / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "use_llm_lora": RANK}))
    merged = InternVLChatModel.from_pretrained(tmp_path)
    merged.save_pretrained(tmp_path / "saved")
    expected = {**weights, name: weights[name] + 2.0 * up @ down}
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert_same(saved, expected, rtol=1e-6, atol=1e-6)
    assert_same({k: v for k, v in saved.items() if k != name}, {k: v for k, v in weights.items() if k != name})


def test_half_an_adapter_is_an_error() -> None:
    stored = {"language_model.base_model.model.x.base_layer.weight": torch.zeros(2, 2),
              "language_model.base_model.model.x.lora_A.default.weight": torch.zeros(1, 2)}  # fmt: skip
    with pytest.raises(LayoutError, match="adapter of language_model.x.weight is incomplete"):
        merge_lora(stored)


def test_bfloat16_weights_are_rounded_once() -> None:
    base, down, up = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((8, 8), (RANK, 8), (8, RANK)))
    stored = {"m.base_layer.weight": base, "m.lora_A.default.weight": down, "m.lora_B.default.weight": up}
    lazy = merge_lora({name: LazyTensor.of(tensor, name) for name, tensor in stored.items()})["m.weight"]
    assert (lazy.shape, lazy.dtype, set(lazy.sources)) == ((8, 8), torch.bfloat16, set(stored))
    exact = base.double() + 2 * up.double() @ down.double()
    assert (lazy.read().double() - exact).abs().max() <= exact.abs().max() * 2**-8


def test_building_with_adapters_says_what_happens(caplog: pytest.LogCaptureFixture) -> None:
    config = chat_config(use_llm_lora=16)
    model = InternVLChatModel(config)
    assert "use_llm_lora 16: adapters in a checkpoint are merged" in caplog.text
    assert (model.config.use_llm_lora, config.use_llm_lora) == (0, 16)
