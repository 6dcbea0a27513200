"""Every Python block of the documentation runs, page by page, as a reader of the page would type it."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from documentation import BLOCK, BUILD, LOAD, PRINTS, RUNS, blocks_of, prepare_workplace, printed_by, prints_of
from PIL import Image

from internvl_hub.app import (
    data_commands,
    estimate_command,
    eval_command,
    gguf_command,
    page_command,
    pairs_command,
    quantize_command,
    serve_command,
    training_commands,
)
from internvl_hub.app.cli import build_parser
from internvl_hub.publishing import command as push_command
from internvl_hub.training.recipes import find_recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page.name for page in (ROOT / "docs").glob("*.md") if BLOCK.search(page.read_text(encoding="utf-8")))
# What a page has said in words before its first block, or what its reader brings.
BEFORE = {
    "mpo.md": BUILD
    + """
from internvl_hub.data.pairs import parse_pair
from internvl_hub.data.preference_dataset import PreferenceDataset
from internvl_hub.data.records import RecordFile
pairs = PreferenceDataset(
    RecordFile("pairs.jsonl", "images", parse=parse_pair), tokenizer, processor.image_processor, model.config
)
""",
    "evaluation.md": LOAD,
    # The graph is made, and run without the C++ compiler; tests/ecosystem has more on compiled decoding.
    "inference.md": """
import torch
compiled = torch.compile
torch.compile = lambda function, **options: compiled(function, **{**options, "backend": "eager"})
""",
    "preference_data.md": LOAD,
}


def _trained(folder: Path) -> None:
    """A folder as a training run leaves it."""
    shutil.copytree(folder / "build" / "internvl-tiny", folder / "runs" / "mine")
    pictures = folder / "my-data" / "images"
    shutil.copy(pictures / "number_4_wide.png", pictures / "0.png")


def _problems(folder: Path) -> None:
    """What `internvl validate` writes."""
    line = {"where": "train.jsonl:1", "severity": "error"}
    (folder / "problems.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")


def _report(folder: Path) -> None:
    """Two pictures as the pages of a PDF."""
    names = ("number_4_wide", "number_3_tall")
    first, second = (Image.open(folder / "examples" / "images" / f"{name}.png").convert("RGB") for name in names)
    first.save(folder / "report.pdf", save_all=True, append_images=[second], resolution=200)


PREPARE = {"training.md": _trained, "data.md": _problems, "guide_documents.md": _report}


@pytest.mark.newest
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page: str, tmp_path: Path) -> None:
    path = ROOT / "docs" / page
    prepare_workplace(ROOT, tmp_path)
    PREPARE.get(page, lambda folder: None)(tmp_path)
    printed = printed_by([BEFORE.get(page, ""), *blocks_of(path)], tmp_path)[1:]
    wanted = prints_of(path)
    assert len(printed) == len(wanted)
    for shown, expected in zip(printed, wanted, strict=True):
        assert expected is None or shown == expected


@pytest.mark.parametrize("page", PAGES)
def test_marks_stand_where_they_are_read(page: str) -> None:
    """A mark before anything else than its block would promise a check that nobody makes."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found = list(BLOCK.finditer(text))
    assert text.count(PRINTS) == sum(match["prints"] is not None and not match["elsewhere"] for match in found)
    assert text.count(RUNS) == sum(match["commands"] is not None for match in found)


def test_blocks_run_by_other_tests_are_named_there() -> None:
    marked = [
        (page, match["elsewhere"]) for page in PAGES for match in BLOCK.finditer((ROOT / "docs" / page).read_text())
    ]
    for page, tests in marked:
        assert tests is None or f'"{page}"' in (ROOT / tests).read_text(encoding="utf-8")
    assert any(tests for _, tests in marked)


CONSOLE = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
PARSERS = {
    "validate": data_commands._validate_parser,
    "preview": data_commands._preview_parser,
    "estimate": estimate_command._parser,
    "train": training_commands._parser,
    "eval": eval_command._parser,
    "pairs": pairs_command._parser,
    "page": page_command.build_parser,
    "quantize": quantize_command.build_parser,
    "gguf": gguf_command.build_parser,
    "serve": serve_command.build_parser,
    "push": push_command.build_parser,
}
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
COMMANDS = [
    f"{name}: {line}"
    for name, text in sorted(TEXTS.items())
    for block in CONSOLE.findall(text)
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("internvl ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str) -> None:
    """Those of the command line: their options exist, and so do the recipes that they name."""
    _, name, *arguments = shlex.split(command.split(": ", 1)[1], comments=True)
    if name not in PARSERS:
        build_parser().parse_args([name, *arguments])
        return
    options = PARSERS[name]().parse_intermixed_args(arguments)
    recipe = getattr(options, "recipe", None)
    if recipe is not None and not recipe.endswith(".yaml"):
        find_recipe(recipe)


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 25


def test_there_are_blocks() -> None:
    count = {page: len(blocks_of(ROOT / "docs" / page)) for page in PAGES}
    assert count["vision_encoders.md"] >= 5 and sum(count.values()) > 80
