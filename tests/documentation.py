"""What the pages of the documentation take for granted, so that their Python blocks can run; no tests here."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

from versions import importable

from internvl_hub.upload_to_hub import gather

# A block that is run may be followed by what it prints, which then must be so; commands are run where they are marked.
# One that needs what is not among the dependencies is run where that is installed; one that needs a server or files of
# a kind that the pages do not make is run by the tests that have them.
PRINTS, RUNS = "<!-- prints -->", "<!-- runs -->"
BLOCK = re.compile(
    rf"(?:(?:<!-- run by (?P<elsewhere>[\w/.]+) -->\n)?(?:<!-- needs (?P<needs>[\w.]+) -->\n)?"
    r"^```python\n(?P<code>.*?)"
    rf"|{RUNS}\n```console\n(?P<commands>.*?))^```$"
    rf"(?:\n\n{PRINTS}\n```text\n(?P<prints>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_END = "\x1e"  # between what two blocks print
_PRELOADED = ["internvl_hub.training.trainer", "internvl_hub.modeling_internvl_chat", "internvl_hub.app.cli"]
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


def block_run_by(tests: str, page: Path) -> str:
    """The one block of a page that is marked as run by this file of tests (relative to the root)."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    (code,) = [match["code"] for match in found if match["elsewhere"] == tests]
    return code


def _to_run(page: Path) -> list[re.Match[str]]:
    here = [match for match in BLOCK.finditer(page.read_text(encoding="utf-8")) if not match["elsewhere"]]
    return [match for match in here if match["needs"] is None or _installed(match["needs"])]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def _as_python(commands: str) -> str:
    """`internvl` is called in the process of the page; other programs are run."""
    code = []
    for line in commands.replace("\\\n", " ").splitlines():
        match shlex.split(line, comments=True):
            case ["internvl", *arguments]:
                code += ["from internvl_hub.app.cli import main", f"assert main({arguments}) == 0"]
            case ["python", *arguments]:
                code += ["import subprocess", f"subprocess.run({[sys.executable, *arguments]}, check=True)"]
            case [program, *_]:
                raise ValueError(f"{program} is no program that the tests run")
    return "\n".join(code)


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


def run_blocks(blocks: list[str], folder: Path) -> str:
    """Runs blocks one after the other in one process of their own; returns what they print.

    The process is forked from one that has imported the libraries, which most pages spend longer on than on anything
    they show.

    Raises:
        AssertionError: they fail; the message has the end of the traceback.
    """
    script = folder / "page.py"
    # Data loaders of examples start processes, which import the script again.
    script.write_text(importable("\n".join(blocks)), encoding="utf-8")
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_run_script, args=(script,))
    process.start()
    process.join()
    printed, errors = (_stream(script, name).read_text(encoding="utf-8") for name in ("out", "err"))
    assert process.exitcode == 0, errors[-3000:]
    return printed


def _stream(script: Path, name: str) -> Path:
    return script.with_name(f"{script.stem}.{name}")


def _run_script(script: Path) -> None:
    """What the process does: output goes to files, as commands among the blocks may write to it too."""
    os.environ |= {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    os.chdir(script.parent)
    multiprocessing.set_start_method(None, force=True)  # the platform's, as in a program of its own
    sys.argv = [str(script)]
    sys.path.insert(0, str(script.parent))
    for number, name in ((1, "out"), (2, "err")):
        with _stream(script, name).open("wb") as file:
            os.dup2(file.fileno(), number)
    sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", buffering=1, closefd=False) for number in (1, 2))
    runpy.run_path(str(script), run_name="__main__")
    sys.stdout.flush()


def printed_by(blocks: list[str], folder: Path) -> list[str]:
    """As `run_blocks`: what each block prints."""
    return run_blocks([f"{block}\nprint({_END!r}, end='')" for block in blocks], folder).split(_END)[:-1]
