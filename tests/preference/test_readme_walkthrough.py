"""The README's way from questions to a model that learned from its own answers, command by command."""

import json
import re
import shlex
from pathlib import Path

import pytest

from internvl_hub.app.cli import main
from internvl_hub.examples.internvl_tiny.preference import write_questions

ROOT = Path(__file__).resolve().parents[2]

SECTION = re.compile(r"## Learn from preferences.*?```console\n(.*?)```", re.DOTALL)


@pytest.mark.newest
def test_the_commands_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    commands = [
        shlex.split(line)
        for line in SECTION.search((ROOT / "README.md").read_text(encoding="utf-8"))[1].splitlines()
        if line.strip()
    ]
    assert [command[:2] for command in commands] == [["internvl", name] for name in ("pairs", "train", "eval")]
    write_questions(tmp_path, 24)  # questions.jsonl and images
    rows = (tmp_path / "questions.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "test.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    monkeypatch.chdir(tmp_path)
    pairs, train, evaluate = (command[1:] for command in commands)
    assert main(pairs) == 0
    assert main([*train, "training.max_steps=1", "training.report_to=[]"]) == 0
    capsys.readouterr()
    assert main(evaluate) == 0
    printed = capsys.readouterr().out
    assert "4 questions scored" in printed
    assert json.loads((tmp_path / "pairs" / "meta.json").read_text(encoding="utf-8"))
    assert (tmp_path / "runs" / "mpo" / "preference_curves.png").is_file()
