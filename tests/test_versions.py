"""The lowest versions are the same wherever they stand, and both environments differ in nothing else."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

PIN = re.compile(r"^([\w-]+)==(\S+)$", re.MULTILINE)
ROW = re.compile(r"^\| ([\w ]+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)
MAKE = """#!/usr/bin/env bash
case $FAILING in "$1"|both) echo "1 failed, 6 passed in 2s"; exit 2 ;; esac
echo "7 passed in 2s"
"""


def _pins(file: Path) -> dict[str, str]:
    return dict(PIN.findall(file.read_text(encoding="utf-8")))


def test_both_environments_pin_the_same_packages(root: Path) -> None:
    pinned, lowest = _pins(root / "constraints.txt"), _pins(root / "constraints-lowest.txt")
    assert pinned.keys() == lowest.keys()
    older = {name for name in pinned if pinned[name] != lowest[name]}
    assert older == {"accelerate", "huggingface_hub", "tokenizers", "transformers"}


def test_lowest_transformers_is_the_one_required(root: Path) -> None:
    pinned = _pins(root / "constraints-lowest.txt")["transformers"]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (required,) = (name for name in project["dependencies"] if name.startswith("transformers"))
    assert pinned.removesuffix(".0") == required.removeprefix("transformers>=")
    refusal = (root / "modeling_internvl_chat.py").read_text(encoding="utf-8")
    assert f'< Version("{pinned}")' in refusal and f"transformers >= {pinned}," in refusal


def test_readme_shows_what_is_pinned(root: Path) -> None:
    """Its table "Tested versions" agrees with both files and leaves out nothing in which they differ."""
    text = (root / "README.md").read_text(encoding="utf-8")
    rows = {name: (low, new) for name, low, new in ROW.findall(text.partition("\n## Tested versions\n")[2])}
    assert rows.pop("command") == ("`make test-lowest`", "`make test`")
    assert rows.pop("pinned in") == ("`constraints-lowest.txt`", "`constraints.txt`")
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert rows.pop("Python")[0] == project["requires-python"].removeprefix(">=")
    lowest, newest = _pins(root / "constraints-lowest.txt"), _pins(root / "constraints.txt")
    assert rows == {name: (lowest[name], newest[name]) for name in rows}
    differing = {name for name in newest if lowest[name] != newest[name]}
    assert rows.keys() >= {"torch", "transformers", "accelerate", "peft", "trl"} | differing


@pytest.mark.parametrize("failing", ["test", "test-lowest", "none", "both"])
def test_ci_runs_both_and_fails_if_either_does(failing: str, root: Path, tmp_path: Path) -> None:
    """With a `make` that runs nothing, beside a copy of the script."""
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(root / ".ci" / "run", tmp_path / ".ci")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(MAKE, encoding="utf-8")
    make.chmod(0o755)
    environment = {**os.environ, "PATH": f"{make.parent}:{os.environ['PATH']}", "FAILING": failing}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (failing == "none"), done.stderr
    results = ["1 failed, 6 passed" if failing in (name, "both") else "7 passed" for name in ("test-lowest", "test")]
    expected = [f"summary of test-lowest: {results[0]} in 2s", f"summary: {results[1]} in 2s"]
    assert done.stdout.splitlines()[-2:] == expected
