"""`register()`: transformers' auto classes take this package, and nothing of a repository's code runs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import CHAT, INTERNLM2, LLAMA, QWEN2, record

_SCRIPT = """
import json, sys
from safetensors.torch import load_file
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer
from internvl_hub.conversion.register import register
register(); register()
folder, tensors, cases = sys.argv[1:]
for trust in (None, True):
    for auto in ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"):
        model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=trust).eval()
        assert type(model).__module__ == "internvl_hub.modeling_internvl_chat", type(model)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    assert type(config).__module__ == "internvl_hub.configuration_internvl_chat"
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    assert type(processor).__module__ == "internvl_hub.processing_internvl", type(processor)
    assert (processor.template, processor.num_image_token) == (config.template, 4)
    images = processor.image_processor
    assert type(images).__module__ == "internvl_hub.image_processing_internvl", type(images)
    assert (images.image_size, images.max_dynamic_patch) == (56, config.max_dynamic_patch)
    assert images.dynamic_image_size == config.dynamic_image_size
model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
pixels, case = load_file(tensors), json.loads(cases)[0]
options = {"max_new_tokens": 12, "do_sample": False}
print(json.dumps(model.chat(tokenizer, pixels["chat.0.pixel_values"], case["question"], options)))
"""


@pytest.mark.parametrize(
    "name", [QWEN2, *(pytest.param(name, marks=pytest.mark.newest) for name in (INTERNLM2, LLAMA))]
)
def test_auto_classes_ignore_the_code_of_a_repository(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(CHAT / name, folder, ignore=shutil.ignore_patterns("expected*"))
    values = json.loads((folder / "config.json").read_text())
    values["auto_map"] = {
        "AutoConfig": "configuration_internvl_chat.InternVLChatConfig",
        "AutoModel": "modeling_internvl_chat.InternVLChatModel",
        "AutoModelForCausalLM": "modeling_internvl_chat.InternVLChatModel",
    }
    (folder / "config.json").write_text(json.dumps(values))
    clip = {"image_processor_type": "CLIPImageProcessor", "size": 56, "crop_size": 56, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(clip))
    for module in ("configuration_internvl_chat", "modeling_internvl_chat"):
        (folder / f"{module}.py").write_text("raise RuntimeError('code of the repository ran')\n")
    cases = record(name)["cases"]
    command = [sys.executable, "-c", _SCRIPT, str(folder), str(CHAT / name / "expected.safetensors")]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command.append(json.dumps(cases))
    options = {"cwd": tmp_path, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == cases[0]["response"]
