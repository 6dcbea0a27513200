"""The lowest versions are the same wherever they stand, and both environments differ in nothing else."""

import re
import tomllib
from pathlib import Path

PIN = re.compile(r"^([\w-]+)==(\S+)$", re.MULTILINE)


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
    assert f"transformers {pinned}" in (root / "README.md").read_text(encoding="utf-8").replace("≥ ", "")
