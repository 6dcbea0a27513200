"""The README's Python blocks run, in order, in one interpreter, as a reader would type them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from internvl_hub.upload_to_hub import gather

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def _workplace(root: Path, folder: Path) -> None:
    """What the README takes for granted: the demo's folder, the example images, a file of training rows."""
    gather(root / "checkpoints" / "internvl-tiny", folder / "build" / "internvl-tiny")
    (folder / "examples").mkdir()
    (folder / "examples" / "images").symlink_to(root / "examples" / "images", target_is_directory=True)
    (folder / "data").mkdir()
    (folder / "data" / "images").symlink_to(root / "examples" / "images", target_is_directory=True)
    rows = [
        {
            "image": row["image"],
            "conversations": [
                {"from": "human", "value": f"<image>\n{row['turns'][0][0]}"},
                {"from": "gpt", "value": row["turns"][0][1]},
            ],
        }
        for row in json.loads((root / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))
    ]
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def test_readme_blocks_run(root: Path, tmp_path: Path) -> None:
    blocks = BLOCK.findall((root / "README.md").read_text(encoding="utf-8"))
    assert len(blocks) >= 6
    _workplace(root, tmp_path)
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first_answer, *_, piped = done.stdout.strip().splitlines()
    expected = json.loads((root / "examples" / "images" / "questions.json").read_text(encoding="utf-8"))[0]["turns"][0]
    assert first_answer == expected[1], "the number in the first example image"
    assert "<box>" in done.stdout
    assert (tmp_path / "runs" / "mine").is_dir()


def test_conversion_page_blocks_run(root: Path, tmp_path: Path) -> None:
    (block,) = BLOCK.findall((root / "docs" / "conversion.md").read_text(encoding="utf-8"))
    (tmp_path / "checkpoints").symlink_to(root / "checkpoints", target_is_directory=True)
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "original layout" in done.stdout and (tmp_path / "build" / "native" / "model.safetensors").is_file()
