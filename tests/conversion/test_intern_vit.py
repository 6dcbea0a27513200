"""InternViT checkpoints as files: older names, fewer layers, other sizes, out of chat models; and what is refused."""

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tiny import CHAT, CHECKPOINTS, LLAMA, QWEN2, assert_same, expected, vision_6b_dict, vision_dict

from internvl_hub.checkpoint_internvl import CheckpointError
from internvl_hub.configuration_intern_vit import InternVisionConfig
from internvl_hub.conversion import intern_vit
from internvl_hub.conversion.intern_vit import (
    cut_layers,
    extract_encoder,
    from_pytorch,
    keep_layers,
    rename_from_pytorch,
    rename_to_pytorch,
    resize_positions,
    to_pytorch,
)
from internvl_hub.modeling_intern_vit import InternVisionModel
from internvl_hub.weights_internvl import LayoutError

ROOT = Path(__file__).resolve().parents[2]
FLAVOURS = pytest.mark.parametrize("fields", [vision_dict(), vision_6b_dict()], ids=["300m", "6b"])
HEADS, LAYERS = 2, 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _model(fields: dict[str, Any], **changes: Any) -> InternVisionModel:
    """Five layers that all matter, with parameters that differ from each other everywhere."""
    config = InternVisionConfig(**{**fields, "num_hidden_layers": LAYERS, "initializer_factor": 1.0, **changes})
    model = InternVisionModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 10)
    return model


@pytest.fixture(params=[vision_dict(), vision_6b_dict()], ids=["300m", "6b"])
def model(request: pytest.FixtureRequest) -> InternVisionModel:
    return _model(request.param)


@pytest.fixture
def source(model: InternVisionModel, tmp_path: Path) -> Path:
    """The checkpoint of `model`, with the preprocessing file and licence of a release."""
    model.save_pretrained(tmp_path / "source")
    values = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56, "image_mean": MEAN}
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(values))
    (tmp_path / "source" / "LICENSE").write_text("MIT")
    return tmp_path / "source"


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {k: x for path in sorted(folder.glob("*.safetensors")) for k, x in load_file(path).items()}


def _edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**_json(path), **changes}))


# ----------------------------------------------------------------------------------------------------------- the names


@pytest.mark.parametrize(
    ("older", "own"),
    [
        ("cls_token", "embeddings.class_embedding"),
        ("pos_embed", "embeddings.position_embedding"),
        ("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
        ("patch_embed.proj.bias", "embeddings.patch_embedding.bias"),
        ("blocks.0.norm1.weight", "encoder.layers.0.norm1.weight"),
        ("blocks.47.norm2.bias", "encoder.layers.47.norm2.bias"),
        ("blocks.7.attn.qkv.weight", "encoder.layers.7.attn.qkv.weight"),
        ("blocks.7.attn.q_norm.weight", "encoder.layers.7.attn.q_norm.weight"),
        ("blocks.7.attn.proj.bias", "encoder.layers.7.attn.proj.bias"),
        ("blocks.11.ls1.gamma", "encoder.layers.11.ls1"),
        ("blocks.11.ls2.gamma", "encoder.layers.11.ls2"),
        ("blocks.11.mlp.fc2.bias", "encoder.layers.11.mlp.fc2.bias"),
    ],
)
def test_each_name_has_one_counterpart(older: str, own: str) -> None:
    assert rename_from_pytorch({older: 1}).weights == {own: 1}
    assert rename_to_pytorch({own: 1}) == {older: 1}


def test_all_names_there_and_back(model: InternVisionModel) -> None:
    state = model.state_dict()
    older = rename_to_pytorch(state)
    assert len(older) == len(state) and not older.keys() & state.keys()
    back = rename_from_pytorch(older)
    assert_same(back.weights, state)
    assert back.left_out == []


def test_parts_beside_the_encoder_are_reported() -> None:
    beside = ["clip_projector.norm1_q.weight", "transformer.layers.0.mlp.up_proj.weight", "text_projection"]
    beside += ["logit_scale", "norm.running_mean", "head.weight"]
    renamed = rename_from_pytorch(dict.fromkeys(["cls_token", *beside], 1))
    assert (renamed.left_out, renamed.weights) == (beside, {"embeddings.class_embedding": 1})


@pytest.mark.parametrize(
    "name",
    [
        "embeddings.class_embedding",
        "blocks.0.norm1.weight.gamma",
        "blocks.0.ls1",
        "blocks.x.ls1.gamma",
        "norm1.weight",
    ],
)
def test_unknown_older_names(name: str) -> None:
    with pytest.raises(LayoutError, match=f"not names of the older InternViT layout: {name};"):
        rename_from_pytorch({"cls_token": 1, name: 1})


@pytest.mark.parametrize(
    "name", ["cls_token", "vision_model.embeddings.class_embedding", "encoder.layers.0.ls1.gamma"]
)
def test_unknown_own_names(name: str) -> None:
    with pytest.raises(LayoutError, match=f"{name} is no tensor of InternVisionModel"):
        rename_to_pytorch({name: 1})


# ----------------------------------------------------------------------------------------------------- the older files


def _rms(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def _by_older_names(weights: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """The last hidden state in float64, written from the original's description and its older names."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    width = w["cls_token"].shape[-1]

    def norm(states: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = w[f"{name}.weight"], w.get(f"{name}.bias")
        return _rms(states, weight) if bias is None else F.layer_norm(states, (width,), weight, bias, 1e-6)

    def linear(states: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(states, w[f"{name}.weight"], w.get(f"{name}.bias"))

    def attention(states: torch.Tensor, block: str) -> torch.Tensor:
        query, key, value = linear(states, f"{block}.attn.qkv").split(width, dim=-1)
        if f"{block}.attn.q_norm.weight" in w:
            query, key = (_rms(x, w[f"{block}.attn.{n}_norm.weight"]) for x, n in ((query, "q"), (key, "k")))
        heads = [x.unflatten(-1, (HEADS, -1)).movedim(-2, 1) for x in (query, key, value)]
        scores = torch.einsum("bhid,bhjd->bhij", heads[0], heads[1]) / (width / HEADS) ** 0.5
        mixed = torch.einsum("bhij,bhjd->bihd", scores.softmax(-1), heads[2])
        return linear(mixed.flatten(2), f"{block}.attn.proj")

    patches = F.conv2d(pixels.double(), w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    states = torch.cat([w["cls_token"].expand(len(pixels), 1, width), patches.flatten(2).transpose(1, 2)], dim=1)
    states = states + w["pos_embed"]
    for i in range(LAYERS):
        block = f"blocks.{i}"
        states = states + w[f"{block}.ls1.gamma"] * attention(norm(states, f"{block}.norm1"), block)
        inner = F.gelu(linear(norm(states, f"{block}.norm2"), f"{block}.mlp.fc1"))
        states = states + w[f"{block}.ls2.gamma"] * linear(inner, f"{block}.mlp.fc2")
    return states


def _older(model: InternVisionModel) -> dict[str, torch.Tensor]:
    """Renamed by plain text replacement, not by the code under test."""
    pairs = [("embeddings.class_embedding", "cls_token"), ("embeddings.position_embedding", "pos_embed")]
    pairs += [("embeddings.patch_embedding", "patch_embed.proj"), ("encoder.layers", "blocks")]
    pairs += [("ls1", "ls1.gamma"), ("ls2", "ls2.gamma")]
    renamed = {}
    for name, tensor in model.state_dict().items():
        for old, new in pairs:
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("wrapped", [True, False], ids=["module", "bare"])
@torch.no_grad()
def test_older_file_becomes_an_encoder(model: InternVisionModel, wrapped: bool, tmp_path: Path) -> None:
    older = _older(model)
    beside = {"clip_projector.norm1_q.weight": torch.ones(4), "logit_scale": torch.ones([])}
    torch.save({"module": older | beside} if wrapped else older | beside, tmp_path / "old.pth")
    assert from_pytorch(tmp_path / "old.pth", tmp_path / "new", num_attention_heads=HEADS) == list(beside)
    again, info = InternVisionModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    ignored = {"initializer_factor", "initializer_range", "dtype", "auto_map", "architectures", "_name_or_path"}
    values, wanted = (
        {k: v for k, v in config.to_dict().items() if k not in ignored} for config in (again.config, model.config)
    )
    assert values == wanted
    pixels = torch.randn(2, 3, 56, 56)
    reference = _by_older_names(older, pixels)
    torch.testing.assert_close(again(pixels).last_hidden_state.double(), reference, rtol=1e-4, atol=1e-4)


def test_older_file_there_and_back(model: InternVisionModel, source: Path, tmp_path: Path) -> None:
    file = to_pytorch(source, tmp_path / "files" / "old.pth")
    content = torch.load(file, weights_only=True)
    assert list(content) == ["module"]
    assert_same(content["module"], _older(model))
    assert from_pytorch(file, tmp_path / "back", num_attention_heads=HEADS) == []
    assert_same(_weights(tmp_path / "back"), _weights(source))
    assert [path.name for path in file.parent.iterdir()] == ["old.pth"]
    with pytest.raises(FileExistsError, match="choose a new file"):
        to_pytorch(source, file)


@pytest.mark.parametrize(("width", "heads"), [(3200, 25), (1024, 16)])
def test_heads_of_released_widths_are_known(width: int, heads: int, tmp_path: Path) -> None:
    fields = vision_dict(hidden_size=width, num_attention_heads=heads, intermediate_size=2, num_hidden_layers=1)
    with torch.device("meta"):
        shapes = _older(InternVisionModel(InternVisionConfig(**fields)))
    weights = {name: torch.zeros(x.shape, dtype=torch.bfloat16) for name, x in shapes.items()}
    torch.save(weights, tmp_path / "old.pth")
    from_pytorch(tmp_path / "old.pth", tmp_path / "new")
    config = InternVisionConfig.from_pretrained(tmp_path / "new")
    assert (config.num_attention_heads, config.dtype) == (heads, torch.bfloat16)


def test_older_files_are_mapped_and_their_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **options: seen.update(options) or load(*args, **options))
    torch.save({"cls_token": torch.ones(1), "args": argparse.Namespace(lr=1)}, tmp_path / "old.pth")
    with pytest.raises(CheckpointError, match="not a file of tensors alone") as caught:
        from_pytorch(tmp_path / "old.pth", tmp_path / "new")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()
    assert (seen["mmap"], seen["weights_only"]) == (True, True)


def _save_legacy(path: Path) -> None:
    torch.save({"cls_token": torch.ones(1)}, path, _use_new_zipfile_serialization=False)


def _save_list(path: Path) -> None:
    torch.save([torch.ones(1)], path)


def _save_step(path: Path) -> None:
    torch.save({"cls_token": torch.ones(1), "step": 3}, path)


def _save_projector(path: Path) -> None:
    torch.save({"module": {"clip_projector.bias": torch.ones(1)}}, path)


def _save_numbered(path: Path) -> None:
    torch.save({0: torch.ones(1)}, path)


def _save_nothing(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda path: None, CheckpointError, "there is no file"),
        (_save_nothing, CheckpointError, "fetch it again"),
        (_save_legacy, CheckpointError, "since version 1.6"),
        (_save_list, LayoutError, "neither bare nor under 'module'"),
        (_save_step, LayoutError, "neither bare nor under 'module'"),
        (_save_numbered, LayoutError, "neither bare nor under 'module'"),
        (_save_projector, LayoutError, "it lacks cls_token, patch_embed.proj.weight, pos_embed and 1 more"),
    ],
)
def test_unusable_older_files(
    write: Callable[[Path], None], error: type[Exception], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "old.pth")
    with pytest.raises(error, match=message) as caught:
        from_pytorch(tmp_path / "old.pth", tmp_path / "new")
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_incomplete_older_files(model: InternVisionModel, tmp_path: Path) -> None:
    older = _older(model)
    torch.save(older, tmp_path / "old.pth")
    with pytest.raises(ValueError, match="no released InternViT has width 16: pass num_attention_heads"):
        from_pytorch(tmp_path / "old.pth", tmp_path / "new")
    with pytest.raises(ValueError, match="not divisible by num_attention_heads 3"):
        from_pytorch(tmp_path / "old.pth", tmp_path / "new", num_attention_heads=3)
    for wrong in ({"blocks.999999999.ls1.gamma": torch.ones(16)}, {"pos_embed": torch.ones(16)}):
        torch.save(older | wrong, tmp_path / "old.pth")
        with pytest.raises(LayoutError, match="its patch_embed, pos_embed or numbering of blocks is another"):
            from_pytorch(tmp_path / "old.pth", tmp_path / "new", num_attention_heads=HEADS)
    del older["blocks.2.ls1.gamma"]
    torch.save(older, tmp_path / "old.pth")
    with pytest.raises(LayoutError, match="lacks encoder.layers.2.ls1"):
        from_pytorch(tmp_path / "old.pth", tmp_path / "new", num_attention_heads=HEADS)


# -------------------------------------------------------------------------------------------------------- fewer layers


@torch.no_grad()
def test_cut_layers_are_the_first_ones(model: InternVisionModel, source: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    assert cut_layers(source, tmp_path / "cut", 2) == tmp_path / "cut"
    short, info = InternVisionModel.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"]) and short.config.num_hidden_layers == 2
    pixels = torch.randn(2, 3, 56, 56)
    states = model(pixels, output_hidden_states=True).hidden_states
    assert torch.equal(short(pixels).last_hidden_state, states[-4])
    kept = {
        k: x for k, x in _weights(source).items() if not k.startswith(tuple(f"encoder.layers.{i}." for i in (2, 3, 4)))
    }
    assert_same(_weights(tmp_path / "cut"), kept)
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


def test_files_around_the_weights(source: Path, tmp_path: Path) -> None:
    cut_layers(source, tmp_path / "cut", 2)
    names = ["configuration_intern_vit.py", "modeling_intern_vit.py"]
    wanted = {"LICENSE", "config.json", "model.safetensors", "preprocessor_config.json", *names}
    assert {path.name for path in (tmp_path / "cut").iterdir()} == wanted
    for name in names:
        assert (tmp_path / "cut" / name).read_bytes() == (ROOT / name).read_bytes()
    assert (tmp_path / "cut" / "LICENSE").read_text() == "MIT"
    preprocessor = "preprocessor_config.json"
    assert _json(tmp_path / "cut" / preprocessor) == _json(source / preprocessor)
    old, new = _json(source / "config.json"), _json(tmp_path / "cut" / "config.json")
    assert new == {**old, "num_hidden_layers": 2}


@torch.no_grad()
def test_keep_layers_in_memory(model: InternVisionModel) -> None:
    pixels = torch.randn(1, 3, 56, 56)
    states = model(pixels, output_hidden_states=True).hidden_states
    assert keep_layers(model, 4) is model and model.config.num_hidden_layers == 4
    assert torch.equal(model(pixels).last_hidden_state, states[-2])


@pytest.mark.parametrize("layers", [0, -1, 5, 6])
def test_impossible_cuts(layers: int, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {layers} of 5 layers"):
        cut_layers(source, tmp_path / "cut", layers)
    with pytest.raises(ValueError, match=f"cannot keep {layers} of 5 layers"):
        keep_layers(InternVisionModel.from_pretrained(source), layers)
    assert not (tmp_path / "cut").exists()


# --------------------------------------------------------------------------------------------------------- other sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_resized_encoder_computes_what_interpolation_did(
    model: InternVisionModel, dtype: torch.dtype, tmp_path: Path
) -> None:
    model.to(dtype).save_pretrained(tmp_path / "source")
    resize_positions(tmp_path / "source", tmp_path / "large", 84)
    small, large = (InternVisionModel.from_pretrained(tmp_path / name) for name in ("source", "large"))
    old, new = small.embeddings.position_embedding, large.embeddings.position_embedding
    assert new.shape == (1, 37, 16) and new.dtype == old.dtype == dtype and large.config.image_size == 84
    assert torch.equal(new[:, 0], old[:, 0])
    pixels = torch.randn(2, 3, 84, 84)
    assert torch.equal(large(pixels).last_hidden_state, small(pixels).last_hidden_state)
    others = {k: x for k, x in _weights(tmp_path / "source").items() if "position" not in k}
    assert_same({k: x for k, x in _weights(tmp_path / "large").items() if "position" not in k}, others)


@pytest.mark.parametrize(
    ("size", "crop", "new_size", "new_crop"),
    [
        (56, 56, 84, 84),
        ({"shortest_edge": 56}, {"height": 56, "width": 56}, {"shortest_edge": 84}, {"height": 84, "width": 84}),
        ({"height": 56, "width": 56}, 56, {"height": 84, "width": 84}, 84),
    ],
)
def test_preprocessing_follows_the_size(
    size: Any, crop: Any, new_size: Any, new_crop: Any, source: Path, tmp_path: Path
) -> None:
    file = source / "preprocessor_config.json"
    _edit_json(file, size=size, crop_size=crop)
    resize_positions(source, tmp_path / "large", 84)
    assert _json(tmp_path / "large" / file.name) == {**_json(file), "size": new_size, "crop_size": new_crop}


@pytest.mark.parametrize(("size", "hint"), [(60, "take 56 or 70"), (13, "take 14 or 28"), (0, "14"), (-14, "14")])
def test_impossible_sizes(size: int, hint: str, source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"image_size {size} is no multiple of the patch size 14: .*{hint}"):
        resize_positions(source, tmp_path / "large", size)


# -------------------------------------------------------------------------------------------------- out of chat models


def _chat(name: str, folder: Path, **config: Any) -> Path:
    shutil.copytree(CHAT / name, folder, ignore=shutil.ignore_patterns("expected*"))
    _edit_json(folder / "config.json", **config)
    return folder


@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.no_grad()
def test_encoder_comes_out_whole(name: str, tmp_path: Path) -> None:
    extract_encoder(CHAT / name, tmp_path / "encoder")
    prefix = "vision_model."
    inside = {k.removeprefix(prefix): x for k, x in _weights(CHAT / name).items() if k.startswith(prefix)}
    written = load_file(tmp_path / "encoder" / "model.safetensors")
    assert_same(written, {k: inside[k] for k in written})
    assert written.keys() == inside.keys()
    model, info = InternVisionModel.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert not (info["missing_keys"] or info["unexpected_keys"])
    reference = expected(name)
    output = model(reference["pixel_values"]).last_hidden_state
    torch.testing.assert_close(output, reference["vit.last_hidden_state"], rtol=1e-4, atol=1e-5)
    preprocessor = _json(tmp_path / "encoder" / "preprocessor_config.json")
    assert (preprocessor["size"], preprocessor["crop_size"]) == ({"shortest_edge": 56}, {"height": 56, "width": 56})
    assert (tuple(preprocessor["image_mean"]), tuple(preprocessor["image_std"])) == (MEAN, STD)


def test_sharded_and_pickled_chat_checkpoints(tmp_path: Path) -> None:
    folder, weights = _chat(QWEN2, tmp_path / "chat"), _weights(CHAT / QWEN2)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    extract_encoder(folder, tmp_path / "from_bin")
    (folder / "pytorch_model.bin").unlink()
    names, weight_map = sorted(weights), {}
    for i in range(3):
        shard = f"model-0000{i + 1}-of-00003.safetensors"
        save_file({name: weights[name] for name in names[i::3]}, folder / shard)
        weight_map |= dict.fromkeys(names[i::3], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    extract_encoder(folder, tmp_path / "from_shards")
    assert_same(_weights(tmp_path / "from_shards"), _weights(tmp_path / "from_bin"))
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the shard model-00002-of-00003"):
        extract_encoder(folder, tmp_path / "from_rest")


def test_means_of_the_chat_processor_are_kept(tmp_path: Path) -> None:
    folder = _chat(QWEN2, tmp_path / "chat")
    processor = {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "max_dynamic_patch": 12}}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    extract_encoder(folder, tmp_path / "encoder")
    values = _json(tmp_path / "encoder" / "preprocessor_config.json")
    assert (values["image_mean"], values["image_std"]) == ([0.5] * 3, [0.25] * 3)
    assert "max_dynamic_patch" not in values and values["image_processor_type"] == "CLIPImageProcessor"


@pytest.mark.parametrize(("name", "warns"), [(LLAMA, True), (QWEN2, False)])
def test_another_layer_than_the_last_is_mentioned(
    name: str, warns: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(intern_vit.logger, "warning", said.append)
    extract_encoder(CHAT / name, tmp_path / "encoder")
    assert [("hidden state -4 of 6 layers" in line) for line in said] == [True] * warns


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(cut_layers, (1,)), (resize_positions, (84,)), (to_pytorch, ())],
    ids=["cut", "resize", "to_pytorch"],
)
def test_chat_checkpoints_are_no_encoders(
    function: Callable[..., Any], arguments: tuple[int, ...], tmp_path: Path
) -> None:
    with pytest.raises(LayoutError, match="whole chat checkpoint: take its encoder out first"):
        function(CHAT / QWEN2, tmp_path / "out", *arguments)
    with pytest.raises(CheckpointError, match="no folder here"):
        function(tmp_path / "absent", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no config.json"):
        function(tmp_path / "empty", tmp_path / "out", *arguments)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"vision_config": None}, "is no chat checkpoint"),
        ({"vision_config": {"model_type": "internvl_vision"}}, "has a 'internvl_vision' encoder"),
        ({"use_backbone_lora": 16}, "LoRA adapters inside its encoder: merge them"),
        ({"vision_config": vision_dict()}, "other shapes than its configuration says|lacks|has, beside"),
    ],
)
def test_chat_checkpoints_without_a_usable_encoder(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = _chat(QWEN2, tmp_path / "chat", **config)
    with pytest.raises(LayoutError, match=message) as caught:
        extract_encoder(folder, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("encoder.layers.1.ls2"), "lacks encoder.layers.1.ls2"),
        (lambda w: w.update(stray=torch.ones(1)), "beside an InternViT of its configuration, stray"),
        (lambda w: w.update({"encoder.layers.1.ls2": torch.ones(3)}), "other shapes .* for encoder.layers.1.ls2"),
    ],
)
def test_weights_that_do_not_fit(
    edit: Callable[[dict[str, torch.Tensor]], Any], message: str, source: Path, tmp_path: Path
) -> None:
    weights = _weights(source)
    edit(weights)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for function, argument in ((resize_positions, 84), (cut_layers, 4)):
        with pytest.raises(LayoutError, match=message):
            function(source, tmp_path / "out", argument)
    with pytest.raises(LayoutError, match=message):
        to_pytorch(source, tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_targets_in_use_are_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    cut_layers(source, tmp_path / "empty", 2)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    for target in (source, tmp_path / "empty", tmp_path / "used", source / "config.json"):
        with pytest.raises(FileExistsError, match="not empty|is a file"):
            cut_layers(source, target, 3)
    assert {path.name for path in (tmp_path / "used").iterdir()} == {"thesis.tex"}


def test_failure_while_writing_leaves_nothing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(intern_vit, "_write_preprocessor", fail)
    with pytest.raises(OSError, match="disk full"):
        cut_layers(source, tmp_path / "cut", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
