"""What the pages of the documentation take for granted, so that their Python blocks can run; no tests here."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from versions import importable

from internvl_hub.upload_to_hub import gather

# A block that is run may be followed by what it prints, which then must be so; commands are run where they are marked.
PRINTS, RUNS = "<!-- prints -->", "<!-- runs -->"
BLOCK = re.compile(
    rf"(?:(?P<skip><!-- not run: [^\n]*-->\n)?^```python\n(?P<code>.*?)|{RUNS}\n```console\n(?P<commands>.*?))^```$"
    rf"(?:\n\n{PRINTS}\n```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_END = "\x1e"  # between what two blocks print
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
    """The Python blocks of a page that are to be run, and its commands as Python, in order."""
    return [match["code"] or _as_python(match["commands"]) for match in _to_run(page)]


def prints_of(page: Path) -> list[str | None]:
    """What each of `blocks_of` prints; None where the page does not say."""
    return [match["prints"] for match in _to_run(page)]


def _to_run(page: Path) -> list[re.Match[str]]:
    return [match for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if not match["skip"]]


def _as_python(commands: str) -> str:
    programs = {"internvl": [sys.executable, "-m", "internvl_hub.app.cli"], "python": [sys.executable]}
    lines = [shlex.split(line, comments=True) for line in commands.replace("\\\n", " ").splitlines()]
    calls = [f"subprocess.run({[*programs[line[0]], *line[1:]]}, check=True)" for line in lines if line]
    return "\n".join(["import subprocess", *calls])


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
    settings = {**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", **environment}
    done = subprocess.run([sys.executable, script], cwd=folder, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def printed_by(blocks: list[str], folder: Path) -> list[str]:
    """As `run_blocks`: what each block prints."""
    return run_blocks([f"{block}\nprint({_END!r}, end='')" for block in blocks], folder).split(_END)[:-1]
