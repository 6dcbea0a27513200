"""A checkpoint too small to be one, and its code: what uploads are tried with."""

import json
from pathlib import Path

import torch
from safetensors.torch import save


def weights(text: str, *names: str) -> str:
    """A safetensors file whose tensors hold the bytes of a text."""
    return save({name: torch.tensor(list(text.encode()), dtype=torch.uint8) for name in names or ("a",)}).decode()


CODE = {
    "configuration_internvl_chat.py": "class InternVLChatConfig: ...\n",
    "modeling_internvl_chat.py": "from .configuration_internvl_chat import InternVLChatConfig\n",
    "processing_internvl.py": "",
    "image_processing_internvl.py": "",
}
DATA = {
    "config.json": json.dumps({"model_type": "internvl_chat"}),
    "processor_config.json": "{}",
    "model.safetensors": weights("weights " * 391),
    "tokenizer.json": "{}",
}
TOKEN = "token-of-user"


def write(folder: Path, files: dict[str, str]) -> Path:
    """A folder with these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder
