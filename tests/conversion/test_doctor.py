"""The doctor: every kind of problem in a folder that has just that one, formats, exit codes, and repairs."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import NotASafetensorsRepoError, StrictDataclassError
from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from safetensors.torch import load_file, save_file
from tiny import CHAT, CHECKPOINTS, INTERNLM2, LLAMA, PHI3, QWEN2
from transformers import PreTrainedConfig

from internvl_hub import checkpoint_internvl
from internvl_hub.checkpoint_internvl import INDEX, SINGLE, CheckpointError, scan_weights
from internvl_hub.configuration_internvl_chat import InternVLChatConfig
from internvl_hub.conversation import chat_template, get_template
from internvl_hub.conversion import doctor
from internvl_hub.conversion.checks import AREAS, LEVELS, Subject
from internvl_hub.conversion.checks_template import template_differences
from internvl_hub.conversion.checks_tokenizer import check_tokenizer
from internvl_hub.conversion.checks_weights import check_family
from internvl_hub.conversion.convert import convert
from internvl_hub.conversion.doctor import Diagnosis, Finding, inspect, run
from internvl_hub.conversion.families import find
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.native_internvl import config_to_native, tensors_to_native
from internvl_hub.tests.conversion.checkpoint_edits import edit
from internvl_hub.upload_to_hub import gather, hub_files

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "internvl-tiny"
FILES = ("config.json", SINGLE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
S2 = get_template("internvl2_5").system_message
CHATML = (
    "{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\n" + S2 + "<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
    "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for p in m.content -%}"
    "{%- if p.type == 'image' -%}{{- '<IMG_CONTEXT>\\n' -}}{%- else -%}{{- p.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SIZE = {"image_size": 56}  # of the tiles of the fixtures
CLIP = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 56, "crop_size": 56, "do_center_crop": True}


# --------------------------------------------------------------------------------------------------------------- tools


def copy(folder: Path, name: str = QWEN2) -> Path:
    """A fixture checkpoint without its reference numbers."""
    folder.mkdir(parents=True)
    for file in FILES:
        shutil.copyfile(CHAT / name / file, folder / file)
    return folder


def retensor(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Rewrites the weights."""
    tensors = change(load_file(folder / SINGLE))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / SINGLE)


def _without(lost: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name != lost}


def shard(folder: Path) -> dict[str, str]:
    """Two shards with an index in place of the single file; returns the weight map."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    files = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for file, part in zip(files, (names[::2], names[1::2]), strict=True):
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: files[i % 2] for i, name in enumerate(names)}
    (folder / SINGLE).unlink()
    edit(folder, INDEX, metadata={}, weight_map=weight_map)
    return weight_map


def edit_tokens(folder: Path, change: Callable[[str], str | None]) -> None:
    """Renames added tokens everywhere; None takes a token out of the list of added ones but not of the vocabulary."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["added_tokens"] = [
        {**t, "content": new} for t in values["added_tokens"] if (new := change(t["content"])) is not None
    ]
    values["model"]["vocab"] = {change(token) or token: i for token, i in values["model"]["vocab"].items()}
    path.write_text(json.dumps(values), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config["added_tokens_decoder"].items()
    config["added_tokens_decoder"] = {
        i: {**t, "content": new} for i, t in decoder if (new := change(t["content"])) is not None
    }
    extra = [change(token) for token in config["additional_special_tokens"]]
    config["additional_special_tokens"] = [token for token in extra if token is not None]
    config["eos_token"] = change(config["eos_token"]) or config["eos_token"]
    path.write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").unlink()


def wrap_lora(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as PEFT stores them when it wraps the language model, with adapters on the query projections."""
    output = {}
    for name, tensor in tensors.items():
        if not name.startswith("language_model."):
            output[name] = tensor
            continue
        name = name.replace("language_model.", "language_model.base_model.model.", 1)
        if not name.endswith("q_proj.weight"):
            output[name] = tensor
            continue
        stem = name.removesuffix(".weight")
        output[f"{stem}.base_layer.weight"] = tensor
        output[f"{stem}.lora_A.default.weight"] = torch.ones(2, tensor.shape[1])
        output[f"{stem}.lora_B.default.weight"] = torch.ones(tensor.shape[0], 2)
    return output


def found(folder: Path, *, level: str | None = None, area: str | None = None) -> list[Finding]:
    findings = inspect(folder).findings
    return [f for f in findings if f.level == (level or f.level) and f.area == (area or f.area)]


# --------------------------------------------------------------------------------------------------- sound checkpoints


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_fixture_checkpoints_lack_files_but_nothing_is_wrong(name: str) -> None:
    diagnosis = inspect(CHAT / name)
    assert diagnosis.healthy
    areas = {(finding.area, finding.level) for finding in diagnosis.findings}
    assert {(area, "ok") for area in ("format", "weights", "tokenizer")} <= areas
    assert {(area, "note") for area in ("template", "processor", "generation", "code")} <= areas
    text = "".join(finding.message for finding in diagnosis.findings)
    assert ("'su'" in text) == (name == PHI3)
    # The fixtures of these two end a turn with a token that their language model's configuration does not name.
    assert ("does not cover" in text) == (name in (INTERNLM2, LLAMA))


def test_parameters_are_counted_from_the_headers() -> None:
    tensors = load_file(CHAT / QWEN2 / SINGLE)
    (finding,) = found(CHAT / QWEN2, area="family")
    for part in ("vision_model.", "mlp1.", "language_model.", ""):
        assert f"{sum(t.numel() for name, t in tensors.items() if name.startswith(part)):,}" in finding.message


def test_a_gathered_checkpoint_is_in_order_throughout(tmp_path: Path) -> None:
    gather(TINY, tmp_path / "tiny")
    diagnosis = inspect(tmp_path / "tiny")
    assert diagnosis.healthy
    assert {f.area for f in diagnosis.findings if f.level == "ok"} == set(AREAS) - {"family"}
    # A shape of its own, and a file as transformers 5 saves it.
    assert {f.area for f in diagnosis.findings if f.level == "note"} <= {"family", "tokenizer"}


def test_weights_are_never_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters and the native layout are understood from the headers too."""

    def unreadable(path: Path, name: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            raise AssertionError(f"{name} was read")

        return read

    adapters = copy(tmp_path / "adapters")
    retensor(adapters, wrap_lora)
    edit(adapters, "config.json", use_llm_lora=2)
    native = native_folder(tmp_path / "native")
    monkeypatch.setattr(checkpoint_internvl, "_reader", unreadable)
    assert all(inspect(folder).healthy for folder in (CHAT / QWEN2, CHAT / INTERNLM2, adapters, native))


def native_folder(folder: Path, name: str = QWEN2) -> Path:
    """A fixture checkpoint in transformers' own layout."""
    copy(folder, name)
    config = InternVLChatConfig.from_pretrained(folder)
    config.img_context_token_id = 11
    retensor(folder, lambda tensors: tensors_to_native(tensors, config))
    (folder / "config.json").write_text(json.dumps(config_to_native(config)), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", [QWEN2, INTERNLM2, PHI3])
def test_native_layout(name: str, tmp_path: Path) -> None:
    diagnosis = inspect(native_folder(tmp_path / "native", name))
    assert diagnosis.healthy
    assert "transformers' own layout (internvl)" in diagnosis.findings[0].message


def test_shards(tmp_path: Path) -> None:
    shard(copy(tmp_path / "a"))
    (finding,) = found(tmp_path / "a", area="weights")
    assert finding.level == "ok"
    assert finding.message.startswith("2 weight files: 79 tensors")


def test_adapters_in_the_weights(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    retensor(folder, wrap_lora)
    edit(folder, "config.json", use_llm_lora=2)
    diagnosis = inspect(folder)
    assert diagnosis.healthy
    assert "LoRA adapters stored in the weights" in diagnosis.findings[0].message
    assert "--fix" in diagnosis.findings[0].fix


def test_adapters_without_their_flag(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    retensor(folder, wrap_lora)
    (finding,) = found(folder, level="problem")
    assert finding.area == "weights"
    assert (
        finding.message
        == "config.json: use_llm_lora is 0, but model.safetensors holds adapters under language_model.*"
    )
    assert "--fix" in finding.fix


def encoder_folder(folder: Path) -> Path:
    """The encoder of a fixture checkpoint as InternViT is released."""
    vision = json.loads((CHAT / LLAMA / "config.json").read_text(encoding="utf-8"))["vision_config"]
    folder.mkdir()
    edit(folder, "config.json", **vision)
    tensors = load_file(CHAT / LLAMA / SINGLE)
    prefix = "vision_model."
    save_file({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}, folder / SINGLE)
    return folder


def test_encoder_alone(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "vit")
    diagnosis = inspect(folder)
    assert diagnosis.healthy
    assert {f.area for f in diagnosis.findings} == {"format", "family", "weights", "code"}
    retensor(folder, _without("encoder.layers.0.ls1"))
    (finding,) = found(folder, level="problem")
    assert finding.area == "weights"
    assert "1 tensors are missing: encoder.layers.0.ls1" in finding.message


def test_peft_adapter_alone(tmp_path: Path) -> None:
    edit(tmp_path, "adapter_config.json", base_model_name_or_path="OpenGVLab/InternVL3-8B", peft_type="LORA")
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    (finding,) = inspect(tmp_path).findings
    assert (finding.area, finding.level) == ("format", "problem")
    assert "adapter_config.json" in finding.message
    assert "OpenGVLab/InternVL3-8B" in finding.fix


# ------------------------------------------------------------------------------------------------------ single defects


def _with_template(text: str, file: str = "tokenizer_config.json") -> Callable[[Path], None]:
    return lambda folder: edit(folder, file, chat_template=text)


def _truncate(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])


def _lose_shard(folder: Path) -> None:
    (folder / shard(folder)[EMBEDDINGS]).unlink()


def _misplace(folder: Path) -> None:
    weight_map = shard(folder)
    other = next(file for file in weight_map.values() if file != weight_map[EMBEDDINGS])
    edit(folder, INDEX, weight_map={**weight_map, EMBEDDINGS: other})


def _keep_single_too(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    shard(folder)
    (folder / SINGLE).write_bytes(data)


def _cut_rows(folder: Path) -> None:
    retensor(folder, lambda tensors: {n: t[:390] if n in (EMBEDDINGS, HEAD) else t for n, t in tensors.items()})
    edit(folder, "config.json", llm_config__vocab_size=390)


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


def _unspecial(folder: Path) -> None:
    for file, key in (("tokenizer.json", "added_tokens"), ("tokenizer_config.json", "added_tokens_decoder")):
        values = json.loads((folder / file).read_text(encoding="utf-8"))[key]
        for token in values if isinstance(values, list) else values.values():
            token["special"] = token["special"] and token["content"] != "</img>"
        edit(folder, file, **{key: values})
    extra = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["additional_special_tokens"]
    extra.remove("</img>")
    edit(folder, "tokenizer_config.json", additional_special_tokens=extra)
    (folder / "special_tokens_map.json").unlink()


def _no_token(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder, "tokenizer_config.json", **{name: None})
        edit(folder, "special_tokens_map.json", **{name: None})

    return change


def _code(**files: str) -> Callable[[Path], None]:
    """Python files that auto_map names; `modeling` for modeling_internvl_chat.py and so on."""
    names = {
        "configuration": "configuration_internvl_chat.py",
        "modeling": "modeling_internvl_chat.py",
        "vit": "modeling_intern_vit.py",
        "llm": "modeling_internlm2.py",
        "tokenization": "tokenization_internlm2.py",
    }
    texts = {"configuration": "class InternVLChatConfig: ...\n", "modeling": "# self.post_init()\n", **files}

    def change(folder: Path) -> None:
        for key, text in texts.items():
            (folder / names[key]).write_text(text, encoding="utf-8")

    return change


def _change_own_code(folder: Path) -> None:
    """This package's own code, one file of it changed."""
    for path in hub_files([ROOT / "configuration_internvl_chat.py", ROOT / "modeling_internvl_chat.py"]):
        shutil.copyfile(path, folder / path.name)
    (folder / "losses_internvl.py").write_text("# changed\n", encoding="utf-8")


NEXT = "from .modeling_intern_vit import X\n# self.post_init()\n"
LLM = "from .modeling_internlm2 import X\n# self.post_init()\n"
GENERATES = "class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin): ...\n"


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "config.json", **changes)


def _processor(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "processor_config.json", **changes)


def _image(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, "preprocessor_config.json", **changes)


def _takes_any_return_dict() -> bool:
    """transformers 5.11 checks the types of a configuration's fields itself."""
    try:
        PreTrainedConfig(return_dict=0)
    except StrictDataclassError:
        return False
    return True


# name -> (what is done to a sound folder, area, level, what the message says, what the fix says)
DEFECTS: dict[str, tuple[Callable[[Path], Any], str, str, list[str], str]] = {
    # format
    "unknown architecture": (
        _config(llm_config__architectures=["NoSuchForCausalLM"], llm_config__model_type="no_such"),
        "format", "problem", ["config.json", "NoSuchForCausalLM"], "config.json",
    ),
    "no architecture at all": (
        _config(llm_config__architectures=[""], llm_config__model_type=""),
        "format", "problem", ["config.json", "llm_config names architecture ''"], "config.json",
    ),
    "no architecture but a type": (
        _config(llm_config__architectures=[""]),
        "format", "note", ["config.json", "llm_config.architectures"], "--fix",
    ),
    "no outer architecture": (
        _config(architectures=[""]), "format", "note", ["config.json: architectures"], "--fix",
    ),
    "attention pinned": (
        _config(llm_config__attn_implementation="flash_attention_2"),
        "format", "note", ["config.json", "llm_config.attn_implementation='flash_attention_2'"], "--fix",
    ),
    "rotary base for transformers 5 only": (
        _config(llm_config__rope_theta=None, llm_config__rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
        "format", "note", ["config.json: llm_config.rope_theta is only in rope_parameters", "10000"], "--fix",
    ),
    "layer beyond the encoder": (
        _config(select_layer=9), "format", "problem", ["config.json", "select_layer 9", "3 layers"], "select_layer to",
    ),
    "layer before the encoder": (
        _config(select_layer=-5), "format", "problem", ["config.json", "select_layer -5"], "set select_layer",
    ),
    "a field of a wrong kind": (
        _config(vision_config__hidden_size="wide"), "format", "problem", ["config.json cannot be read"], "config.json",
    ),
    "a norm's epsilon that is no number": (
        _config(vision_config__layer_norm_eps="x"),
        "format", "problem", ["config.json: vision_config.layer_norm_eps is 'x', not"], "set vision_config.layer_norm",
    ),
    "fewer positions than an image needs": (
        _config(llm_config__max_position_embeddings=4),
        "format", "problem", ["llm_config.max_position_embeddings is 4, but", "single tile are 4"], "trained with",
    ),
    "a negative rotary base": (
        _config(llm_config__rope_theta=-1), "format", "problem", ["rope_parameters.rope_theta is -1, not a number"],
        "trained with",
    ),
    "patches that make no whole tokens": (
        _config(force_image_size=70), "format", "problem", ["tile of 70 pixels has 5x5 patches of 14"], "downsample",
    ),
    "a tile size of nothing": (
        _config(force_image_size=0), "format", "note", ["force_image_size is 0, which counts as unset"], "null",
    ),
    "outputs as tuples": (
        _config(vision_config__return_dict=0),
        "format", "problem", *(
            (["vision_config.return_dict is 0, not true or false"], "set vision_config.return_dict")
            if _takes_any_return_dict()
            else (["Field 'return_dict' with value 0"], "correct config.json")
        ),
    ),
    # family
    "no version of the pixel shuffle": (
        _config(ps_version=None), "family", "note", ["config.json has no ps_version", "'v1'"], '"v2"',
    ),
    # weights
    "truncated file": (_truncate, "weights", "problem", [SINGLE, "damaged or incomplete"], "fetch it again"),
    "missing shard": (_lose_shard, "weights", "problem", ["lacks the shard model-0000", INDEX], "fetch it"),
    "wrong index": (_misplace, "weights", "problem", [INDEX, "places wrongly", EMBEDDINGS], "write the index anew"),
    "single file and index": (_keep_single_too, "weights", "problem", [SINGLE, INDEX], "remove the stale one"),
    "no weights": (
        lambda folder: (folder / SINGLE).unlink(), "weights", "problem", ["has no weights", SINGLE], "fetch",
    ),
    "no tensor": (
        lambda folder: retensor(folder, lambda tensors: {}), "weights", "problem", [f"{SINGLE}: no tensor"], "fetch",
    ),
    "an index of nothing": (
        lambda folder: [(folder / SINGLE).unlink(), edit(folder, INDEX, weight_map={})],
        "weights", "problem", ["no tensor at all"], "fetch",
    ),
    "integers": (
        lambda folder: retensor(folder, lambda tensors: {n: t.int() for n, t in tensors.items()}),
        "weights", "problem", [SINGLE, "79 tensors hold no floating-point numbers", "(int32)"], "fetch",
    ),
    "a boolean projector": (
        lambda folder: retensor(folder, lambda tensors: {**tensors, "mlp1.1.bias": tensors["mlp1.1.bias"] > 0}),
        "weights", "problem", ["1 tensors hold no floating-point numbers, such as mlp1.1.bias (bool)"], "fetch",
    ),
    "missing tensor": (
        lambda folder: retensor(folder, _without("mlp1.1.bias")),
        "weights", "problem", [SINGLE, "1 tensors are missing: mlp1.1.bias"], "one revision",
    ),
    "unexpected tensor": (
        lambda folder: retensor(folder, lambda tensors: {**tensors, "router.weight": torch.ones(2)}),
        "weights", "problem", [SINGLE, "1 tensors are read by no model: router.weight"], "one revision",
    ),
    "misshapen tensor": (
        lambda folder: retensor(folder, lambda tensors: {**tensors, "mlp1.1.bias": torch.ones(5)}),
        "weights", "problem", [SINGLE, "mlp1.1.bias (5,) instead of (48,)"], "one revision",
    ),
    "dead buffer": (
        lambda folder: retensor(
            folder, lambda t: {**t, "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
        ),
        "weights", "note", [SINGLE, "1 buffers that nothing reads", "inv_freq"], "leave",
    ),
    "other vocabulary": (
        _config(llm_config__vocab_size=500),
        "weights", "problem", [SINGLE, f"{EMBEDDINGS} has 420 rows", "vocab_size 500"], "vocab_size to 420",
    ),
    "no head": (
        lambda folder: retensor(folder, _without(HEAD)),
        "weights", "problem", [SINGLE, HEAD, "tie_word_embeddings"], "set tie_word_embeddings",
    ),
    "tied though there is a head": (
        _config(llm_config__tie_word_embeddings=True),
        "weights", "note", [SINGLE, "tie_word_embeddings"], "set tie_word_embeddings to false",
    ),
    "a flag without adapters": (
        _config(use_backbone_lora=8), "weights", "problem", ["use_backbone_lora is 8", SINGLE, "holds none"], "--fix",
    ),
    "other dtype": (
        lambda folder: retensor(folder, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()}),
        "weights", "note", [SINGLE, "bfloat16", "config.json says float32"], 'dtype="bfloat16"',
    ),
    "mixed dtypes": (
        lambda folder: retensor(folder, lambda tensors: {**tensors, "mlp1.1.bias": tensors["mlp1.1.bias"].half()}),
        "weights", "note", [SINGLE, "float32, 0.00 MB of float16"], 'dtype="float32"',
    ),
    "pickled": (_pickle, "weights", "note", ["pytorch_model.bin", "pickled"], "--fix"),
    # tokenizer
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "tokenizer", "problem", ["no tokenizer", "tokenizer.json"], "tokenizer files",
    ),
    "damaged tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"),
        "tokenizer", "problem", ["tokenizer.json does not load"], "tokenizer files",
    ),
    "no image token": (
        lambda folder: edit_tokens(folder, lambda token: "<picture>" if token == "<img>" else token),
        "tokenizer", "problem", ["tokenizer.json has no token <img>"], "tokenizer files",
    ),
    "image token in pieces": (
        lambda folder: edit_tokens(folder, lambda token: None if token == "<IMG_CONTEXT>" else token),
        "tokenizer", "problem", ["tokenizer.json: <IMG_CONTEXT>", "is cut into"], "tokenizer files",
    ),
    "image token not special": (
        _unspecial, "tokenizer", "note", ["tokenizer.json: </img> is not marked as special"], "harmless",
    ),
    "no token that the template writes": (
        lambda folder: edit_tokens(folder, lambda token: "<start>" if token == "<|im_start|>" else token),
        "tokenizer", "problem", ["tokenizer.json has no token <|im_start|>", "internvl2_5"], "tokenizer files",
    ),
    "ids beyond the embeddings": (
        _cut_rows, "tokenizer", "problem", ["tokenizer.json: 10 ids are beyond the 390 embedding rows"], "tokenizer",
    ),
    "other context id": (
        _config(img_context_token_id=12),
        "tokenizer", "problem", ["config.json: img_context_token_id is 12", "id 11 in tokenizer.json"], "to 11",
    ),
    "code that is no name": (
        lambda folder: edit(folder, "tokenizer_config.json", auto_map=-1),
        "tokenizer", "problem", ["tokenizer_config.json: auto_map is -1, not names of classes"], "correct",
    ),
    "colliding ids": (
        lambda folder: edit(folder, "added_tokens.json", **{"<img>": 30, "<new>": 10}),
        "tokenizer", "problem",
        ["<img> is 30 in added_tokens.json and 9 in tokenizer.json", "10 is <new> in added_tokens.json and </img>"],
        "one revision",
    ),
    "no pad token": (
        _no_token("pad_token"), "tokenizer", "note", ["tokenizer_config.json: no pad_token"], "tokenizer.pad_token",
    ),
    "no end token": (_no_token("eos_token"), "tokenizer", "note", ["tokenizer_config.json: no eos_token"], "--fix"),
    "extra tokens for transformers 5 only": (
        lambda folder: edit(folder, "tokenizer_config.json", extra_special_tokens=["<img>", "</img>"]),
        "tokenizer", "note", ["tokenizer_config.json: extra_special_tokens is a list"], "--fix",
    ),
    "pad token ends turns": (
        lambda folder: edit(folder, "tokenizer_config.json", pad_token="<|im_end|>"),
        "tokenizer", "note", ["tokenizer_config.json: pad_token '<|im_end|>' is the end of a turn"], "attention mask",
    ),
    # template
    "unknown template": (
        _config(template="vicuna"), "template", "problem", ["config.json", "'vicuna' is unknown"], "internvl2_5",
    ),
    "null system message": (
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text(encoding="utf-8").replace("{", '{"system_message": null,', 1),
            encoding="utf-8",
        ),
        "template", "note", ["config.json: system_message is null"], "--fix",
    ),
    "Qwen's system text": (
        _with_template(CHATML.replace(S2, QWEN_SYSTEM)),
        "template", "problem", ["tokenizer_config.json: system text is Qwen2.5's: 'You are Qwen, created"], "--fix",
    ),
    "no system text": (
        _with_template(CHATML[CHATML.index("{%- for") :], "chat_template.json"),
        "template", "problem", ["chat_template.json: gives no system text"], "--fix",
    ),
    "other separators": (
        _with_template(CHATML.replace("'<|im_end|>\\n'", "'<|im_end|>'")),
        "template", "problem", ["writes 'ser\\nHi<|im_end|><|im_start|>", "in a question and 6 more"], "--fix",
    ),
    "no lists": (
        _with_template(CHATML.replace("m.content is string", "true").replace("- m.content -", "- '' + m.content -")),
        "template", "problem", ["fails on content as a list, an image, several images and turns", "str"], "--fix",
    ),
    "no images": (
        _with_template(CHATML.replace("'<IMG_CONTEXT>\\n'", "''")),
        "template", "problem", ["writes 0 placeholder(s) for 1 image(s)"], "--fix",
    ),
    "no template language": (
        _with_template("{% if %}"), "template", "problem", ["tokenizer_config.json: fails on a question"], "--fix",
    ),
    "other roles": (
        _with_template("{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"),
        "template", "problem", ["writes turns in another format"], "--fix",
    ),
    # processor
    "other tile size": (
        _image(size=224), "processor", "problem", ["preprocessor_config.json: size 224", "56 pixels"], "--fix",
    ),
    "other tile size in a dictionary": (
        _image(size={"height": 384, "width": 384}), "processor", "problem", ["size 384"], "--fix",
    ),
    "other mean": (
        _image(image_mean=[0.5, 0.5, 0.5]), "processor", "problem", ["image_mean is [0.5", "ImageNet"], "--fix",
    ),
    "other filter": (_image(resample=2), "processor", "problem", ["resample 2", "bicubically"], "--fix"),
    "other maximum": (
        _processor(image_processor={"max_dynamic_patch": 6}),
        "processor", "problem", ["processor_config.json: max_dynamic_patch is 6", "max_dynamic_patch 12"], "--fix",
    ),
    "other maximum under the native name": (
        _image(max_patches=4), "processor", "problem", ["max_patches is 4", "max_dynamic_patch 12"], "--fix",
    ),
    "no thumbnail": (
        _processor(image_processor={"use_thumbnail": False}),
        "processor", "problem", ["use_thumbnail is False", "use_thumbnail True"], "--fix",
    ),
    "other number of visual tokens": (
        _processor(num_image_token=256), "processor", "problem", ["num_image_token is 256", "gives 4"], "--fix",
    ),
    "other template in the processor": (
        _processor(template="phi3-chat", image_processor=SIZE),
        "processor", "problem", ["template is 'phi3-chat'", "'internvl2_5'"], "--fix",
    ),
    "native video default": (
        lambda folder: edit(folder, "video_preprocessor_config.json", size={"height": 384, "width": 384}),
        "processor", "problem", ["video_preprocessor_config.json: size 384"], "--fix",
    ),
    "a setting of a wrong kind": (
        _processor(template="internvl2_5", image_processor={**SIZE, "exact": "x"}),
        "processor", "problem", ["no processor can be made of it: exact is 'x', not true"], "--fix OUT writes",
    ),
    "no tile size": (
        _processor(template="internvl2_5", image_processor={"exact": True, "size": None}),
        "processor", "problem", ["no image_size, which then is 448, but config.json says 56"], "--fix OUT writes",
    ),
    # generation
    "a stop token that is no id": (
        lambda folder: edit(folder, "generation_config.json", eos_token_id=["x"]),
        "generation", "problem", ["generation_config.json: eos_token_id is ['x'], not an id"], "correct generation",
    ),
    "a padding token beyond the embeddings": (
        lambda folder: edit(folder, "generation_config.json", eos_token_id=4, pad_token_id=420),
        "generation", "problem", ["pad_token_id is 420, beyond the 420 embedding rows"], "correct generation",
    ),
    "does not stop": (
        lambda folder: edit(folder, "generation_config.json", eos_token_id=[2]),
        "generation", "problem", ["generation_config.json: eos_token_id [2]", "<|im_end|> (4)"], "--fix",
    ),
    # code
    "code of another repository": (
        _config(auto_map={"AutoModel": "user/name--modeling_x.Model"}),
        "code", "note", ["config.json", "user/name--modeling_x.Model"], "internvl-upload",
    ),
    "half of the code": (
        lambda folder: (folder / "configuration_internvl_chat.py").write_text("x = 1\n", encoding="utf-8"),
        "code", "problem", ["modeling_internvl_chat.py, which config.json needs, is missing"], "internvl-upload",
    ),
    "code without a file that it imports": (
        _code(modeling="from .flash import X\n# self.post_init()\n"),
        "code", "problem", ["flash.py, which modeling_internvl_chat.py needs, is missing"], "internvl-upload",
    ),
    "code that is no Python": (
        _code(modeling="def (:\n"), "code", "problem", ["modeling_internvl_chat.py is no module"], "internvl-upload",
    ),
    "changed code of this package": (
        _change_own_code,
        "code", "note", ["another version", "losses_internvl.py of"], "internvl-upload",
    ),
}  # fmt: skip
# Notes that a defect brings with it or takes away: (area, level) -> allowed beside the one that is tested.
SILENT = {("code", "note"), ("processor", "note"), ("generation", "note"), ("template", "note"), ("family", "ok")}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> set[tuple[str, str]]:
    """What is said of the sound folder that every defect starts from."""
    return {(f.area, f.level) for f in found(_sound(tmp_path_factory.mktemp("sound") / "a"))}


def _sound(folder: Path) -> Path:
    edit(copy(folder), "config.json", llm_config__attn_implementation=None)
    return folder


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_found_and_nothing_else(name: str, tmp_path: Path, before: set[tuple[str, str]]) -> None:
    break_it, area, level, says, fix = DEFECTS[name]
    folder = _sound(tmp_path / "a")
    break_it(folder)
    findings = found(folder)
    assert all(f.area in AREAS and f.level in LEVELS for f in findings)
    (finding,) = [f for f in findings if f.area == area and f.level == level and says[0] in f.message]
    for text in says:
        assert text in finding.message
    assert fix in finding.fix
    problems = [f for f in findings if f.level == "problem"]
    if area == "template" and level == "problem":  # a template can be wrong in several ways at once
        assert {f.area for f in problems} == {area}
    else:
        assert problems == ([finding] if level == "problem" else [])
    assert {(f.area, f.level) for f in findings} - before - SILENT <= {(area, level)}


FAULTS = {
    "default configuration": (
        _code(configuration="class InternVLChatConfig:\n    x = {'architectures': ['']}\n"),
        "configuration_internvl_chat.py", "Unsupported architecture",
    ),
    "meta tensors": (
        _code(modeling=NEXT, vit="def f(n):\n    return [v.item() for v in torch.linspace(0, 1, n)]\n"),
        "modeling_intern_vit.py", "meta tensors",
    ),
    "no post_init": (
        _code(modeling="class InternVLChatModel(PreTrainedModel): ...\n"),
        "modeling_internvl_chat.py", "all_tied_weights_keys",
    ),
    "no GenerationMixin": (
        _code(modeling=LLM, llm="class InternLM2ForCausalLM(InternLM2PreTrainedModel): ...\n"),
        "modeling_internlm2.py", "no attribute 'generate'",
    ),
    "list of tied weights": (
        _code(modeling=LLM, llm=f"{GENERATES}_tied_weights_keys = ['output.weight']\n"),
        "modeling_internlm2.py", "has no attribute 'keys'",
    ),
    "rotary buffers": (
        _code(modeling=LLM, llm=f"{GENERATES}def f(self, x):\n    self.register_buffer('a', x, persistent=False)\n"),
        "modeling_internlm2.py", "NaN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_code_that_fails_on_transformers_5(name: str, tmp_path: Path) -> None:
    break_it, file, effect = FAULTS[name]
    folder = copy(tmp_path / "a")
    break_it(folder)
    (finding,) = found(folder, level="problem")
    assert finding.area == "code"
    assert finding.message.startswith(f"{file}: ")
    assert effect in finding.message
    assert "--fix" in finding.fix


def test_code_of_other_origin_without_a_known_fault(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    _code(modeling=LLM, llm=GENERATES)(folder)
    (finding,) = found(folder, area="code")
    assert finding.level == "note"
    assert "code of other origin (3 files)" in finding.message
    assert "AutoModelForImageTextToText" in finding.message  # the fixture's auto_map lacks it


def test_tokenizer_with_code_of_its_own(tmp_path: Path) -> None:
    """As InternLM2 is released; the code is not run, and the ids are checked all the same."""
    folder = copy(tmp_path / "a")
    edit(folder, "tokenizer_config.json", tokenizer_class="InternLM2TokenizerFast")
    edit(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_x.Tokenizer"]})
    (folder / "tokenization_x.py").write_text("raise RuntimeError('this code was run')\n", encoding="utf-8")
    findings = found(folder, area="tokenizer")
    assert [f.level for f in findings] == ["note", "ok"]
    assert "tokenization_x.Tokenizer" in findings[0].message
    assert "trust_remote_code" in findings[0].message
    _code(tokenization="")(folder)
    edit_tokens(folder, lambda token: "<picture>" if token == "<img>" else token)
    (finding,) = [f for f in found(folder, area="tokenizer") if f.level == "problem"]
    assert "no token <img>" in finding.message


def test_tensors_of_the_other_layout(tmp_path: Path) -> None:
    native = native_folder(tmp_path / "native")
    shutil.copyfile(CHAT / QWEN2 / "config.json", native / "config.json")
    original = copy(tmp_path / "original")
    (native_folder(tmp_path / "again") / "config.json").replace(original / "config.json")
    for folder, words in ((native, "of the original layout, but"), (original, "of the transformers' own layout, but")):
        (finding,) = found(folder, level="problem")
        assert finding.area == "format"
        assert words in finding.message
        assert "--fix" in finding.fix


def test_names_of_no_layout(tmp_path: Path) -> None:
    folder = native_folder(tmp_path / "native")
    retensor(folder, lambda t: {**t, "audio_tower.weight": torch.ones(2)})
    (finding,) = found(folder, level="problem")
    assert finding.area == "weights"
    assert "audio_tower.weight is no name of the native layout" in finding.message


def test_a_damaged_side_file_spoils_its_area_only(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    (folder / "preprocessor_config.json").write_text("{", encoding="utf-8")
    findings = found(folder, level="problem")
    assert {f.area for f in findings} == {"processor", "code"}  # the code check looks for auto_map in it
    assert all("preprocessor_config.json is not valid JSON" in f.message for f in findings)
    assert all(f.fix == "fetch it again" for f in findings)


def test_another_kind_of_model(tmp_path: Path) -> None:
    edit(tmp_path, "config.json", model_type="qwen2_5_vl")
    (finding,) = inspect(tmp_path).findings
    assert (finding.area, finding.level) == ("format", "problem")
    assert "config.json: model_type 'qwen2_5_vl'" in finding.message


# -------------------------------------------------------------------------------------------------------------- family


def _family(folder: Path, name: str, **changes: Any) -> list[Finding]:
    """What is said of a release's configuration with some fields changed (None: left out)."""
    find(name).config().save_pretrained(folder)
    edit(folder, "config.json", **changes)
    return list(check_family(Subject.open(folder, scan_weights(folder))))


def test_releases_are_recognised(tmp_path: Path) -> None:
    (finding,) = _family(tmp_path, "InternVL2_5-8B")
    assert finding.level == "ok"
    assert "architecture of InternVL2_5-8B, shared by " in finding.message
    assert "InternVL2-8B" in finding.message


@pytest.mark.parametrize(
    ("changes", "area", "message", "fix"),
    [
        ({"ps_version": None}, "family", "has no ps_version, which means 'v1'; InternVL2_5-8B has 'v2'", "ps_version"),
        ({"ps_version": "v1"}, "family", "ps_version 'v1'; InternVL2_5-8B has 'v2'", "ps_version"),
        ({"select_layer": -4}, "family", "select_layer is -4, which no release", "set select_layer to -1 (InternVL2"),
        ({"template": "phi3-chat"}, "template", "template is 'phi3-chat', which no", "'internvl2_5' (InternVL2_5-8B)"),
    ],
)
def test_settings_that_no_release_of_the_shapes_has(
    changes: dict[str, Any], area: str, message: str, fix: str, tmp_path: Path
) -> None:
    (finding,) = [f for f in _family(tmp_path, "InternVL2_5-8B", **changes) if f.level == "problem"]
    assert finding.area == area
    assert finding.message.startswith("config.json")
    assert message in finding.message
    assert fix in finding.fix


def test_settings_of_another_release_of_the_same_shapes_are_right(tmp_path: Path) -> None:
    """InternVL2-8B and InternVL2_5-8B have the same shapes and different templates."""
    findings = _family(tmp_path, "InternVL2_5-8B", template="internlm2-chat")
    assert all(finding.level != "problem" for finding in findings)
    assert "architecture of InternVL2-8B" in findings[0].message


def test_harmless_differences_are_noted(tmp_path: Path) -> None:
    (note,) = [f for f in _family(tmp_path, "InternVL2_5-8B", max_dynamic_patch=6) if f.level == "note"]
    assert "unlike InternVL2_5-8B: max_dynamic_patch 6 instead of 12" in note.message


def test_context_token_of_another_release(tmp_path: Path) -> None:
    copy(tmp_path / "a")
    subject = Subject.open(tmp_path / "a", scan_weights(tmp_path / "a"))
    subject.releases = (find("InternVL2_5-8B"),)
    (note,) = [f for f in check_tokenizer(subject) if f.level == "note"]
    assert "<IMG_CONTEXT> has id 11; in InternVL2_5-8B it is 92546" in note.message


def test_a_large_checkpoint_is_read_from_its_header(tmp_path: Path) -> None:
    """Headers of InternVL2_5-1B (published: 938.19M parameters) before 1.9 GB that no disk holds: a sparse file."""
    config = find("InternVL2_5-1B").config()
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = InternVLChatModel(config)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / SINGLE, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    findings = inspect(tmp_path).findings
    assert "938,193,024 parameters (vision 304,012,288" in findings[1].message
    (weights,) = [f for f in findings if f.area == "weights" and f.level == "ok"]
    assert "1.88 GB" in weights.message


# ----------------------------------------------------------------------------------------------------------- templates


@pytest.mark.parametrize("name", ["internvl2_5", "internlm2-chat", "phi3-chat", "internvl_zh", "internvl3_5_gpt_oss"])
def test_the_packages_templates_agree_with_themselves_only(name: str) -> None:
    template = get_template(name)
    assert template_differences(chat_template(template), template) == []
    others = [other for other in ("internvl2_5", "internlm2-chat", "phi3-chat", "internvl_zh") if other != name]
    assert all(template_differences(chat_template(get_template(other)), template) for other in others)


def test_a_template_written_otherwise_is_the_same() -> None:
    assert template_differences(CHATML, get_template("internvl2_5")) == []


def test_a_system_message_of_the_checkpoint_counts() -> None:
    template, own = get_template("internvl2_5"), "You see well."
    assert template_differences(chat_template(template, system_message=own), template, own) == []
    (difference,) = template_differences(CHATML, template, own)
    assert difference.startswith("system text is that of template internvl2_5: '你是书生·万象")


def test_begin_token(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a", INTERNLM2)
    template = get_template("internlm2-chat")
    path = folder / "chat_template.jinja"
    path.write_text(chat_template(template, "<s>"), encoding="utf-8")
    assert [f.level for f in found(folder, area="template")] == ["ok"]
    path.write_text(chat_template(template), encoding="utf-8")
    (finding,) = found(folder, area="template")
    assert finding.level == "problem"
    assert "chat_template.jinja: does not begin with '<s>'" in finding.message


def test_every_template_in_the_folder_is_rendered(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    named = [{"name": "default", "template": CHATML.replace(S2, QWEN_SYSTEM)}, {"name": "tool_use", "template": ""}]
    edit(folder, "tokenizer_config.json", chat_template=named)
    good, bad = found(folder, area="template")
    assert (good.level, bad.level) == ("ok", "problem")
    assert good.message.startswith("chat_template.jinja: ")
    assert bad.message.startswith("tokenizer_config.json: system text is Qwen2.5's")


# ---------------------------------------------------------------------------------------------------- processor, stops


def test_released_image_processor_is_noted(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    edit(folder, "preprocessor_config.json", **CLIP, image_mean=[0.485, 0.456, 0.406], resample=3)
    note, ok = found(folder, area="processor")
    assert (note.level, ok.level) == ("note", "ok")
    assert "CLIPFeatureExtractor makes one tile" in note.message
    assert "preprocessor_config.json: tiles of 56 px" in ok.message


def test_native_image_processor(tmp_path: Path) -> None:
    folder = native_folder(tmp_path / "native")
    values = {"image_processor_type": "GotOcr2ImageProcessorFast", "crop_to_patches": False, "max_patches": 12}
    edit(folder, "preprocessor_config.json", **values, size={"height": 56, "width": 56})
    edit(folder, "processor_config.json", image_seq_length=4)
    note, ok = found(folder, area="processor")
    assert (note.level, ok.level) == ("note", "ok")
    assert "crop_to_patches is false" in note.message
    edit(folder, "processor_config.json", image_seq_length=256)
    edit(folder, "config.json", image_seq_length=256)
    first, second = found(folder, area="processor", level="problem")
    assert "processor_config.json: image_seq_length is 256" in first.message
    assert "config.json: image_seq_length is 256" in second.message


@pytest.mark.parametrize("eos", [4, [2, 4]])
def test_stop_tokens_that_cover_the_end_of_a_turn(eos: Any, tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    edit(folder, "generation_config.json", eos_token_id=eos)
    assert [f.level for f in found(folder, area="generation")] == ["ok"]


def test_a_generation_config_without_stop_tokens_leaves_it_to_the_model(tmp_path: Path) -> None:
    """As the first InternVL2 releases: the file names a version only."""
    folder = copy(tmp_path / "a")
    edit(folder, "generation_config.json", transformers_version="4.37.2")
    assert [f.level for f in found(folder, area="generation")] == ["ok"]  # llm_config says 4
    edit(folder, "config.json", llm_config__eos_token_id=2)
    (finding,) = found(folder, area="generation")
    assert finding.level == "problem"
    assert "eos_token_id [2] from config.json does not cover" in finding.message


# ----------------------------------------------------------------------------------------------------------------- hub


def _metadata(folder: Path) -> SafetensorsRepoMetadata:
    """What the Hub says of a local file's header."""
    with open(folder / SINGLE, "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    header.pop("__metadata__", None)
    tensors = {
        name: TensorInfo(dtype=t["dtype"], shape=t["shape"], data_offsets=tuple(t["data_offsets"]))
        for name, t in header.items()
    }
    return SafetensorsRepoMetadata(
        metadata=None,
        sharded=False,
        weight_map=dict.fromkeys(tensors, SINGLE),
        files_metadata={SINGLE: SafetensorsFileMetadata(metadata={}, tensors=tensors)},
    )


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A repository `user/name` whose small files are in a folder and whose headers come from the Hub."""
    seen: dict[str, Any] = {"metadata": _metadata(CHAT / QWEN2)}
    folder = copy(tmp_path / "snapshot")
    (folder / SINGLE).unlink()

    def resolve(name: str, *, weights: bool, **options: Any) -> Path:
        if Path(name).is_dir():
            return Path(name)
        seen["downloaded weights"], seen["options"] = weights, options
        return folder

    def get_metadata(repository: str, **options: Any) -> SafetensorsRepoMetadata:
        seen["repository"], seen["header options"] = repository, options
        if isinstance(seen["metadata"], Exception):
            raise seen["metadata"]
        return seen["metadata"]

    monkeypatch.setattr(doctor, "resolve", resolve)
    monkeypatch.setattr(doctor, "get_safetensors_metadata", get_metadata)
    return seen


def test_of_a_repository_only_the_headers_are_fetched(hub: dict[str, Any]) -> None:
    diagnosis = inspect("user/name", revision="abc", token="t", cache_dir="c")
    assert diagnosis.healthy
    assert diagnosis.path == "user/name"
    assert hub["downloaded weights"] is False
    assert hub["options"] == {"revision": "abc", "token": "t", "cache_dir": "c"}
    assert hub["repository"] == "user/name"
    assert hub["header options"] == {"revision": "abc", "token": "t"}
    local = {f.message for f in inspect(CHAT / QWEN2).findings}
    assert {f.message for f in diagnosis.findings} == local


@pytest.mark.parametrize(
    ("metadata", "message", "fix"),
    [
        (NotASafetensorsRepoError("no"), "user/name has no safetensors weights", "fetch it"),
        (ConnectionError("unreachable"), "headers of user/name cannot be read (unreachable)", "fetch"),
    ],
)
def test_a_repository_whose_headers_cannot_be_read(
    hub: dict[str, Any], metadata: Exception, message: str, fix: str
) -> None:
    hub["metadata"] = metadata
    (finding,) = [f for f in inspect("user/name").findings if f.level == "problem"]
    assert finding.area == "weights"
    assert message in finding.message
    assert fix in finding.fix


def test_a_repository_with_a_wrong_index(hub: dict[str, Any]) -> None:
    hub["metadata"].weight_map["mlp1.9.weight"] = SINGLE
    (finding,) = [f for f in inspect("user/name").findings if f.level == "problem"]
    assert finding.area == "weights"
    assert "places 1 tensors wrongly, such as mlp1.9.weight" in finding.message


# -------------------------------------------------------------------------------------------------------- command line


def test_table_is_aligned_and_within_119_columns() -> None:
    text = inspect(CHAT / PHI3).table()
    title, empty, *lines = text.splitlines()
    assert title.endswith("phi3-phi3_chat: healthy, 7 notes")
    assert empty == ""
    assert max(map(len, lines)) <= 119
    for line in lines:
        label, message = line[:21], line[21:]
        assert message[0] != " " or message.startswith("   ")
        assert not label.strip() or (label.split()[0] in LEVELS and label.split()[1] in AREAS)


def test_json_round_trip() -> None:
    diagnosis = inspect(CHAT / QWEN2)
    values = json.loads(json.dumps(diagnosis.to_dict()))
    again = Diagnosis(values["path"], [Finding(**finding) for finding in values["findings"]])
    assert again == diagnosis
    assert values["healthy"] is True


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CHAT / QWEN2) == 0
    assert "qwen2-internvl2_5: healthy" in capsys.readouterr().out
    folder = copy(tmp_path / "a")
    edit(folder, "config.json", template="vicuna")
    assert run(folder) == 1
    assert "1 problem, " in capsys.readouterr().out


def test_what_cannot_be_inspected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-5" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{", encoding="utf-8")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text("[" * 100_000, encoding="utf-8")
    for name, message in {
        "empty": "has no config.json",
        "run": f"look at {tmp_path / 'run' / 'checkpoint-5'}",
        "file": "is a file: give the folder",
        "broken": "is not valid JSON",
        "absent": "is no folder here",
        "nested": "recursion",
    }.items():
        with pytest.raises((CheckpointError, RecursionError), match=message):
            inspect(tmp_path / name)
        assert run(tmp_path / name) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert len(captured.err.splitlines()) == 1
        assert captured.out == ""


def test_json_output_is_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CHAT / QWEN2, json=True) == 0
    assert json.loads(capsys.readouterr().out) == inspect(CHAT / QWEN2).to_dict()
    assert run(tmp_path / "absent", json=True) == 2
    values = json.loads(capsys.readouterr().out)
    assert values["healthy"] is False
    assert "is no folder here" in values["error"]


def test_fix_writes_a_copy_without_problems(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy(tmp_path / "a")
    edit(folder, "tokenizer_config.json", chat_template=CHATML.replace(S2, QWEN_SYSTEM))
    edit(folder, "generation_config.json", eos_token_id=[2])
    edit(folder, "config.json", img_context_token_id=12, llm_config__attn_implementation="flash_attention_2")
    edit(folder, "preprocessor_config.json", **{**CLIP, "size": 224, "crop_size": 224})
    _code(modeling="class InternVLChatModel(PreTrainedModel): ...\n")(folder)
    problems = found(folder, level="problem")
    assert {f.area for f in problems} == {"tokenizer", "template", "processor", "generation", "code"}
    assert all("--fix" in f.fix for f in problems)
    assert run(folder, fix=tmp_path / "fixed", json=True) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["healthy"] is False
    assert values["fixed"]["healthy"] is True
    assert {f["area"] for f in values["fixed"]["findings"] if f["level"] == "note"} == {"family"}
    assert run(folder, fix=tmp_path / "fixed") == 1  # taken now
    assert "fixed" in capsys.readouterr().err


def test_fix_keeps_what_only_the_processor_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tile limits are the configuration's, so --fix overrules them; the rest of a saved processor stays."""
    folder = copy(tmp_path / "a")
    own = {
        **SIZE,
        "no_upscale": True,
        "max_total_patches": 7,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    edit(folder, "processor_config.json", template="internvl2_5", image_processor={**own, "max_dynamic_patch": 3})
    assert [f.area for f in found(folder, level="problem")] == ["processor"]
    assert run(folder, fix=tmp_path / "fixed") == 0
    assert "processor: max_dynamic_patch 3 becomes 12, as config.json says" in capsys.readouterr().out
    image = json.loads((tmp_path / "fixed" / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
    assert {name: image[name] for name in own} == own
    assert image["max_dynamic_patch"] == 12


@pytest.mark.parametrize(
    ("own", "shown"),
    [
        ({"no_upscale": True, "exact": False, "max_total_patches": 7}, "no_upscale True, max_total_patches 7, exact"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, "image_mean [0.5, 0.5, 0.5], image_std [0.5, 0.5, 0.5], "),
    ],
    ids=["tiles", "normalisation"],
)
def test_settings_of_its_own_are_shown(own: dict[str, Any], shown: str, tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    edit(folder, "processor_config.json", template="internvl2_5", image_processor={**SIZE, **own})
    note, ok = found(folder, area="processor")
    assert (note.level, ok.level) == ("note", "ok")
    assert note.message.startswith(f"processor_config.json: {shown}") and "unlike every release" in note.message
    assert "--fix OUT keeps it" in note.fix


def test_a_dtype_without_fractions(tmp_path: Path) -> None:
    folder = copy(tmp_path / "a")
    edit(folder, "config.json", dtype="int8", torch_dtype="int8")
    (finding,) = found(folder, level="problem")
    assert (finding.area, finding.fix) == ("format", "set dtype to what the model was trained with")
    assert finding.message == "config.json: dtype is 'int8', not a floating-point type"


def test_a_normalisation_unlike_the_saved_processors(tmp_path: Path) -> None:
    """Programs read one file or the other: the two must not normalise differently."""
    folder = copy(tmp_path / "a")
    edit(folder, "processor_config.json", template="internvl2_5", image_processor={**SIZE, "image_mean": [0.5] * 3})
    edit(folder, "preprocessor_config.json", image_mean=[0.485, 0.456, 0.406])
    (finding,) = found(folder, level="problem")
    assert "preprocessor_config.json: image_mean is [0.485, 0.456, 0.406], but the processor of" in finding.message


def test_settings_that_the_native_processor_does_not_apply(tmp_path: Path) -> None:
    folder = native_folder(tmp_path / "native")
    image = {"image_processor_type": "GotOcr2ImageProcessor", "image_size": 56, "no_upscale": True}
    edit(folder, "processor_config.json", image_seq_length=4, image_processor=image)
    (note,) = [f for f in found(folder, area="processor") if f.level == "note"]
    assert "unlike every release; transformers' own processor does not apply no_upscale" in note.message


def test_the_native_layout_as_convert_writes_it_is_healthy(tmp_path: Path) -> None:
    """The tiny checkpoint has a row for each token but for the native video placeholder, which no model reads."""
    convert(TINY, tmp_path / "native", "native", progress=False)
    tokenizer = json.loads((tmp_path / "native" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert tokenizer["extra_special_tokens"]["video_token"] == "<video>"
    assert inspect(tmp_path / "native").healthy


@pytest.mark.parametrize("error", [ZeroDivisionError, RecursionError, AssertionError])
def test_a_check_that_fails_is_a_finding(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(subject: Subject) -> Any:
        raise error("no reason")

    monkeypatch.setitem(doctor._CHECKS, "processor", fail)
    (finding,) = found(CHAT / QWEN2, level="problem")
    assert (finding.area, finding.message) == ("processor", f"cannot be checked: {error.__name__}: no reason")


def test_golden_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(CHAT / QWEN2, golden=tmp_path / "golden") == 0
    assert str(tmp_path / "golden" / "golden.json") in capsys.readouterr().out
    assert (tmp_path / "golden" / "golden.json").is_file()


# ------------------------------------------------------------------------------------------------------- documentation


def test_documented_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/doctor.md", "exec"), {})
    assert all(f"| {area} | " in text for area in AREAS)


# ----------------------------------------------------------------------------------------------------------- quantized

UP = "language_model.model.layers.0.mlp.up_proj"


def _packed(layer: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """A layer as AWQ stores it: other names and shapes instead of the weight."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        rows, columns = tensors.pop(f"{layer}.weight").shape
        tensors[f"{layer}.qweight"] = torch.zeros(columns, rows // 8, dtype=torch.int32)
        tensors[f"{layer}.qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        return tensors | {f"{layer}.scales": torch.ones(1, rows, dtype=torch.float32)}

    return change


def test_quantized_layers_are_their_methods_affair(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    retensor(folder, _packed(UP))
    assert {finding.level for finding in inspect(folder).findings if finding.area == "weights"} == {"problem"}
    edit(folder, "config.json", quantization_config={"quant_method": "awq", "bits": 4})
    found = [finding for finding in inspect(folder).findings if finding.area == "weights"]
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert "1 layers are quantized (awq)" in found[0].message
    retensor(folder, _without("language_model.model.layers.0.mlp.down_proj.weight"))
    found = [finding for finding in inspect(folder).findings if finding.area == "weights"]
    assert ["1 tensors are missing" in finding.message for finding in found if finding.level == "problem"] == [True]


def test_a_quantized_encoder_is_worth_a_note(tmp_path: Path) -> None:
    folder = copy(tmp_path / "model")
    retensor(folder, _packed("vision_model.encoder.layers.0.mlp.fc1"))
    edit(folder, "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    (found,) = [each for each in inspect(folder).findings if each.area == "weights" and each.level == "note"]
    assert "1 see or project images, such as vision_model.encoder.layers.0.mlp.fc1" in found.message
