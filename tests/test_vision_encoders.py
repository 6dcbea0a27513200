"""InternViT on its own: sizes and names of the releases, what the layers compute, loading as released, image features.

What the encoder does inside a chat model is tested in `test_modeling_intern_vit.py`.
"""

import inspect
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CHAT, LLAMA, PHI3, QWEN2, assert_same, expected, load, vision_6b_dict, vision_dict
from transformers import PretrainedConfig
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see versions.py

from internvl_hub.configuration_intern_vit import InternVisionConfig
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_intern_vit import InternVisionModel

ROOT = Path(__file__).resolve().parents[1]
FLAVOURS = pytest.mark.parametrize("fields", [vision_dict(), vision_6b_dict()], ids=["300m", "6b"])
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# As released: InternViT-6B-448px-V1-5 (without norm_type) and the encoder of InternVL3-1B (with the dead keys), tiny.
CONFIG_6B = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_intern_vit.InternVisionConfig",
        "AutoModel": "modeling_intern_vit.InternVisionModel",
    },
    "drop_path_rate": 0.0,
    "dropout": 0.0,
    "hidden_act": "gelu",
    "hidden_size": 16,
    "image_size": 56,
    "initializer_factor": 0.1,
    "initializer_range": 1e-10,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "patch_size": 14,
    "qk_normalization": True,
    "qkv_bias": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.2",
    "use_flash_attn": True,
}
CONFIG_300M = {
    **CONFIG_6B,
    "_name_or_path": "OpenGVLab/InternViT-6B-448px-V1-5",
    "norm_type": "layer_norm",
    "qk_normalization": False,
    "qkv_bias": True,
    "use_flash_attn": False,
    "capacity_factor": 1.2,
    "laux_allreduce": "all_nodes",
    "moe_intermediate_size": 768,
    "noisy_gate_policy": "RSample_before",
    "num_experts": 8,
    "shared_expert_intermediate_size": 3072,
    "use_bfloat16": True,
    "use_moe": False,
    "use_rts": False,
}
RELEASES = pytest.mark.parametrize("config", [CONFIG_6B, CONFIG_300M], ids=["6b", "300m"])
PREPROCESSOR = {
    "crop_size": 56,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 56,
}


def _shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the released weights, without asking the model."""
    width, inner, patch = config["hidden_size"], config["intermediate_size"], config.get("patch_size", 14)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (1, 1, width),
        "embeddings.patch_embedding.weight": (width, 3, patch, patch),
        "embeddings.patch_embedding.bias": (width,),
        "embeddings.position_embedding": (1, 1 + (config["image_size"] // patch) ** 2, width),
    }
    layer: dict[str, tuple[int, ...]] = {"attn.qkv.weight": (3 * width, width), "attn.proj.weight": (width, width)}
    layer |= {"mlp.fc1.weight": (inner, width), "mlp.fc1.bias": (inner,), "mlp.fc2.weight": (width, inner)}
    vectors = ["attn.proj.bias", "mlp.fc2.bias", "norm1.weight", "norm2.weight", "ls1", "ls2"]
    vectors += ["norm1.bias", "norm2.bias"] if config.get("norm_type") == "layer_norm" else []
    vectors += ["attn.q_norm.weight", "attn.k_norm.weight"] if config["qk_normalization"] else []
    layer |= dict.fromkeys(vectors, (width,)) | ({"attn.qkv.bias": (3 * width,)} if config["qkv_bias"] else {})
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"encoder.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def _released(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Writes a tiny encoder as the Hub has it; returns its weights."""
    weights = {name: (torch.randn(shape) / 4).to(torch.bfloat16) for name, shape in _shapes(config).items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return weights


def _fresh(fields: dict[str, Any], **changes: Any) -> InternVisionModel:
    """An encoder whose layers matter: with the default layer scale of 0.1 they hardly change anything."""
    return InternVisionModel(InternVisionConfig(**{**fields, "initializer_factor": 1.0, **changes})).eval()


# ----------------------------------------------------------------------------------------------- sizes of the releases

_6B = {"image_size": 448}
_300M = {
    "image_size": 448, "hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "qkv_bias": True,
    "num_hidden_layers": 24, "qk_normalization": False, "norm_type": "layer_norm",
}  # fmt: skip


def _variant(width: int, heads: int, ratio: int, layers: int) -> dict[str, int]:
    """Of the first paper's size search."""
    sizes = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": ratio * width}
    return {**sizes, "num_hidden_layers": layers}


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        pytest.param({}, 5_902_793_600, id="6B-224px"),
        pytest.param(_6B, 5_905_251_200, id="6B-448px-V1-0"),
        pytest.param({**_6B, "num_hidden_layers": 45}, 5_536_496_000, id="6B-448px-V1-2,V1-5,V2_5"),
        pytest.param(_300M, 304_012_288, id="300M-448px,V2_5"),
        pytest.param(_variant(3968, 62, 4, 32), 6_050_973_824, id="a"),
        pytest.param(_variant(3200, 50, 4, 48), 5_902_793_600, id="e"),
        pytest.param(_variant(2496, 39, 8, 48), 5_984_846_400, id="g"),
        pytest.param(_variant(2816, 44, 4, 64), 6_094_677_248, id="i"),
        pytest.param(_variant(2496, 39, 4, 80), 5_985_325_632, id="m"),
    ],
)
def test_parameter_counts(fields: dict[str, Any], parameters: int) -> None:
    with torch.device("meta"):
        model = InternVisionModel(InternVisionConfig(**fields))
    assert sum(p.numel() for p in model.parameters()) == parameters


@FLAVOURS
def test_names_and_shapes(fields: dict[str, Any]) -> None:
    state = _fresh(fields).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == _shapes(fields)


# ----------------------------------------------------------------------------------------------- what a layer computes


@torch.no_grad()
def test_queries_are_normalised_over_all_heads() -> None:
    """A norm per head would hide the scale of one head's queries from the others."""
    attention = _fresh(vision_6b_dict()).encoder.layers[0].attn
    seen: list[torch.Tensor] = []
    attention.q_norm.register_forward_hook(lambda _module, _args, output: seen.append(output))
    states = torch.randn(1, 5, 16)
    attention(states)
    attention.qkv.weight[:8] *= 10  # the queries of head 0 of 2
    attention(states)
    query = states.double() @ attention.qkv.weight[:16].double().T
    by_hand = query * (query.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    torch.testing.assert_close(seen[1].double(), by_hand, rtol=1e-5, atol=1e-6)
    shrunk = seen[1][..., 8:].norm() / seen[0][..., 8:].norm()
    assert shrunk < 0.5, "the other head's queries must feel it"


@FLAVOURS
@torch.no_grad()
def test_projection_rows_are_queries_keys_values(fields: dict[str, Any]) -> None:
    """With keys of zero every token attends to all alike, so attention is the mean of the values."""
    attention = _fresh(fields).encoder.layers[0].attn
    attention.qkv.weight[16:32] = 0
    states = torch.randn(2, 5, 16)
    values = states @ attention.qkv.weight[32:].T
    if attention.qkv.bias is not None:
        attention.qkv.bias.normal_()
        attention.qkv.bias[16:32] = 0
        values += attention.qkv.bias[32:]
    by_hand = values.mean(1) @ attention.proj.weight.T + attention.proj.bias
    torch.testing.assert_close(attention(states), by_hand[:, None].expand(2, 5, 16), rtol=1e-4, atol=1e-5)


@FLAVOURS
@torch.no_grad()
def test_layer_scale_of_zero_leaves_the_embeddings(fields: dict[str, Any]) -> None:
    model, pixels = _fresh(fields), torch.randn(2, 3, 56, 56)
    output = model(pixels).last_hidden_state
    assert not torch.allclose(output, model.embeddings(pixels), atol=0.1)
    for layer in model.encoder.layers:
        layer.ls1.zero_()
        layer.ls2.zero_()
    assert torch.equal(model(pixels).last_hidden_state, model.embeddings(pixels))


@FLAVOURS
@torch.no_grad()
def test_tiles_do_not_see_each_other(fields: dict[str, Any]) -> None:
    model, pixels = _fresh(fields), torch.randn(3, 3, 56, 56)
    single = torch.cat([model(tile[None]).last_hidden_state for tile in pixels])
    torch.testing.assert_close(model(pixels).last_hidden_state, single, rtol=1e-5, atol=1e-5)


@FLAVOURS
@torch.no_grad()
def test_order_of_patches_is_in_their_positions_alone(fields: dict[str, Any]) -> None:
    """Patches exchanged in the picture and in the position table exchange their outputs, and nothing else."""
    model, pixels, order = _fresh(fields), torch.randn(1, 3, 56, 56), torch.randperm(16)
    before = model(pixels).last_hidden_state
    patches = pixels.reshape(3, 4, 14, 4, 14).permute(1, 3, 0, 2, 4).reshape(16, 3, 14, 14)[order]
    shuffled = patches.reshape(4, 4, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(1, 3, 56, 56)
    table = model.embeddings.position_embedding
    table[:, 1:] = table[:, 1:][:, order]
    after = model(shuffled).last_hidden_state
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[:, 1:], before[:, 1:][:, order], rtol=1e-5, atol=1e-5)


@FLAVOURS
@torch.no_grad()
def test_fourth_state_from_the_end_is_what_three_layers_fewer_give(fields: dict[str, Any]) -> None:
    deep, short = _fresh(fields, num_hidden_layers=8), _fresh(fields, num_hidden_layers=5)
    short.load_state_dict({name: deep.state_dict()[name] for name in short.state_dict()})
    pixels = torch.randn(2, 3, 56, 56)
    states = deep(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 9
    assert torch.equal(states[-4], short(pixels).last_hidden_state)


@torch.no_grad()
def test_tuple_with_hidden_states() -> None:
    model, pixels = _fresh(vision_dict()), torch.randn(1, 3, 56, 56)
    last, pooled, states = model(pixels, output_hidden_states=True, return_dict=False)
    assert torch.equal(pooled, last[:, 0]) and torch.equal(states[-1], last)
    assert torch.equal(states[0], model.embeddings(pixels))


@FLAVOURS
@torch.no_grad()
def test_fresh_deep_encoder_neither_dies_nor_explodes(fields: dict[str, Any]) -> None:
    """At the depth of the 6B encoder, with the initializer_range and layer scale of its release."""
    deep = {"num_hidden_layers": 48, "hidden_size": 64, "intermediate_size": 256, "initializer_factor": 0.1}
    model = _fresh(fields, **deep, initializer_range=1e-10)
    states = model(torch.randn(2, 3, 56, 56), output_hidden_states=True).hidden_states
    spread = torch.tensor([state.std() for state in states])
    assert 0.5 < spread[-1] / spread[0] < 5
    steps = torch.tensor([(b - a).std() for a, b in zip(states, states[1:], strict=False)])
    assert steps.min() > 1e-4, "every layer does something"


# ------------------------------------------------------------------------------------------------- loading as released


@RELEASES
@torch.no_grad()
def test_released_encoder_loads_whole(config: dict[str, Any], tmp_path: Path) -> None:
    weights = _released(tmp_path, config)
    model, info = InternVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"])
    assert_same(model.state_dict(), weights)
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.norm_type == config.get("norm_type", "rms_norm")
    assert model(torch.randn(1, 3, 56, 56)).last_hidden_state.isfinite().all()


class _OriginalConfig(PretrainedConfig):
    """The arguments of the original class, which reads each of them under this name (and no other)."""

    model_type = "intern_vit_6b"

    def __init__(
        self, num_channels=3, patch_size=14, image_size=224, qkv_bias=False, hidden_size=3200, num_attention_heads=25,
        intermediate_size=12800, qk_normalization=True, num_hidden_layers=48, use_flash_attn=True, hidden_act="gelu",
        norm_type="rms_norm", layer_norm_eps=1e-6, dropout=0.0, drop_path_rate=0.0, attention_dropout=0.0,
        initializer_range=0.02, initializer_factor=0.1, **kwargs,
    ) -> None:  # fmt: skip
        self.seen = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().__init__(**kwargs)


@RELEASES
def test_saved_encoder_is_in_the_released_form(config: dict[str, Any], tmp_path: Path) -> None:
    weights = _released(tmp_path / "hub", config)
    InternVisionModel.from_pretrained(tmp_path / "hub").save_pretrained(tmp_path / "own")
    assert_same(load_file(tmp_path / "own" / "model.safetensors"), weights)
    saved = json.loads((tmp_path / "own" / "config.json").read_text())
    assert (saved["model_type"], saved["architectures"]) == (config["model_type"], config["architectures"])
    assert saved["auto_map"] == config["auto_map"]
    seen = _OriginalConfig(**saved).seen
    names = set(inspect.signature(_OriginalConfig).parameters) - {"use_flash_attn", "kwargs"}
    assert {k: seen[k] for k in names} == {"norm_type": "rms_norm", **{k: config[k] for k in names & config.keys()}}
    assert not [key for key in saved if key.startswith(("moe_", "laux_")) or "num_experts" in key]


def test_shards_and_pickled_weights_load(tmp_path: Path) -> None:
    weights = _released(tmp_path / "hub", CONFIG_6B)
    model = InternVisionModel.from_pretrained(tmp_path / "hub")
    model.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    (tmp_path / "hub" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "hub" / "pytorch_model.bin")
    for folder in ("shards", "hub"):
        assert_same(InternVisionModel.from_pretrained(tmp_path / folder).state_dict(), weights)


def test_use_flash_attn_as_scripts_pass_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _released(tmp_path, CONFIG_6B)
    with caplog.at_level(logging.WARNING):
        model = InternVisionModel.from_pretrained(tmp_path, use_flash_attn=True)
    assert [r.message for r in caplog.records if "flash-attn is not usable here" in r.message]
    assert model.config._attn_implementation == "sdpa"
    caplog.clear()
    plain = InternVisionModel.from_pretrained(tmp_path, use_flash_attn=False)
    assert plain.config._attn_implementation == "sdpa" and not caplog.records


@pytest.mark.parametrize("name", [QWEN2, LLAMA, PHI3])
@torch.no_grad()
def test_encoder_of_a_chat_checkpoint(name: str, tmp_path: Path) -> None:
    model, info = InternVisionModel.from_pretrained(CHAT / name, output_loading_info=True)
    assert not (info["missing_keys"] or info["mismatched_keys"])
    assert {key.split(".")[0] for key in info["unexpected_keys"]} == {"language_model", "mlp1"}
    reference = expected(name)
    output = model(reference["pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, reference["vit.last_hidden_state"], rtol=1e-4, atol=1e-5)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    model.save_pretrained(tmp_path)
    assert_same(load_file(tmp_path / "model.safetensors"), load(name).vision_model.state_dict())


def test_encoder_of_a_sharded_chat_checkpoint(tmp_path: Path) -> None:
    chat = load(QWEN2, dtype=torch.bfloat16)
    chat.save_pretrained(tmp_path, max_shard_size="100KB")
    model, info = InternVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and model.dtype == torch.bfloat16
    assert_same(model.state_dict(), chat.vision_model.state_dict())


def test_other_encoders_are_refused(tmp_path: Path) -> None:
    for values in ({"model_type": "clip_vision_model"}, {"vision_config": {"model_type": "internvl_vision"}}):
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match="holds a '(clip_vision_model|internvl_vision)' encoder, not 'intern_vit"):
            InternVisionModel.from_pretrained(tmp_path)


_ALONE = """
import sys
sys.modules["internvl_hub"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # see tests/versions.py
folder, out = sys.argv[1:]
options = {"torch_dtype": torch.float32, "low_cpu_mem_usage": True, "trust_remote_code": True, "use_flash_attn": False}
model, info = AutoModel.from_pretrained(folder, output_loading_info=True, **options)
assert not (info["missing_keys"] or info["unexpected_keys"] or info["mismatched_keys"]), info
assert type(model).__module__.startswith("transformers_modules."), type(model)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).torch_dtype == torch.bfloat16
image = Image.open(f"{out}/image.png")
pixels = AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    features = model.eval()(pixels).last_hidden_state
extract = pipeline("image-feature-extraction", model=folder, trust_remote_code=True, dtype=torch.float32)
piped = extract(f"{out}/image.png", return_tensors=True)
save_file({"pixels": pixels, "features": features, "piped": piped}, f"{out}/alone.safetensors")
model.save_pretrained(f"{out}/saved")
AutoModel.from_pretrained(f"{out}/saved", trust_remote_code=True)
"""


@torch.no_grad()
def test_auto_classes_need_nothing_but_the_folder(tmp_path: Path) -> None:
    """The code of a model card, in a process that cannot import the package."""
    folder = tmp_path / "encoder"
    weights = _released(folder, CONFIG_6B)
    for name in ("configuration_intern_vit.py", "modeling_intern_vit.py"):
        shutil.copyfile(ROOT / name, folder / name)
    _picture(56, 56).save(tmp_path / "image.png")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", _ALONE, str(folder), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = load_file(tmp_path / "alone.safetensors")
    own = InternVisionModel.from_pretrained(folder, dtype=torch.float32)(alone["pixels"]).last_hidden_state
    assert torch.equal(alone["features"], own)
    torch.testing.assert_close(alone["piped"], own, rtol=1e-4, atol=1e-4)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert_same(saved, {name: tensor.float() for name, tensor in weights.items()})


# ------------------------------------------------------------------------------------------------------- pixels for it


def _picture(width: int, height: int) -> Image.Image:
    """Smooth colours with noise: resizing it by another rule would show."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    noise = np.random.default_rng(width * 1000 + height).integers(-40, 40, smooth.shape)
    return Image.fromarray((smooth + noise).clip(0, 255).astype(np.uint8))


def _normalised(image: Image.Image) -> torch.Tensor:
    values = (np.asarray(image, dtype=np.float64) / 255 - MEAN) / STD
    return torch.from_numpy(values).permute(2, 0, 1).float()[None]


@pytest.fixture(params=[56, {"shortest_edge": 56}], ids=["number", "dictionary"])
def encoder_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the preprocessing file of a release, in both ways to write its size."""
    values = {**PREPROCESSOR, "size": request.param}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    return tmp_path


def _pixels(folder: Path, image: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """What the release's own file says (centre crop), and the single stretched tile of our processor."""
    cropped = AutoImageProcessor.from_pretrained(folder, backend="pil")(image, return_tensors="pt")
    stretch = InternVLImageProcessor.from_pretrained(folder, dynamic_image_size=False)
    return cropped["pixel_values"], stretch(image)["pixel_values"]


@pytest.mark.parametrize("edge", [56, 40, 57, 200])
def test_square_images_need_no_choice(edge: int, encoder_folder: Path) -> None:
    cropped, stretched = _pixels(encoder_folder, _picture(edge, edge))
    assert cropped.shape == (1, 3, 56, 56)
    assert torch.equal(cropped, stretched)


@pytest.mark.parametrize(("width", "height"), [(200, 100), (100, 200), (57, 56), (90, 70)])
def test_long_images_are_cropped_or_stretched(width: int, height: int, encoder_folder: Path) -> None:
    image = _picture(width, height)
    cropped, stretched = _pixels(encoder_folder, image)
    wide, high = (int(56 * side / min(width, height)) for side in (width, height))
    left, top = (wide - 56) // 2, (high - 56) // 2
    centre = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + 56, top + 56))
    torch.testing.assert_close(cropped, _normalised(centre), rtol=0, atol=1e-5)
    whole = image.resize((56, 56), Image.Resampling.BICUBIC)
    torch.testing.assert_close(stretched, _normalised(whole), rtol=0, atol=1e-5)
    assert (cropped - stretched).abs().max() > 0.1
