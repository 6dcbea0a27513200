"""Models quantized by real backends: what is replaced, what is not, how far it is off, saved folders, training.

The arithmetic is judged by feeding layers the identity, which gives back the weights that they multiply by. Which
modules are left alone by default is `test_quantization.py`; accuracy is `benchmarks/quantization_accuracy.py`.
"""

import copy
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import CHAT, QWEN2, chat_config, llm_dict, vision_dict
from torch import nn
from transformers import BitsAndBytesConfig, InternVLForConditionalGeneration, PreTrainedModel, TorchAoConfig

from internvl_hub import modeling_internvl_chat
from internvl_hub.conversion.convert import convert
from internvl_hub.conversion.doctor import inspect
from internvl_hub.examples.internvl_tiny import evaluate
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.quantization_internvl import KEPT_MODULES, misread_layers, refuse_repacked
from internvl_hub.training.arguments import InternVLTrainingArguments, ModelArguments
from internvl_hub.training.building import build
from internvl_hub.training.tuning import prepare_for_tuning
from internvl_hub.upload_to_hub import gather

# Groups of 64 and of 32 must divide the widths: all released models' do, those of the other tiny models do not.
WIDTHS = {"hidden_size": 64, "intermediate_size": 128}
NATIVE_LIST = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]  # as docs/quantization.md gives it
LOADED = """
import sys
sys.modules["internvl_hub"] = None
import torch, transformers
found = {}
for folder in sys.argv[1:]:
    model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules.")
    with torch.no_grad():
        found[folder] = model(**torch.load("asked.pt")).logits
torch.save(found, "logits.pt")
"""


def _torchao(bits: int) -> Any:
    quantization = importlib.import_module("torchao.quantization")
    if bits == 8:
        return quantization.Int8WeightOnlyConfig()
    mapping = importlib.import_module("torchao.quantization.quant_primitives").MappingType.ASYMMETRIC
    group = quantization.PerGroup(32)
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group, mapping_type=mapping)


SETTINGS: dict[str, Callable[..., Any]] = {
    "bitsandbytes-int8": lambda **kept: BitsAndBytesConfig(load_in_8bit=True, **kept),
    "bitsandbytes-nf4": lambda **kept: BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **kept),
    "torchao-int8": lambda **kept: TorchAoConfig(_torchao(8), **kept),
    "torchao-int4": lambda **kept: TorchAoConfig(_torchao(4), **kept),
}
EIGHT_BITS = [method for method in SETTINGS if method.endswith("int8")]


@cache
def _has_backend(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True


@pytest.fixture(params=list(SETTINGS))
def method(request: pytest.FixtureRequest) -> str:
    """A method whose backend is installed."""
    return _installed(request.param)


def _installed(method: str) -> str:
    package = method.split("-")[0]
    if not _has_backend(package):
        pytest.skip(f"needs {package}")
    return method


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of width 64 with its code, as it lies on the Hub."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("quantized")
    vision = vision_dict(hidden_size=32, intermediate_size=64)
    config = chat_config(llm_config=llm_dict("qwen2", **WIDTHS), vision_config=vision)
    InternVLChatModel(config).save_pretrained(path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(CHAT / QWEN2 / name, path / "checkpoint" / name)
    gather(path / "checkpoint", path / "hub")
    return path / "hub"


@pytest.fixture(scope="module")
def asked() -> dict[str, torch.Tensor]:
    """A prompt with a tile of four visual tokens."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.tensor([[1, 20, 11, 11, 11, 11, 30, 40, 50, 60]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56, generator=generator)}


def _quantized(folder: Path, method: str, model_class: Any = InternVLChatModel, **kept: Any) -> Any:
    return model_class.from_pretrained(folder, quantization_config=SETTINGS[method](**kept)).eval()


def _logits(model: Any, asked: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**asked).logits


def _weight(layer: nn.Module) -> torch.Tensor:
    """What a layer multiplies by, whatever it keeps: (out, in)."""
    with torch.no_grad():
        output = layer(torch.eye(layer.in_features))
    return (output if layer.bias is None else output - layer.bias).T


def _check(model: Any, plain: nn.Module, decoder: str, method: str) -> None:
    """Every linear layer of `decoder`, and no other parameter, is quantized, to the precision of the method."""
    layers = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in layers if name.startswith(decoder)}
    kept = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in inside:
            assert type(kept[name].data) is torch.Tensor and torch.equal(kept[name], parameter), name
    low, high = (1e-3, 0.015) if method in EIGHT_BITS else (0.04, 0.12)
    for name in sorted(inside):
        weight = plain.get_submodule(name).weight
        error = (_weight(model.get_submodule(name)) - weight).norm() / weight.norm()
        assert low < error < high, f"{name}: {error}"


def test_the_decoder_is_quantized_and_nothing_else(method: str, folder: Path, asked: dict) -> None:
    plain, model = InternVLChatModel.from_pretrained(folder).eval(), _quantized(folder, method)
    with torch.no_grad():
        features = [each.extract_feature(asked["pixel_values"]) for each in (model, plain)]
    assert torch.equal(*features)
    _check(model, plain, "language_model.model.layers.", method)
    with pytest.raises(AssertionError):
        _check(plain, plain, "language_model.model.layers.", method)
    assert not torch.equal(_logits(model, asked), _logits(plain, asked))


def test_an_empty_list_quantizes_the_encoder_too(folder: Path, asked: dict) -> None:
    """What the default is for: these features differ."""
    method = _installed("torchao-int8")
    plain, model = InternVLChatModel.from_pretrained(folder), _quantized(folder, method, modules_to_not_convert=[])
    with torch.no_grad():
        features = [each.eval().extract_feature(asked["pixel_values"]) for each in (model, plain)]
    assert not torch.equal(*features)


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_answers_of_eight_bits(name: str, root: Path) -> None:
    """InternVL-tiny on the pictures of the repository, each answer longer than chance."""
    folder = root / "checkpoints" / "internvl-tiny"
    plain, processor = evaluate.load(folder)
    rows = json.loads((root / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))
    options = {"max_new_tokens": 40, "do_sample": False}

    def answers(model: Any) -> list[str]:
        tiles = [processor.image_processor(root / "examples" / "images" / row["image"]) for row in rows]
        pixels = [each["pixel_values"] for each in tiles]
        questions = [f"<image>\n{row['turns'][0][0]}" for row in rows]
        counts = [[len(each)] for each in pixels]
        return model.batch_chat(processor.tokenizer, torch.cat(pixels), questions, options, num_patches_list=counts)

    expected = answers(plain.eval())
    assert len(set(expected)) > 3
    assert answers(_quantized(folder, _installed(name))) == expected


# ------------------------------------------------------------------------------------------------------- saved folders


def test_saved_model_comes_back_to_the_bit(method: str, folder: Path, asked: dict, tmp_path: Path) -> None:
    model, saved = _quantized(folder, method), tmp_path / "saved"
    model.save_pretrained(saved)  # nf4 before it is used: see test_repacked_weights_are_not_saved
    expected = _logits(model, asked)
    says = json.loads((saved / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    field = "modules_to_not_convert" if method.startswith("torchao") else "llm_int8_skip_modules"
    assert says[field] == list(KEPT_MODULES)
    assert torch.equal(_logits(InternVLChatModel.from_pretrained(saved).eval(), asked), expected)
    found = [(finding.level, finding.message) for finding in inspect(saved).findings if finding.area == "weights"]
    assert {level for level, _ in found} == {"ok"} and "layers are quantized" in found[0][1]


def test_saved_models_load_as_remote_code(folder: Path, asked: dict, tmp_path: Path) -> None:
    """In a process that cannot import this package, every method that is installed here."""
    methods = [method for method in SETTINGS if _has_backend(method.split("-")[0])]
    if not methods:
        pytest.skip("needs bitsandbytes or torchao")
    expected = {}
    for method in methods:
        model = _quantized(folder, method)
        model.save_pretrained(tmp_path / method)
        expected[method] = _logits(model, asked)
    torch.save(asked, tmp_path / "asked.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", LOADED, *methods]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "logits.pt")
    assert list(found) == methods
    assert all(torch.equal(found[method], expected[method]) for method in methods)


def test_repacked_weights_are_not_saved(folder: Path, asked: dict, tmp_path: Path) -> None:
    """Refused exactly where bitsandbytes would write something else; whether it does depends on the CPU."""
    model = _quantized(folder, _installed("bitsandbytes-nf4"))
    refuse_repacked(model)
    model.save_pretrained(tmp_path / "unused")
    expected = _logits(model, asked)
    try:
        refuse_repacked(model)
        repacked = False
    except ValueError as error:
        assert "before anything is computed" in str(error)
        repacked = True
        with pytest.raises(ValueError, match="repacked"):
            model.save_pretrained(tmp_path / "refused")
        assert not (tmp_path / "refused").exists()
    PreTrainedModel.save_pretrained(model, tmp_path / "used")
    again = _logits(InternVLChatModel.from_pretrained(tmp_path / "used").eval(), asked)
    assert torch.equal(again, expected) != repacked


def test_misread_widths_are_found(root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against bitsandbytes' own kernel on the same codes and scales laid out as one row, where it is right."""
    method = _installed("bitsandbytes-nf4")
    functional = importlib.import_module("bitsandbytes.functional")
    said: list[str] = []
    monkeypatch.setattr(modeling_internvl_chat.logger, "warning", said.append)
    assert misread_layers(_quantized(folder, method)) == [] == said
    model = _quantized(root / "checkpoints" / "internvl-tiny", method)  # width 160
    found, wrong = misread_layers(model), []
    for name, layer in model.named_modules():
        state = getattr(getattr(layer, "weight", None), "quant_state", None)
        if state is None:
            continue
        flat = copy.copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))
        right = functional.dequantize_4bit(layer.weight.data, flat).reshape(state.shape)
        if not torch.equal(functional.dequantize_4bit(layer.weight.data, state), right):
            wrong.append(name)
    assert found == wrong and len(found) == 24  # all but the four of width 448
    assert ["24 layers wrongly" in words for words in said] == [True]


def test_native_copy_by_transformers_own_class(method: str, folder: Path, asked: dict, tmp_path: Path) -> None:
    """With the list of the documentation; without it transformers quantizes encoder and projector too."""
    convert(folder, tmp_path / "native", "native", progress=False)
    field = "modules_to_not_convert" if method.startswith("torchao") else "llm_int8_skip_modules"
    native = InternVLForConditionalGeneration
    plain = native.from_pretrained(tmp_path / "native").eval()
    model = _quantized(tmp_path / "native", method, native, **{field: NATIVE_LIST})
    _check(model, plain, "model.language_model.layers.", method)
    fresh = _quantized(tmp_path / "native", method, native, **{field: NATIVE_LIST})
    fresh.save_pretrained(tmp_path / "saved")
    again = native.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(_logits(again, asked), _logits(fresh, asked))
    everything = _quantized(tmp_path / "native", method, native, **{field: ["lm_head"]})
    with pytest.raises(AssertionError):
        _check(everything, plain, "model.language_model.layers.", method)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_train_on_a_quantized_base(kind: str, folder: Path, asked: dict, tmp_path: Path) -> None:
    """QLoRA: the same list by default; adapters and projector learn, the quantized weights stay."""
    pytest.importorskip("peft")
    _installed("bitsandbytes-" + kind)
    settings = ModelArguments(model_name_or_path=str(folder), quantization=kind, dtype="float32")
    model, used = build(settings).model, build(settings).model  # a use in evaluation mode may repack the weights
    assert model.config.quantization_config.llm_int8_skip_modules == list(KEPT_MODULES)
    _check(used, InternVLChatModel.from_pretrained(folder), "language_model.model.layers.", f"bitsandbytes-{kind}")
    arguments = InternVLTrainingArguments(
        output_dir=str(tmp_path), use_llm_lora=4, freeze_backbone=True, freeze_llm=True, freeze_mlp=False, use_cpu=True
    )
    tuned = prepare_for_tuning(model, arguments).train()
    trained = {name: parameter for name, parameter in tuned.named_parameters() if parameter.requires_grad}
    assert {("lora_" in name, "mlp1" in name) for name in trained} == {(True, False), (False, True)}
    frozen = {name: p.detach().clone() for name, p in tuned.named_parameters() if name not in trained}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = tuned(**asked, labels=asked["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(parameter, frozen[name]) for name, parameter in tuned.named_parameters() if name in frozen)
    assert any(not parameter.is_floating_point() for parameter in frozen.values())


def test_saved_weights_are_smaller(folder: Path, tmp_path: Path) -> None:
    """Eight bits are a byte and a scale per row, measured on the tensors of the file."""
    method = _installed("torchao-int8")
    _quantized(folder, method).save_pretrained(tmp_path)
    name = "language_model.model.layers.0.mlp.up_proj"
    stored = {key: value for key, value in load_file(tmp_path / "model.safetensors").items() if key.startswith(name)}
    assert sum(value.nbytes for value in stored.values()) <= 128 * 64 + 128 * (4 + 1)
