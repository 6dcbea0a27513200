"""Loading and saving: names and bits on disk, device maps, precision, partial checkpoints, and errors that help."""

import importlib.util
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CHAT, CHECKPOINTS, INTERNLM2, LLAMA, PHI3, QWEN2, assert_same, batch, chat_config, load

from internvl_hub.checkpoint_internvl import CheckpointError
from internvl_hub.modeling_internvl_chat import InternVLChatModel

EACH = pytest.mark.parametrize("name", CHECKPOINTS)
ROOT = Path(__file__).resolve().parents[1]
LAYERS = {QWEN2: 2, INTERNLM2: 3, LLAMA: 2, PHI3: 2}


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def _logits(model: InternVLChatModel, name: str) -> torch.Tensor:
    """Logits of the reference batch's attended positions."""
    inputs = batch(name, labels=False)
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()].float()


def _copy(name: str, folder: Path, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A copy of a fixture checkpoint without some weights and with another configuration."""
    shutil.copytree(CHAT / name, folder, ignore=shutil.ignore_patterns("expected*"))
    kept = {key: tensor for key, tensor in _weights(folder).items() if not key.startswith(drop or ("?",))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def _without(tensors: dict[str, torch.Tensor], keys: set[str]) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


# ------------------------------------------------------------------------------------------------------ names and bits


@EACH
def test_saved_file_is_the_file_that_was_loaded(name: str, tmp_path: Path) -> None:
    load(name).save_pretrained(tmp_path)
    assert_same(_weights(tmp_path), _weights(CHAT / name))


@EACH
def test_save_and_reload(name: str, tmp_path: Path) -> None:
    model = load(name)
    model.save_pretrained(tmp_path)
    again = InternVLChatModel.from_pretrained(tmp_path)
    assert again.img_context_token_id == model.img_context_token_id
    assert not again.training
    assert torch.equal(_logits(again, name), _logits(model, name))


@EACH
def test_state_dict_on_disk_loads_strictly(name: str) -> None:
    """As `Trainer` resumes: `load_state_dict` with the names of the file, fused InternLM2 weights included."""
    reference, model = load(name), InternVLChatModel(load(name).config).eval()
    assert not torch.equal(_logits(model, name), _logits(reference, name))
    model.load_state_dict(_weights(CHAT / name), strict=True)
    assert torch.equal(_logits(model, name), _logits(reference, name))
    model.load_state_dict(reference.state_dict(), strict=True)


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2])
def test_sharded_checkpoints_round_trip(name: str, tmp_path: Path) -> None:
    model = load(name)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    written = {key: tensor for shard in shards for key, tensor in load_file(shard).items()}
    assert_same(written, _weights(CHAT / name))
    assert torch.equal(_logits(InternVLChatModel.from_pretrained(tmp_path), name), _logits(model, name))


@pytest.mark.parametrize("backend", ["qwen2", "internlm2"])
def test_tied_heads_stay_tied(backend: str, tmp_path: Path) -> None:
    config = chat_config(backend)
    config.llm_config.tie_word_embeddings = config.tie_word_embeddings = True
    model = InternVLChatModel(config)
    model.save_pretrained(tmp_path)
    again = InternVLChatModel.from_pretrained(tmp_path)
    for each in (model, again):
        assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    ids = torch.tensor([[3, 40, 4]])
    assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@EACH
@torch.no_grad()
def test_resized_vocabulary_changes_both_ends_and_saves(name: str, tmp_path: Path) -> None:
    model = load(name)
    before, table = _logits(model, name), model.get_input_embeddings().weight.clone()
    model.resize_token_embeddings(431)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == 431
    assert model.config.get_text_config().vocab_size == model.language_model.config.vocab_size == 431
    torch.testing.assert_close(model.get_input_embeddings().weight[:420], table, rtol=0, atol=0)
    torch.testing.assert_close(_logits(model, name)[:, :420], before)
    model.save_pretrained(tmp_path)
    again = InternVLChatModel.from_pretrained(tmp_path)
    assert again.config.llm_config.vocab_size == 431
    assert torch.equal(_logits(again, name), _logits(model, name))
    inputs = batch(name)
    inputs["labels"][0, -1] = 425
    assert again.train()(**inputs).loss.isfinite()


# ------------------------------------------------------------------------------------------------- partial checkpoints


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, LLAMA])
def test_missing_weights_are_initialised(name: str, tmp_path: Path) -> None:
    """Bare parameters too: uninitialised memory held values up to 1e36 there."""
    drop = ("mlp1.", "vision_model.embeddings.", "vision_model.encoder.layers.1.ls1")
    folder = _copy(name, tmp_path / "partial", drop)
    model, info = InternVLChatModel.from_pretrained(folder, output_loading_info=True)
    missing = {key for key in _weights(CHAT / name) if key.startswith(drop)}
    assert set(info["missing_keys"]) == missing
    state = model.state_dict()
    assert all(bool(state[key].isfinite().all()) and state[key].abs().max() <= 1.0 for key in missing)
    assert state["mlp1.1.weight"].std().item() == pytest.approx(0.02, rel=0.2)
    assert state["vision_model.embeddings.class_embedding"].std() > 0.005
    assert state["vision_model.encoder.layers.1.ls1"].unique().tolist() == pytest.approx([0.1])
    whole = load(name).state_dict()
    assert_same(_without(state, missing), _without(whole, missing))


def test_missing_encoder_is_alive(tmp_path: Path) -> None:
    """Published files say initializer_range 1e-10 for the encoder."""
    values = json.loads((CHAT / QWEN2 / "config.json").read_text())["vision_config"]
    folder = _copy(QWEN2, tmp_path / "dead", ("vision_model.",), vision_config={**values, "initializer_range": 1e-10})
    model = InternVLChatModel.from_pretrained(folder)
    assert model.vision_model.encoder.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.2)


# --------------------------------------------------------------------------------------------------------- device maps


def _published_map(name: str, last: str = "cpu") -> dict[str, str]:
    """The map that model cards build by hand, with the names of all language models at once."""
    parts = ["vision_model", "mlp1", "language_model.model.tok_embeddings", "language_model.model.embed_tokens"]
    parts += ["language_model.output", "language_model.model.norm", "language_model.model.rotary_emb"]
    parts += ["language_model.lm_head"]
    layers = [f"language_model.model.layers.{i}" for i in range(LAYERS[name])]
    return dict.fromkeys([*parts, *layers], "cpu") | {layers[-1]: last}


@EACH
@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "published"], ids=["cpu", "auto", "published"])
def test_device_maps_change_nothing(name: str, device_map: Any) -> None:
    if device_map == "published":
        device_map = _published_map(name)
    model = load(name, device_map=device_map)
    assert torch.equal(_logits(model, name), _logits(load(name), name))


@EACH
def test_offload_to_disk_changes_nothing(name: str, tmp_path: Path) -> None:
    model = load(name, device_map=_published_map(name, "disk"), offload_folder=tmp_path)
    assert next(model.language_model.get_decoder().layers[-1].parameters()).device.type == "meta"
    assert torch.equal(_logits(model, name), _logits(load(name), name))
    ids = torch.tensor([[3, 40, 50, 4]])
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(model.generate(input_ids=ids, **options), load(name).generate(input_ids=ids, **options))


# ----------------------------------------------------------------------------------------------------------- precision


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs_and_is_close(name: str, dtype: torch.dtype) -> None:
    model, inputs = load(name, dtype=dtype), batch(name, labels=False)
    assert model.dtype == dtype and model.language_model.dtype == dtype
    reference = _logits(load(name), name)
    error = (_logits(model, name) - reference).norm() / reference.norm()
    assert 0 < error.item() < (0.05 if dtype == torch.bfloat16 else 0.01)
    ids = inputs["input_ids"][:1]
    output = model.generate(input_ids=ids, pixel_values=inputs["pixel_values"][:2], max_new_tokens=3, do_sample=False)
    assert output.shape[1] > ids.shape[1]


@pytest.mark.parametrize("name", [QWEN2, LLAMA])
def test_bfloat16_trains(name: str) -> None:
    model, inputs = load(name, dtype=torch.bfloat16).train(), batch(name)
    loss = model(**inputs).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(load(name)(**inputs).loss.item(), rel=0.02)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def test_attention_choice_reaches_both_towers() -> None:
    model = load(QWEN2, attn_implementation="eager")
    implementations = {part.config._attn_implementation for part in (model.vision_model, model.language_model)}
    assert implementations == {"eager"}
    torch.testing.assert_close(_logits(model, QWEN2), _logits(load(QWEN2), QWEN2), rtol=1e-4, atol=1e-5)


def test_use_flash_attn_falls_back_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(QWEN2, use_flash_attn=True)
    assert [r.message for r in caplog.records if "flash-attn is not usable here" in r.message]
    assert torch.equal(_logits(model, QWEN2), _logits(load(QWEN2), QWEN2))
    assert load(QWEN2, use_flash_attn=False).config._attn_implementation == "sdpa"


# -------------------------------------------------------------------------------------------------------------- errors


def test_damaged_weights_are_one_clear_sentence(tmp_path: Path) -> None:
    folder = _copy(QWEN2, tmp_path / "damaged")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="model.safetensors is damaged or incomplete .*fetch it again"):
        load(QWEN2, folder)


@pytest.mark.parametrize("version", ["4.57.6", "5.8.1"])
def test_older_transformers_is_one_clear_sentence(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before any import that an older version cannot serve."""
    spec = importlib.util.spec_from_file_location("internvl_hub.too_old", ROOT / "modeling_internvl_chat.py")
    monkeypatch.setattr(sys.modules["transformers"], "__version__", version)  # a lazy module, replaced at times
    with pytest.raises(ImportError, match=rf"needs transformers >= 5.11.0, found {version}: pip install -U"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
