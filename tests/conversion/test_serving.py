"""Serving: what engines are said to refuse, on folders written here and on broken ones; transformers serve."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import CHAT, INTERNLM2, LLAMA, PHI3, QWEN2
from transformers import AutoModelForImageTextToText, AutoProcessor

from internvl_hub.checkpoint_internvl import SINGLE
from internvl_hub.conversion.convert import convert, upgrade
from internvl_hub.conversion.doctor import inspect, run
from internvl_hub.conversion.serving import ENGINES, check_serving
from internvl_hub.tests.conversion.checkpoint_edits import edit
from internvl_hub.upload_to_hub import gather

try:
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler, DirectStreamer, Modality
except (ImportError, NameError):  # older versions need the packages of the server to import these
    ModelManager = None
SERVER = pytest.mark.skipif(ModelManager is None, reason="this transformers imports its server with openai alone")

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "checkpoints" / "internvl-tiny"
EXAMPLES = ROOT / "examples" / "images"
TITLES = [engine.title for engine in ENGINES.values()]


# --------------------------------------------------------------------------------------------------------------- tools


def refusals(folder: Path, *engines: str) -> dict[str, list[str]]:
    """Problems by engine."""
    found: dict[str, list[str]] = {}
    for engine in engines or tuple(ENGINES):
        found[engine] = [f.message for f in check_serving(folder, (engine,)) if f.level == "problem"]
    return found


def notes(folder: Path, engine: str) -> str:
    """All notes, as one text."""
    return "\n".join(f"{f.message} {f.fix}" for f in check_serving(folder, (engine,)) if f.level == "note")


@pytest.fixture(scope="module")
def upgraded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The fixture checkpoints in this package's form."""
    root = tmp_path_factory.mktemp("upgraded")
    for name in (QWEN2, INTERNLM2, LLAMA, PHI3):
        upgrade(CHAT / name, root / name, progress=False)
    return {name: root / name for name in (QWEN2, INTERNLM2, LLAMA, PHI3)}


@pytest.fixture
def folder(upgraded: dict[str, Path], tmp_path: Path) -> Path:
    """A checkpoint around Qwen2 as it is released, tiles of 448 pixels included: no engine has anything against it."""
    shutil.copytree(upgraded[QWEN2], tmp_path / "model")
    edit(tmp_path / "model", "config.json", force_image_size=448, vision_config__image_size=448)
    return tmp_path / "model"


# ---------------------------------------------------------------------------------------------------- what is accepted


def test_a_folder_of_released_form_is_accepted_by_all(folder: Path) -> None:
    findings = check_serving(folder)
    assert not [f for f in findings if f.level == "problem"]
    assert [f.message.split(" ")[0] for f in findings if f.level == "ok"] == TITLES
    assert {f.area for f in findings} == {"serving"}
    assert all(f.fix for f in findings if f.level != "ok")
    assert "--chat-template" in notes(folder, "sglang") and "<|video_pad|>" in notes(folder, "vllm")


@pytest.mark.parametrize(
    ("name", "lmdeploy", "sglang"),
    [
        (QWEN2, [], ["tiles"]),
        (INTERNLM2, [], ["tiles"]),
        (LLAMA, ["ps_version 'v1'", "select_layer is -4"], ["LlamaForCausalLM", "tiles"]),
        (PHI3, [], ["Phi3ForCausalLM", "tiles"]),
    ],
    ids=["qwen2", "internlm2", "llama", "phi3"],
)
def test_upgraded_checkpoints(upgraded: dict[str, Path], name: str, lmdeploy: list[str], sglang: list[str]) -> None:
    found = refusals(upgraded[name])
    assert found["vllm"] == []
    for wanted, messages in ((lmdeploy, found["lmdeploy"]), (sglang, found["sglang"])):
        assert len(messages) == len(wanted)
        assert all(part in message for part, message in zip(wanted, messages, strict=True))
    assert ("--backend pytorch" in notes(upgraded[name], "lmdeploy")) == (name == PHI3)
    doubled = "the tokenizer adds another"
    assert (doubled in notes(upgraded[name], "lmdeploy")) == (name in (INTERNLM2, PHI3))
    assert doubled not in notes(upgraded[name], "vllm")


def test_gathered_and_native_copies_of_the_tiny_checkpoint(tmp_path: Path) -> None:
    gather(TINY, tmp_path / "tiny")
    convert(TINY, tmp_path / "native", "native", progress=False)
    assert refusals(tmp_path / "tiny", "vllm") == {"vllm": []}
    found = refusals(tmp_path / "native")
    assert found["vllm"] == found["lmdeploy"] == []
    assert "not among its models" in found["sglang"][0]


# ----------------------------------------------------------------------------------------------------- what is refused

_EVERY = ("vllm", "lmdeploy", "sglang")
_BROKEN = {
    "another architecture": ({"architectures": ["LlavaForCausalLM"]}, _EVERY, "architectures[0]"),
    "no architecture of the language model": ({"llm_config__architectures": None}, _EVERY, "llm_config.architectures"),
    "no auto_map": ({"auto_map": None}, ("vllm", "lmdeploy"), "auto_map names no AutoConfig"),
    "no forced size": ({"force_image_size": None}, ("lmdeploy",), "force_image_size"),
    "two sizes": ({"vision_config__image_size": 56}, ("vllm", "lmdeploy"), "tokens counted at 448"),
    "squares": ({"pad2square": True}, _EVERY, "pad2square"),
    "no thumbnail": ({"use_thumbnail": False}, ("sglang",), "use_thumbnail False"),
    "one tile": ({"dynamic_image_size": False}, ("lmdeploy", "sglang"), "dynamic_image_size"),
    "first pixel shuffle": ({"ps_version": "v1"}, ("lmdeploy",), "ps_version"),
    "inner layer": ({"select_layer": -2}, ("lmdeploy",), "select_layer is -2"),
    "layer from the front": ({"select_layer": 1}, ("vllm", "lmdeploy"), "select_layer is 1"),
    "no norm": ({"vision_config__norm_type": None}, ("sglang",), "norm_type"),
    "unknown dtype": ({"torch_dtype": "bf16"}, _EVERY, "torch_dtype 'bf16'"),
    "integer dtype": ({"llm_config__dtype": "int8"}, _EVERY, "llm_config.dtype 'int8'"),
    "adapters": ({"use_llm_lora": 8}, _EVERY, "LoRA"),
    "renamed template": ({"template": "internvl9"}, _EVERY, "template 'internvl9' is unknown"),
}


@pytest.mark.parametrize("case", list(_BROKEN))
def test_a_broken_configuration_is_refused_by_those_who_read_it(folder: Path, case: str) -> None:
    changes, engines, words = _BROKEN[case]
    edit(folder, "config.json", **changes)
    found = refusals(folder)
    assert {engine for engine, messages in found.items() if messages} == set(engines)
    assert all(any(words in message for message in found[engine]) for engine in engines)


def test_missing_code(folder: Path) -> None:
    (folder / "configuration_internvl_chat.py").unlink()
    found = refusals(folder)
    assert found["sglang"] == [] and all("is missing" in found[engine][0] for engine in ("vllm", "lmdeploy"))


def test_a_dropped_image_token(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text(encoding="utf-8").replace("<IMG_CONTEXT>", "<OTHER>")
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    config = (folder / "tokenizer_config.json").read_text(encoding="utf-8").replace("<IMG_CONTEXT>", "<OTHER>")
    (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
    assert all(any("no <IMG_CONTEXT>" in m for m in messages) for messages in refusals(folder).values())


def test_stop_tokens(folder: Path) -> None:
    edit(folder, "generation_config.json", eos_token_id=0)
    assert all(messages == [] for messages in refusals(folder).values())  # the tokenizer's own end still stops them
    edit(folder, "tokenizer_config.json", eos_token="<img>")
    assert all("answers run on" in messages[0] for messages in refusals(folder).values())


def test_chat_templates(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<image>", "<picture>"), encoding="utf-8")
    assert "writes 0 <image>" in refusals(folder)["vllm"][0]
    path.write_text("{{ raise_exception('no') }}", encoding="utf-8")
    assert "fails on an image part" in refusals(folder)["lmdeploy"][0]
    path.unlink()
    edit(folder, "tokenizer_config.json", chat_template=text)
    assert refusals(folder)["vllm"] == []
    edit(folder, "tokenizer_config.json", chat_template=None)
    assert "no chat template" in refusals(folder)["vllm"][0] and refusals(folder)["sglang"] == []


def test_tied_embeddings_without_a_head(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    save_file({k: v for k, v in tensors.items() if k != "language_model.lm_head.weight"}, folder / SINGLE)
    edit(folder, "config.json", llm_config__tie_word_embeddings=True, tie_word_embeddings=True)
    found = refusals(folder)
    assert "no output head is stored" in found["sglang"][0] and not found["vllm"]


def test_quantised_configurations(folder: Path) -> None:
    quantised = {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["vision_model", "mlp1"]}
    edit(folder, "config.json", quantization_config=quantised)
    assert all(messages == [] for messages in refusals(folder).values())
    edit(folder, "config.json", quantization_config={**quantised, "modules_to_not_convert": []})
    found = refusals(folder)
    assert "does not except vision_model" in found["vllm"][0] and not found["sglang"]
    ignore = {"quant_method": "compressed-tensors", "ignore": ["re:vision_model.*", "lm_head"]}
    edit(folder, "config.json", quantization_config=ignore)
    assert refusals(folder, "vllm") == {"vllm": []}
    edit(folder, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    found = refusals(folder)
    assert "bitsandbytes" in found["vllm"][0] and "bitsandbytes" in found["lmdeploy"][0] and not found["sglang"]


def test_packed_weights_need_their_configuration(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / SINGLE)
    assert all("no quantization_config" in messages[0] for messages in refusals(folder).values())


def test_broken_native_copies(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "n", "native", progress=False)
    edit(tmp_path / "n", "tokenizer_config.json", extra_special_tokens=None)
    assert "context_image_token" in refusals(tmp_path / "n", "lmdeploy")["lmdeploy"][0]
    for file in ("processor_config.json", "preprocessor_config.json"):
        (tmp_path / "n" / file).unlink()
    assert "describes the image processor" in refusals(tmp_path / "n", "vllm")["vllm"][1]


def test_what_is_no_chat_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    assert all("not an InternVL" in messages[0] for messages in refusals(tmp_path).values())


def test_odd_files_are_findings(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[", encoding="utf-8")
    assert all("the stop tokens cannot be checked" in messages[0] for messages in refusals(folder).values())


# ---------------------------------------------------------------------------------------------------------- the doctor


def test_the_doctor_has_a_section_on_request(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, "config.json", force_image_size=None)
    assert not [f for f in inspect(folder).findings if f.area == "serving"]
    serving = [f for f in inspect(folder, serving=("lmdeploy",)).findings if f.area == "serving"]
    assert serving == check_serving(folder, ("lmdeploy",))
    run(folder, serving=("lmdeploy",))
    assert "problem  serving     LMDeploy: config.json: force_image_size" in capsys.readouterr().out


def test_unknown_engines_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="'ollama'; choose among vllm, lmdeploy, sglang"):
        check_serving(folder, ("ollama",))


# ------------------------------------------------------------------------------------------------- transformers serve


def question(file: str, text: str) -> list[dict[str, Any]]:
    """OpenAI messages."""
    data = base64.b64encode((EXAMPLES / file).read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


@SERVER
def test_the_pieces_of_transformers_serve_work_on_the_remote_code(tmp_path: Path) -> None:
    """Messages, processor, generation and streaming exactly as its handler calls them, without its web server."""
    gather(TINY, tmp_path / "tiny")
    manager = ModelManager(device="cpu", trust_remote_code=True)
    processor = manager._load_processor(f"{tmp_path / 'tiny'}@main")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "tiny", trust_remote_code=True, dtype="auto")
    messages = BaseHandler.get_processor_inputs_from_messages(
        question("number_4_wide.png", "What is the number?"), Modality.VLM
    )
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tools=None,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
    )
    handed = AutoProcessor.from_pretrained(tmp_path / "tiny", trust_remote_code=True)
    prompt = handed.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is the number?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    wanted = handed(text=prompt, images=Image.open(EXAMPLES / "number_4_wide.png"), return_tensors="pt")
    assert torch.equal(inputs["input_ids"], wanted["input_ids"])
    assert torch.equal(inputs["pixel_values"], wanted["pixel_values"])

    async def streamed() -> str:
        queue: asyncio.Queue[Any] = asyncio.Queue()
        streamer = DirectStreamer(processor.tokenizer._tokenizer, asyncio.get_running_loop(), queue)
        model.generate(**inputs, streamer=streamer, generation_config=model.generation_config, tokenizer=processor)
        pieces = []
        while (piece := await queue.get()) is not None:
            pieces.append(piece)
        return "".join(pieces)

    ids = model.generate(**inputs, generation_config=model.generation_config, tokenizer=processor)
    answer = processor.decode(ids[0, inputs["input_ids"].shape[-1] :], skip_special_tokens=True)
    assert answer == asyncio.run(streamed()) == "5433"


def test_the_processor_takes_every_argument_of_transformers_serve(tmp_path: Path) -> None:
    gather(TINY, tmp_path / "tiny")
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny", trust_remote_code=True)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, tools=None, load_audio_from_video=False, **options)
    assert inputs["input_ids"].tolist() == processor.apply_chat_template(messages, **options)["input_ids"].tolist()


@SERVER
def test_transformers_serve_cannot_host_the_remote_code_yet(tmp_path: Path) -> None:
    """It looks the class up among transformers' own; docs/serving.md says so, and has to change when this passes."""
    gather(TINY, tmp_path / "tiny")
    with pytest.raises(AttributeError, match="InternVLChatModel"):
        ModelManager(device="cpu", trust_remote_code=True)._load_model(f"{tmp_path / 'tiny'}@main")


_SERVER = [name for name in ("fastapi", "uvicorn", "openai", "torchvision") if importlib.util.find_spec(name) is None]


@pytest.mark.skipif(bool(_SERVER), reason=f"transformers[serving] and torchvision are needed: {', '.join(_SERVER)}")
def test_transformers_serve_answers_about_an_image(tmp_path: Path) -> None:
    convert(TINY, tmp_path / "native", "native", progress=False)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    code = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(tmp_path / "native"), "--device", "cpu", "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=2).read()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        body = {"model": str(tmp_path / "native"), "max_tokens": 20, "temperature": 0}
        body["messages"] = question("number_4_wide.png", "What is the number?")
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        reply = json.loads(urllib.request.urlopen(request, timeout=120).read())
        assert reply["choices"][0]["message"]["content"] == "5433"
        assert reply["choices"][0]["finish_reason"] == "stop"
    finally:
        server.terminate()
        server.wait(timeout=20)
