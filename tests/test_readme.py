"""The README's Python blocks run, in order, in one interpreter, as a reader would type them."""

import json
from pathlib import Path

from documentation import blocks_of, prepare_workplace, run_blocks


def test_readme_blocks_run(root: Path, tmp_path: Path) -> None:
    blocks = blocks_of(root / "README.md")
    assert len(blocks) >= 6
    prepare_workplace(root, tmp_path)
    printed = run_blocks(blocks, tmp_path)
    expected = json.loads((root / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))[0]["turns"][0]
    assert printed.splitlines()[0] == expected[1], "the number in the first example image"
    assert "<box>" in printed
    assert (tmp_path / "runs" / "mine").is_dir()
