"""One deterministic output of a checkpoint, computed in a clean interpreter, and its comparison with another's.

A fixed picture and a fixed question give greedy token ids and the logits behind the prompt; of a vision encoder the
mean of its features is taken. The interpreter cannot import this package and has a cache of its own, so what runs is
the code and the weights of the folder or repository alone. This tells whether two places hold the same model, not
whether the model is good.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..upload_to_hub import last_error

TOKENS = 16  # greedy
# Largest difference of logits that makes no other model, as a share of the largest logit. The same code on the same
# machine gives the same bits; this leaves room for another device or another attention kernel.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}

_SCRIPT = """
import json, sys
from importlib import import_module
sys.modules["internvl_hub"] = None
import torch, transformers
from PIL import Image
source, task, layout, output = sys.argv[1:5]
where = {"revision": sys.argv[5]} if len(sys.argv) > 5 else {}
options = {**where, "trust_remote_code": layout == "original"}
def auto(module, name):
    return getattr(import_module(f"transformers.models.auto.{module}"), name)
device = "cuda" if torch.cuda.is_available() else "cpu"
name = "AutoModel" if layout == "original" else "AutoModelForImageTextToText"
model = getattr(transformers, name).from_pretrained(source, dtype="auto", **options).eval().to(device)
side = 96
image = Image.new("RGB", (side, side))
image.putdata([(x * 255 // side, y * 255 // side, (x * y) % 256) for y in range(side) for x in range(side)])
answer = []
with torch.no_grad():
    if task == "image-feature-extraction":
        processor = auto("image_processing_auto", "AutoImageProcessor").from_pretrained(source, **options)
        pixels = processor(image, return_tensors="pt")["pixel_values"].to(device, model.dtype)
        values = model(pixels).last_hidden_state.mean(dim=(0, 1))
    elif layout == "native":  # its processor needs torchvision, so the tile and the prompt are made by hand
        tokenizer = auto("tokenization_auto", "AutoTokenizer").from_pretrained(source, **options)
        size = model.config.vision_config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        tile = torch.linspace(-1, 1, 3 * height * width).sin().view(1, 3, height, width)
        text = tokenizer("What is in the picture?", return_tensors="pt")["input_ids"]
        image_ids = torch.full((1, model.config.image_seq_length), model.config.image_token_id)
        ids = torch.cat([image_ids, text], dim=1).to(device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        inputs["pixel_values"] = tile.to(device, model.dtype)
    else:
        processor = auto("processing_auto", "AutoProcessor").from_pretrained(source, **options)
        content = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        ).to(device, model.dtype)
    if task != "image-feature-extraction":
        made = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
        answer = [int(token) for token in made[0, -TOKENS:]]
        values = model(**inputs).logits[0, -1]
found = {"ids": answer, "values": values.float().tolist(), "dtype": str(model.dtype).removeprefix("torch.")}
found["class"] = f"{type(model).__module__}.{type(model).__name__}"
with open(output, "w") as file:
    json.dump(found, file)
""".replace("TOKENS", str(TOKENS))


class ProbeError(RuntimeError):
    """A checkpoint does not load, or two do not compute the same."""


@dataclass(frozen=True)
class Output:
    """Greedy ids; logits (vocabulary,) or mean features (width,) in float32; the type of the weights; the class."""

    ids: list[int]
    values: list[float]
    dtype: str
    model_class: str

    @property
    def digest(self) -> str:
        """Of ids and values, bit for bit."""
        return hashlib.sha256(json.dumps([self.ids, self.values]).encode()).hexdigest()[:16]


def probe(
    source: str | Path,
    task: str,
    *,
    layout: str = "original",
    revision: str | None = None,
    environment: Mapping[str, str] | None = None,
    cache: str | Path | None = None,
) -> Output:
    """Computes the output of a folder, or of a repository where `environment` says on which Hub.

    Args:
        source: A folder that loads alone (see `upload_to_hub.gather`), or `user/name`.
        task: The Hub's name of what the model does.
        layout: "original" or "native".
        revision: Of a repository.
        environment: Replaces and adds variables; `HF_HUB_OFFLINE` is 1 without it.
        cache: Folder for downloads; a temporary one by default, so that everything comes from the Hub.

    Raises:
        ProbeError: It does not load or run; the message is the interpreter's last error.
    """
    with tempfile.TemporaryDirectory(dir=cache and Path(cache).parent) as work:
        variables = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": f"{work}/modules",
            "HF_HUB_CACHE": os.fspath(cache or f"{work}/hub"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **(environment or {}),
        }
        output = Path(work) / "output.json"
        arguments = [os.fspath(source), task, layout, str(output), *([revision] if revision else [])]
        command = [sys.executable, "-c", _SCRIPT, *arguments]
        done = subprocess.run(command, cwd=work, env=variables, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ProbeError(f"{source} does not load and answer on its own: {last_error(done.stderr)}")
        found: dict[str, Any] = json.loads(output.read_text())
    return Output(found["ids"], found["values"], found["dtype"], found["class"])


def compare(published: Output, local: Output, name: str) -> str:
    """One line that says how equal they are.

    Raises:
        ProbeError: Other ids, another number of values, or values further apart than `TOLERANCE`.
    """
    if published.digest == local.digest:
        return f"{name} computes the same: {_what(local)}, digest {local.digest}"
    if published.ids != local.ids or len(published.values) != len(local.values):
        raise ProbeError(f"{name} answers {published.ids}, the checkpoint here {local.ids}")
    largest = max(map(abs, local.values))
    apart = max(abs(a - b) for a, b in zip(published.values, local.values, strict=True)) / (largest or 1.0)
    allowed = TOLERANCE.get(local.dtype, TOLERANCE["bfloat16"])
    if not apart <= allowed:  # NaN too
        raise ProbeError(
            f"{name} computes something else: {apart:.2g} of the largest value apart, {allowed:g} allowed"
        )
    return f"{name} computes the same: {_what(local)}, {apart:.2g} of the largest value apart ({allowed:g} allowed)"


def _what(output: Output) -> str:
    return f"{len(output.ids)} greedy tokens, {len(output.values):,} {'logits' if output.ids else 'features'}"
