"""The fine-tuning page, followed to the letter by somebody with twenty images and a jsonl."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from sklearn.datasets import load_digits

from internvl_hub.app.cli import main

ROOT = Path(__file__).resolve().parents[2]


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def _digits(folder: Path) -> None:
    """Scans of scikit-learn, one row each, in the words of the page."""
    from PIL import Image

    data, rows = load_digits(), []
    (folder / "images").mkdir(parents=True)
    row = json.loads(_blocks("docs/training.md", "json")[0])
    for i in range(20):
        scan = Image.fromarray((255 - data.images[i] * 15.9).astype("uint8")).convert("RGB").resize((64, 64))
        scan.save(folder / "images" / f"{i}.png")
        answer = {"from": "gpt", "value": row["conversations"][1]["value"].replace("0", str(data.target[i]))}
        rows.append({**row, "image": f"{i}.png", "conversations": [row["conversations"][0], answer]})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.newest
def test_the_page_leads_to_a_tuned_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _digits(tmp_path / "my-data")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    commands = _blocks("docs/training.md", "console")[0].replace("\\\n", " ").splitlines()
    assert [shlex.split(command)[:2] for command in commands] == [
        ["internvl", name] for name in ("validate", "preview", "train")
    ]
    for command in commands:
        arguments = shlex.split(command)[1:]
        if arguments[0] == "train":
            arguments += [f"data.index_cache={tmp_path / 'cache'}", "training.report_to=none"]
        assert main(arguments) == 0, command
    assert "0 errors" in capsys.readouterr().out
    exec(compile(_blocks("docs/training.md", "python")[0], "docs/training.md", "exec"), {})  # noqa: S102
    assert capsys.readouterr().out.strip().splitlines()[-1] == "It is a 0."


def test_the_parts_work_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _digits(tmp_path / "my-data")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    block = _blocks("docs/training.md", "python")[1]
    exec(compile(block.replace("packing=True", "packing=True, max_steps=2"), "docs/training.md", "exec"), {})  # noqa: S102
    assert "max_steps" not in block and (tmp_path / "runs" / "mine" / "checkpoint-2").is_dir()
