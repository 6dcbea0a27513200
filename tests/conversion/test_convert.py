"""Whole checkpoints through `upgrade`, `convert` and `merge`, against the numbers of the original code."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import (
    CHAT,
    CHECKPOINTS,
    CONTEXT,
    END_OF_TURN,
    INTERNLM2,
    LLAMA,
    PHI3,
    QWEN2,
    assert_same,
    batch,
    chat_config,
    expected,
    llm_dict,
    load,
    record,
)
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from internvl_hub.checkpoint_internvl import INDEX, SINGLE, CheckpointError, scan_weights
from internvl_hub.conversion.convert import convert, upgrade
from internvl_hub.conversion.merge import merge
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.native_internvl import NativeLayoutError
from internvl_hub.processing_internvl import InternVLProcessor

EACH = pytest.mark.parametrize("name", CHECKPOINTS)
NATIVE = pytest.mark.parametrize("name", [QWEN2, INTERNLM2, PHI3])
FULL = "model.safetensors"


def _source(name: str, folder: Path, drop: tuple[str, ...] = (), **config: Any) -> Path:
    """A fixture checkpoint as it was released, without reference numbers."""
    shutil.copytree(CHAT / name, folder, ignore=shutil.ignore_patterns("expected*", *drop))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **config}))
    return folder


def _assert_reference(folder: Path, name: str) -> None:
    """Logits and greedy ids of the original code."""
    model = InternVLChatModel.from_pretrained(folder).eval()
    inputs, reference = batch(name, labels=False), expected(name)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs).logits[seen]
    torch.testing.assert_close(logits, reference["forward.logits"][seen], rtol=1e-5, atol=1e-5)
    assert model.img_context_token_id == CONTEXT


_CHAT = """
import json, sys
sys.modules["internvl_hub"] = None
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
folder, tensors, cases = sys.argv[1:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
pixels, answers = load_file(tensors), []
for k, case in enumerate(json.loads(cases)):
    options = {"max_new_tokens": 12, "do_sample": False}
    arguments = (pixels.get(f"chat.{k}.pixel_values"), case["question"], options, case["history"])
    answers.append(model.chat(tokenizer, *arguments, num_patches_list=case["num_patches_list"]))
print(json.dumps(answers))
"""


def _assert_chats(folder: Path, name: str) -> None:
    """The original's answers, in a fresh interpreter in which the package cannot be imported."""
    cases = record(name)["cases"]
    arguments = (str(folder), str(CHAT / name / "expected.safetensors"), json.dumps(cases))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder.parent / "modules")}
    command = [sys.executable, "-c", _CHAT, *arguments]
    done = subprocess.run(command, cwd=folder.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [case["response"] for case in cases]


# ------------------------------------------------------------------------------------------------------------ upgrade

_OLD_CODE = "raise RuntimeError('code of the old repository ran')\n"


def _old_repository(name: str, folder: Path) -> Path:
    """In the old remote-code form: foreign code, its auto_map, a wrong template, null system message, dead keys."""
    auto_map = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
                "AutoModel": "modeling_internvl_chat.InternVLChatModel"}  # fmt: skip
    _source(name, folder, auto_map=auto_map, system_message=None, image_fold=None, tf_legacy_loss=False)
    for module in ("configuration_internvl_chat", "modeling_internvl_chat", "modeling_internlm2", "conversation"):
        (folder / f"{module}.py").write_text(_OLD_CODE)
    path = folder / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), "chat_template": "You are Qwen, created by Alibaba Cloud."}
    path.write_text(json.dumps(values))
    generation = {"eos_token_id": [END_OF_TURN[name], 0], "temperature": 0.7, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "README.md").write_text("# The model's own card\n")
    return folder


@EACH
@pytest.mark.newest
def test_an_old_repository_is_upgraded_and_chats(name: str, tmp_path: Path) -> None:
    source = _old_repository(name, tmp_path / "old")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    report = upgrade(source, tmp_path / "new", progress=False)
    assert (report.layout, report.rewritten, report.dropped) == ("original", False, ())
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert (tmp_path / "new" / FULL).samefile(source / FULL)
    _assert_reference(tmp_path / "new", name)
    _assert_chats(tmp_path / "new", name)


def test_what_an_upgrade_cleans(tmp_path: Path) -> None:
    new = tmp_path / "new"
    upgrade(_old_repository(PHI3, tmp_path / "old"), new, progress=False)
    config = json.loads((new / "config.json").read_text())
    assert not {"system_message", "image_fold", "tf_legacy_loss", "pruned_heads", "_name_or_path"} & set(config)
    assert not {"tf_legacy_loss", "torchscript"} & set(config["llm_config"])
    assert config["llm_config"]["rope_parameters"]["rope_type"] == "longrope"
    assert config["img_context_token_id"] == CONTEXT
    assert "AutoModelForImageTextToText" in config["auto_map"]
    generation = json.loads((new / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == {END_OF_TURN[PHI3], 0} and generation["temperature"] == 0.7
    assert "Qwen" not in "".join(p.read_text() for p in new.iterdir() if p.suffix in (".json", ".jinja"))
    assert not any(_OLD_CODE in path.read_text() for path in new.glob("*.py"))
    assert (new / "README.md").read_text() == "# The model's own card\n"
    template = AutoTokenizer.from_pretrained(new).apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    assert template.endswith("<|user|>\nHi<|end|>") and "书生" in template


def test_rewriting_shards_and_overwriting(tmp_path: Path) -> None:
    source = _source(QWEN2, tmp_path / "old")
    report = upgrade(source, tmp_path / "new", rewrite=True, max_shard_size="100KB", progress=False)
    shards = sorted(path.name for path in (tmp_path / "new").glob("*.safetensors"))
    assert report.rewritten and len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    weights = {k: v for shard in shards for k, v in load_file(tmp_path / "new" / shard).items()}
    assert_same(weights, load_file(source / FULL))
    _assert_reference(tmp_path / "new", QWEN2)
    with pytest.raises(FileExistsError, match="overwrite"):
        upgrade(source, tmp_path / "new", progress=False)
    upgrade(tmp_path / "new", tmp_path / "newer", progress=False)  # from shards
    upgrade(source, tmp_path / "new", overwrite=True, progress=False)
    assert not (tmp_path / "new" / INDEX).exists()
    assert scan_weights(tmp_path / "newer").checked().tensors.keys() == weights.keys()


def test_pickled_weights_become_safetensors(tmp_path: Path) -> None:
    source = _source(QWEN2, tmp_path / "old", drop=("*.safetensors",))
    weights = load_file(CHAT / QWEN2 / FULL)
    dead = {"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    torch.save({**weights, **dead}, source / "pytorch_model.bin")
    report = upgrade(source, tmp_path / "new", progress=False)
    assert report.rewritten and report.dropped == tuple(dead)
    assert "left out, read by no model: language_model.model.layers.0" in str(report)
    assert_same(load_file(tmp_path / "new" / FULL), weights)


# ---------------------------------------------------------------------------------------------------------- processor

# What no field of config.json says; each differs from the default.
BEYOND = {"image_mean": [0.5, 0.25, 0.75], "image_std": [0.5, 0.5, 0.25], "no_upscale": True, "max_total_patches": 7,
          "divide_patches_by_images": True, "max_pixels": 90000, "exact": False}  # fmt: skip
LOST_IN_NATIVE = ("no_upscale", "max_total_patches", "divide_patches_by_images", "max_pixels", "exact")


def _set_processor(folder: Path, image: dict[str, Any], **fields: Any) -> Path:
    path = folder / "processor_config.json"
    values = json.loads(path.read_text())
    values["image_processor"] |= image
    path.write_text(json.dumps({**values, **fields}))
    return folder


def _upgraded(folder: Path) -> Path:
    """A fixture checkpoint with a saved processor."""
    upgrade(_source(QWEN2, folder.with_name(f"{folder.name}-source")), folder, progress=False)
    return folder


def test_settings_that_only_the_saved_processor_knows_survive(tmp_path: Path) -> None:
    old = _set_processor(_upgraded(tmp_path / "old"), BEYOND, return_num_patches=False)
    report = upgrade(old, tmp_path / "new", progress=False)
    assert report.processor == ()
    native = convert(old, tmp_path / "native", "native", progress=False)
    back = convert(tmp_path / "native", tmp_path / "back", "original", progress=False)
    assert back.processor == ()
    for setting in (*LOST_IN_NATIVE, "return_num_patches"):
        (sentence,) = [sentence for sentence in native.processor if sentence.startswith(f"{setting} ")]
        assert sentence.endswith("is kept, but transformers' own does not apply it")
        assert f"processor: {sentence}" in str(native).splitlines()
    assert len(native.processor) == len(LOST_IN_NATIVE) + 1
    picture = Image.effect_noise((150, 60), 80).convert("RGB")
    wanted = InternVLProcessor.from_pretrained(old)
    for folder in ("new", "native", "back"):
        processor = InternVLProcessor.from_pretrained(tmp_path / folder)
        assert {name: getattr(processor.image_processor, name) for name in BEYOND} == BEYOND
        pixels = [p.image_processor(picture)["pixel_values"] for p in (processor, wanted)]
        assert torch.equal(*pixels)
    saved = [json.loads((tmp_path / folder / "processor_config.json").read_text()) for folder in ("new", "back")]
    assert saved[0] == saved[1] and saved[0]["return_num_patches"] is False


def test_normalisation_reaches_the_native_processor(tmp_path: Path) -> None:
    old = _set_processor(_upgraded(tmp_path / "old"), BEYOND)
    convert(old, tmp_path / "native", "native", progress=False)
    theirs = GotOcr2ImageProcessorPil.from_pretrained(tmp_path / "native")
    assert (list(theirs.image_mean), list(theirs.image_std)) == (BEYOND["image_mean"], BEYOND["image_std"])
    video = json.loads((tmp_path / "native" / "video_preprocessor_config.json").read_text())
    assert video["image_mean"] == BEYOND["image_mean"] and "exact" not in video


def test_a_model_of_one_tile_stays_one_there_and_back(tmp_path: Path) -> None:
    """transformers' own processor tiles whatever its file says; this package's must not."""
    old = _source(QWEN2, tmp_path / "old", dynamic_image_size=False, use_thumbnail=False)
    report = convert(old, tmp_path / "native", "native", progress=False)
    assert report.processor == ("dynamic_image_size False is kept, but transformers' own does not apply it",)
    assert convert(tmp_path / "native", tmp_path / "back", "original", progress=False).processor == ()
    for folder in ("native", "back"):
        processor = InternVLProcessor.from_pretrained(tmp_path / folder).image_processor
        assert (processor.dynamic_image_size, processor.use_thumbnail) == (False, False)
        assert processor.num_tiles(500, 100) == 1


@pytest.mark.parametrize("to", ["original", "native"])
def test_a_processor_that_contradicts_the_configuration_is_overruled_and_reported(to: str, tmp_path: Path) -> None:
    wrong = {"max_dynamic_patch": 3, "use_thumbnail": False, "image_size": 28}
    old = _set_processor(_upgraded(tmp_path / "old"), {**wrong, "no_upscale": True}, template="phi3-chat")
    report = convert(old, tmp_path / "new", to, progress=False)
    config = json.loads((old / "config.json").read_text())
    wanted = {"max_dynamic_patch": (3, config["max_dynamic_patch"]), "use_thumbnail": (False, True),
              "image_size": (28, config["force_image_size"]),
              "template": ("phi3-chat", config["template"])}  # fmt: skip
    sentences = [f"{name} {a!r} becomes {b!r}, as config.json says" for name, (a, b) in wanted.items()]
    assert set(sentences) == {sentence for sentence in report.processor if "config.json" in sentence}
    processor = InternVLProcessor.from_pretrained(tmp_path / "new")
    assert processor.template == config["template"] and processor.image_processor.no_upscale is True
    assert {name: getattr(processor.image_processor, name) for name in wrong} == {n: wanted[n][1] for n in wrong}


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"exact": "x"}, "exact is 'x', not true or false"),
        ({"max_total_patches": -1}, "max_total_patches must be at least 1, got -1"),
        ({"max_pixels": 1e30}, "max_pixels is 1e+30, not an integer or null"),
        ({"image_mean": [1e30, 0, 0]}, "image_mean is [1e+30, 0, 0], not three numbers from 0 to 1"),
        ({"image_std": True}, "image_std is True, not three numbers"),
        ({"image_mean": 0}, "image_mean is 0, not three numbers"),
        ({"min_dynamic_patch": []}, "TypeError"),
    ],
    ids=["flag", "budget", "limit", "mean", "deviation", "one mean", "least"],
)
def test_a_processor_that_cannot_be_used_is_written_anew_and_reported(
    image: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    old = _upgraded(tmp_path / "old")
    good = json.loads((old / "processor_config.json").read_text())
    (sentence,) = upgrade(_set_processor(old, image), tmp_path / "new", progress=False).processor
    assert sentence.startswith("processor_config.json cannot be used (") and reason in sentence
    assert json.loads((tmp_path / "new" / "processor_config.json").read_text()) == good


# ------------------------------------------------------------------------------------------------------------ convert


@NATIVE
def test_there_and_back(name: str, tmp_path: Path) -> None:
    source = _old_repository(name, tmp_path / "old")
    report = convert(source, tmp_path / "native", "native", max_shard_size="100KB", progress=False)
    assert report.tensors == len(scan_weights(tmp_path / "native").checked().tensors)
    native, loading = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(loading.values())
    inputs, reference = batch(name, labels=False), expected(name)
    seen = inputs["attention_mask"].bool()
    with torch.no_grad():
        logits = native.eval()(**inputs).logits[seen]
    torch.testing.assert_close(logits, reference["forward.logits"][seen], rtol=1e-5, atol=1e-5)
    convert(tmp_path / "native", tmp_path / "back", "original", progress=False)
    assert_same(load_file(tmp_path / "back" / FULL), load_file(source / FULL))
    _assert_reference(tmp_path / "back", name)
    _assert_chats(tmp_path / "back", name)
    upgrade(source, tmp_path / "direct", progress=False)
    for file in ("config.json", "processor_config.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / file).read_text() == (tmp_path / "direct" / file).read_text()


@NATIVE
def test_native_processor_files_give_the_same_inputs(name: str, tmp_path: Path) -> None:
    """Text, ids and pixels by transformers' tokenizer and image processor from the written files, against ours.

    transformers' `InternVLProcessor` itself needs torchvision; what it does with the text is the one replacement here.
    """
    convert(_source(name, tmp_path / "old"), tmp_path / "native", "native", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    assert tokenizer.context_image_token_id == CONTEXT and tokenizer.video_token == "<video>"
    ours = InternVLProcessor.from_pretrained(tmp_path / "native")
    options = json.loads((tmp_path / "native" / "processor_config.json").read_text())
    assert ours.num_image_token == options["image_seq_length"] == 4
    picture = Image.effect_noise((150, 60), 80).convert("RGB")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A cat."}]
    wanted = ours.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    images = GotOcr2ImageProcessorPil.from_pretrained(tmp_path / "native")
    found = images(picture, crop_to_patches=options["image_processor"]["crop_to_patches"], return_tensors="pt")
    torch.testing.assert_close(found["pixel_values"], wanted["pixel_values"], rtol=0, atol=1e-5)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text.count("<IMG_CONTEXT>\n") == 1 and ours.chat_template.count("<image>") > 0
    context = "<IMG_CONTEXT>" * 4 * len(found["pixel_values"])
    ids = tokenizer(text.replace("<IMG_CONTEXT>", f"<img>{context}</img>"), add_special_tokens=False)["input_ids"]
    assert ids == wanted["input_ids"][0].tolist()


@pytest.mark.parametrize("name", [QWEN2])
def test_native_template_has_one_placeholder_per_video(name: str, tmp_path: Path) -> None:
    convert(_source(name, tmp_path / "old"), tmp_path / "native", "native", progress=False)
    content = [{"type": "video", "video": ["a", "b"]}, {"type": "text", "text": "What happens?"}]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "native")
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert "<video>\nWhat happens?" in text and text.count("<video>") == 1


def test_pixel_shuffle_v1_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(NativeLayoutError, match="pixel shuffle is v2"):
        convert(_source(LLAMA, tmp_path / "old"), tmp_path / "native", "native", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


# ------------------------------------------------------------------------------------------------------------ merge


def _adapter(folder: Path, base: Path) -> InternVLChatModel:
    model = load(QWEN2, base)
    wrapped = get_peft_model(model, LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "fc2"]))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


@torch.no_grad()
def test_peft_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    base = _source(QWEN2, tmp_path / "base")
    wrapped, inputs = _adapter(tmp_path / "adapter", base), batch(QWEN2, labels=False)
    merge(tmp_path / "adapter", tmp_path / "merged", base, progress=False)
    merged = InternVLChatModel.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(**inputs).logits, wrapped(**inputs).logits, rtol=1e-5, atol=1e-5)
    upgrade(base, tmp_path / "plain", progress=False)
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "merged" / file).read_text() == (tmp_path / "plain" / file).read_text()


def test_adapters_inside_a_checkpoint_are_merged(tmp_path: Path) -> None:
    source = _source(QWEN2, tmp_path / "old", use_llm_lora=4)
    weights = load_file(source / FULL)
    name = "language_model.model.layers.0.mlp.up_proj"
    up, down = torch.randn(weights[f"{name}.weight"].shape[0], 4), torch.randn(4, weights[f"{name}.weight"].shape[1])
    prefix = "language_model.base_model.model."
    stored = {k.replace("language_model.", prefix): v for k, v in weights.items() if k != f"{name}.weight"}
    module = name.replace("language_model.", prefix)
    stored |= {f"{module}.base_layer.weight": weights[f"{name}.weight"], f"{module}.lora_A.default.weight": down,
               f"{module}.lora_B.default.weight": up}  # fmt: skip
    save_file(stored, source / FULL, metadata={"format": "pt"})
    assert merge(source, tmp_path / "merged", progress=False).rewritten
    expected_weights = {**weights, f"{name}.weight": weights[f"{name}.weight"] + 2 * up @ down}
    assert_same(load_file(tmp_path / "merged" / FULL), expected_weights, rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_llm_lora"] == 0


def test_nothing_to_merge(tmp_path: Path) -> None:
    source = _source(QWEN2, tmp_path / "old")
    with pytest.raises(CheckpointError, match="has no adapter"):
        merge(source, tmp_path / "merged")
    with pytest.raises(ValueError, match="leave base out"):
        merge(source, tmp_path / "merged", base=source)


# --------------------------------------------------------------------------------------------------------- bad sources


def _truncate(folder: Path) -> None:
    data = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(data[: len(data) // 2])


def _shard(folder: Path) -> Path:
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    for part in range(2):
        save_file(
            {k: weights[k] for k in names[part::2]}, folder / f"part{part}.safetensors", metadata={"format": "pt"}
        )
    index = {"weight_map": {k: f"part{i % 2}.safetensors" for i, k in enumerate(names)}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder / INDEX


def _lose_shard(folder: Path) -> None:
    _shard(folder)
    (folder / "part1.safetensors").unlink()


def _misplace(folder: Path) -> None:
    index = _shard(folder)
    values = json.loads(index.read_text())
    values["weight_map"]["mlp1.1.weight"] = "part0.safetensors"
    values["weight_map"]["mlp1.1.bias"] = "part0.safetensors"
    index.write_text(json.dumps(values))


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["llm_config"] |= changes.pop("llm_config", {})
    path.write_text(json.dumps({**values, **changes}))


def _write(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**values, **changes}))


def _edit_vision(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    _edit(folder, vision_config={**values["vision_config"], **changes})


def _as_integers(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    save_file({name: tensor.int() for name, tensor in weights.items()}, folder / SINGLE, metadata={"format": "pt"})


def _shrink_vocabulary(folder: Path) -> None:
    weights = load_file(folder / SINGLE)
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = weights[name][:10].clone()
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    _edit(folder, llm_config={"vocab_size": 10})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, "model.safetensors is damaged or incomplete .*fetch it again"),
        (_lose_shard, "lacks the shard part1.safetensors that model.safetensors.index.json names: fetch it"),
        (_misplace, "model.safetensors.index.json places wrongly 1 tensor.*write the index anew"),
        (lambda folder: _shard(folder).write_text("{"), "model.safetensors.index.json is not valid JSON"),
        (lambda folder: (folder / SINGLE).unlink(), "has no weights: looked for model.safetensors"),
        (lambda folder: _edit(folder, llm_config={"architectures": ["NoSuchLM"], "model_type": "none"}),
         "architecture 'NoSuchLM'"),
        (lambda folder: _edit(folder, model_type="llava"), "holds a 'llava' checkpoint"),
        (lambda folder: _edit(folder, llm_config={"num_hidden_layers": 9}), "do not belong together: .* missing"),
        (_shrink_vocabulary, "id 17, but config.json says vocab_size 10: the tokenizer files belong"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: _edit(folder, template="no-such"), "no-such"),
        (lambda folder: [(folder / f).unlink() for f in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
        (lambda folder: _edit(folder, select_layer="x"), "select_layer must be an integer, got 'x'"),
        (lambda folder: _edit(folder, template=[]), "template must be a text or null"),
        (lambda folder: _edit(folder, system_message=3), "system_message must be a text or null"),
        (lambda folder: _edit(folder, dtype="int8", torch_dtype="int8"), "dtype is 'int8', not a floating"),
        (lambda folder: _edit(folder, vision_config="x"), "config.json cannot be used .*: correct it"),
        (lambda folder: _edit_vision(folder, num_attention_heads=0), "not divisible by num_attention_heads 0"),
        (lambda folder: _edit_vision(folder, layer_norm_eps="x"), "config.json: vision_config.layer_norm_eps is 'x'"),
        (lambda folder: _edit_vision(folder, hidden_act="no"), "config.json cannot be used .KeyError: 'no'"),
        (lambda folder: _edit(folder, llm_config={"rope_theta": -1}), "llm_config.rope_parameters.rope_theta is -1"),
        (_as_integers, r"79 tensors hold no floating-point numbers, such as .* \(int32\)"),
        (lambda folder: _write(folder, "generation_config.json", eos_token_id=[None]), "eos_token_id is .None., not"),
        (lambda folder: _write(folder, "generation_config.json", pad_token_id=-1), "pad_token_id is -1"),
        (lambda folder: _write(folder, "tokenizer_config.json", added_tokens_decoder="x"), "the tokenizer of .* can"),
        (lambda folder: _write(folder, "tokenizer_config.json", tokenizer_class=["x"]), "the tokenizer of .* cannot"),
        (lambda folder: _write(folder, "tokenizer_config.json", model_max_length={}), "the tokenizer of .* cannot"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("to", ["original", "native"])
def test_bad_sources_are_one_line_and_leave_nothing(spoil: Any, message: str, to: str, tmp_path: Path) -> None:
    source = _source(QWEN2, tmp_path / "old")
    spoil(source)
    with pytest.raises(ValueError, match=message) as caught:
        convert(source, tmp_path / "new", to, progress=False)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_targets_are_never_lost(tmp_path: Path) -> None:
    source = _source(QWEN2, tmp_path / "old")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("years of work")
    for to in ("original", "native"):
        with pytest.raises(FileExistsError, match="taken"):
            convert(source, tmp_path / "taken", to, progress=False)
        with pytest.raises(FileExistsError, match="holds the source itself"):
            convert(source, tmp_path, to, overwrite=True, progress=False)
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match="to is 'gguf'"):
        convert(source, tmp_path / "new", "gguf")


def test_neither_folder_nor_repository(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder here and no repository within reach"):
        upgrade("nobody/nothing", tmp_path / "new", local_files_only=True)


@pytest.mark.parametrize("backend", ["qwen3", "qwen3_moe", "gpt_oss"])
def test_other_backends_there_and_back(backend: str, tmp_path: Path) -> None:
    template = "internvl3_5_gpt_oss" if backend == "gpt_oss" else "internvl2_5"
    model = InternVLChatModel(chat_config(backend, template=template, llm_config=llm_dict(backend)))
    model.save_pretrained(tmp_path / "old")
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(CHAT / QWEN2 / file, tmp_path / "old" / file)
    convert(tmp_path / "old", tmp_path / "native", "native", progress=False)
    convert(tmp_path / "native", tmp_path / "back", "original", progress=False)
    assert_same(load_file(tmp_path / "back" / FULL), load_file(tmp_path / "old" / FULL))
    again = InternVLChatModel.from_pretrained(tmp_path / "back")
    assert again.template == template and type(again.language_model) is type(model.language_model)
