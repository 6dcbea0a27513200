"""A folder that runs the demo page as a Space of the Hub: this package's code, `app.py`, requirements, front matter.

The folder needs no release of this package: its modules lie in it. Nothing is uploaded here.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub.utils import validate_repo_id

from ..conversion.folders import staged_folder
from ..upload_to_hub import gather

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("app", "conversion")  # what the page imports
GRADIO = "6.31.0"  # where none is installed; see constraints-page.txt
_TITLE = re.compile(r"[^\w .+-]")

_APP = '''"""Runs the page; the code is in the folder internvl_hub."""

from internvl_hub.app.page_command import page_main

raise SystemExit(page_main([{model!r}, "--host", "0.0.0.0", "--port", "7860"{examples}]))
'''

_README = """---
title: {title}
colorFrom: blue
colorTo: indigo
sdk: gradio
sdk_version: {gradio}
python_version: "3.11"
app_file: app.py
pinned: false
license: mit
{models}---

# {title}

Chat with an InternVL model about images and videos. The tiles that the model sees are shown, and boxes are drawn.

Visitors' uploads are kept in a temporary folder that goes with the process, and never logged.
"""


def export_space(model: str, folder: str | Path, examples: str | Path | None = None, overwrite: bool = False) -> Path:
    """Writes the folder of a Space.

    Args:
        model: A repository of the Hub, which the Space downloads when it starts; or the folder of a checkpoint, which
            is copied into the Space.
        folder: Where to write; must be absent or empty.
        examples: Folder of example pictures with `questions.json`, copied.
        overwrite: Replace what is there.

    Returns:
        The folder.

    Raises:
        ValueError: `model` is neither a folder nor a name that a repository can have.
        FileExistsError: something is there. CheckpointError: the checkpoint is incomplete.
    """
    local = Path(model).is_dir()
    if not local:
        validate_repo_id(model)
    name = Path(model).resolve().name if local else model.rsplit("/", 1)[-1]
    with staged_folder(folder, overwrite) as staged:
        _copy_code(staged / "internvl_hub")
        if local:
            gather(model, staged / "model")
        if examples is not None:
            _copy_examples(Path(examples), staged / "examples")
        options = ', "--examples", "examples"' if examples is not None else ""
        (staged / "app.py").write_text(_APP.format(model="model" if local else model, examples=options))
        (staged / "requirements.txt").write_text("".join(f"{line}\n" for line in requirements()))
        title = _TITLE.sub(" ", name)
        models = "" if local else f"models:\n  - {model}\n"
        text = _README.format(title=title, gradio=_gradio_version(), models=models)
        (staged / "README.md").write_text(text, encoding="utf-8")
        (staged / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
    return Path(folder)


def requirements() -> list[str]:
    """What the Space installs: this package's own dependencies and those of videos; the Space itself brings Gradio."""
    wanted = importlib.metadata.requires("internvl-hub") or []
    core = [line for line in wanted if ";" not in line]
    video = [line.split(";")[0].strip() for line in wanted if re.search(r";.*extra == ['\"]video['\"]", line)]
    # Gradio 6 refuses Pillow 13.
    return sorted("pillow<13" if line.lower() == "pillow" else line for line in (*core, *video))


def _copy_code(target: Path) -> None:
    target.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy2(path, target)
    skipped = shutil.ignore_patterns("__pycache__", "*.pyc")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, target / package, ignore=skipped)


def _copy_examples(source: Path, target: Path) -> None:
    questions = source / "questions.json"
    target.mkdir()
    shutil.copy2(questions, target)
    for name in _names(json.loads(questions.read_text(encoding="utf-8"))):
        shutil.copy2(source / name, target / name)


def _names(rows: Iterable[dict[str, str]]) -> list[str]:
    return sorted({Path(row["image"]).name for row in rows})


def _gradio_version() -> str:
    try:
        return importlib.metadata.version("gradio")
    except importlib.metadata.PackageNotFoundError:
        return GRADIO
