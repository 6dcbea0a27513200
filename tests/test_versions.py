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
    assert older == {"accelerate", "huggingface_hub", "openai", "tokenizers", "transformers"}


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


@pytest.mark.parametrize("browser", [False, True])
@pytest.mark.parametrize("failing", ["test", "test-lowest", "test-page", "none", "both"])
def test_ci_runs_everything_and_fails_if_something_does(
    failing: str, browser: bool, root: Path, tmp_path: Path
) -> None:
    """With a `make` that runs nothing, beside a copy of the script; and a browser that there is or is not."""
    targets = ["test-lowest", "test-page", "test"] if browser else ["test-lowest", "test"]
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(root / ".ci" / "run", tmp_path / ".ci")
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(MAKE, encoding="utf-8")
    make.chmod(0o755)
    for name in ("bash", "dirname", "mktemp", "rm", "tee", "grep", "tail", "cat", "env"):
        (make.parent / name).symlink_to(str(shutil.which(name)))
    if browser:
        (make.parent / "chromium").symlink_to("/bin/true")
    environment = {**os.environ, "PATH": str(make.parent), "FAILING": failing}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (failing not in (*targets, "both")), done.stderr
    results = ["1 failed, 6 passed" if failing in (name, "both") else "7 passed" for name in targets]
    expected = [
        f"summary{'' if name == 'test' else f' of {name}'}: {result} in 2s"
        for name, result in zip(targets, results, strict=True)
    ]
    assert done.stdout.splitlines()[-len(targets) :] == expected
