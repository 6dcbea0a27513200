"""What the pages of the documentation take for granted, so that their Python blocks can run; no tests here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from versions import importable

from internvl_hub.upload_to_hub import gather

BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]*-->\n)?^```python\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL)
LOAD = """
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained("build/internvl-tiny", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("build/internvl-tiny", trust_remote_code=True)
tokenizer = processor.tokenizer
"""
BUILD = """
from internvl_hub.training.arguments import ModelArguments
from internvl_hub.training.building import build
built = build(ModelArguments(model_name_or_path="checkpoints/internvl-tiny"))
model, processor, tokenizer = built.model, built.processor, built.tokenizer
"""


def blocks_of(page: Path) -> list[str]:
    """The Python blocks of a page that are to be run."""
    return [match["code"] for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if not match["skip"]]


def prepare_workplace(root: Path, folder: Path) -> None:
    """The demo's folder, the example images, and rows about them: `data/`, and loose files as the pages name them."""
    gather(root / "checkpoints" / "internvl-tiny", folder / "build" / "internvl-tiny")
    (folder / "checkpoints").symlink_to(root / "checkpoints", target_is_directory=True)
    (folder / "examples").mkdir()
    pictures = root / "examples" / "images"
    for place in ("examples/images", "data/images", "my-data/images", "images"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(pictures, folder / place)
    questions = json.loads((pictures / "questions.json").read_text(encoding="utf-8"))
    asked = [(row["image"], *row["turns"][0]) for row in questions]
    rows = [
        {
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for image, question, answer in asked
    ]
    pairs = [
        {"image": image, "question": f"<image>\n{question}", "chosen": answer, "rejected": "No idea."}
        for image, question, answer in asked
    ]
    plain = [
        {"image": image, "question": f"<image>\n{question}", "answer": answer} for image, question, answer in asked
    ]
    for name, lines in (
        ("data/train.jsonl", rows),
        ("my-data/train.jsonl", rows),
        ("train.jsonl", rows),
        ("pairs.jsonl", pairs),
        ("docvqa_val.jsonl", plain),
        ("questions.jsonl", plain),
    ):
        (folder / name).write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")


def run_blocks(blocks: list[str], folder: Path, **environment: str) -> str:
    """Runs blocks one after the other in one clean interpreter; returns what they print.

    Raises:
        AssertionError: they fail; the message has the end of the traceback.
    """
    script = folder / "page.py"
    # Data loaders of examples start processes, which import the script again.
    script.write_text(importable("\n".join(blocks)), encoding="utf-8")
    settings = {**os.environ, "TQDM_DISABLE": "1", **environment}
    done = subprocess.run([sys.executable, script], cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
