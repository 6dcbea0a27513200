"""The installed package is the repository: every package is declared, a wheel holds every Hub file, names are free."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from internvl_hub import upload_to_hub
from internvl_hub.app import cli

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
# A root folder of one of these names would hide the library from a script that runs at the root.
LIBRARIES = {
    "accelerate", "datasets", "deepspeed", "diffusers", "evaluate", "gradio", "huggingface_hub", "matplotlib", "numpy",
    "peft", "safetensors", "sklearn", "tokenizers", "torch", "torchvision", "transformers", "trl", "vllm", "internvl",
}  # fmt: skip


def _own_folders() -> list[Path]:
    hidden = {"build", "dist", "runs"}
    return [
        path
        for path in ROOT.iterdir()
        if path.is_dir() and path.name[0] not in "._" and path.name not in hidden and path.suffix != ".egg-info"
    ]


def test_every_package_is_declared() -> None:
    """An undeclared one imports in an editable install and is missing from the wheel."""
    inits = [init.relative_to(ROOT) for top in _own_folders() for init in top.rglob("__init__.py")]
    own = [init for init in inits if init.parts[0] != "tests" and not any(part[0] == "." for part in init.parts)]
    names = {".".join(["internvl_hub", *init.parts[:-1]]) for init in own}
    # The recipes are data, but setuptools counts their folder as a package all the same.
    assert names | {"internvl_hub", "internvl_hub.recipes"} == set(PROJECT["tool"]["setuptools"]["packages"])


def test_root_is_no_regular_package() -> None:
    """With an `__init__.py`, tools would import the Hub files a second time, under the directory's name."""
    assert not (ROOT / "__init__.py").exists()


def test_root_names_hide_no_library() -> None:
    names = {path.name for path in _own_folders()} | {path.stem for path in ROOT.glob("*.py")}
    assert not names & (LIBRARIES | sys.stdlib_module_names)


def test_constraints_pin_every_core_and_dev_dependency() -> None:
    wanted = PROJECT["project"]["dependencies"] + PROJECT["project"]["optional-dependencies"]["dev"]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {re.split(r"[<>=!~\[ ]", name)[0] for name in wanted} <= set(pinned)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources: building in place would leave `build/` behind."""
    work = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "tests", "checkpoints", "build", "dist", "runs", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, work / "source", ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "-w", str(work), str(work / "source")], check=True, capture_output=True)
    (path,) = work.glob("*.whl")
    return path


def test_wheel_holds_the_code_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {f"internvl_hub/{path.name}" for path in ROOT.glob("*.py")}
    for package in PROJECT["tool"]["setuptools"]["packages"]:
        folder = Path(*package.split(".")[1:])
        expected |= {f"internvl_hub/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).glob("*.py")}
    settings = ("recipes/**/*.yaml", "recipes/*/*.json", "conversion/*.yaml", "examples/internvl_tiny/stages/*.yaml")
    for pattern in settings:
        expected |= {f"internvl_hub/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob(pattern)}
    assert names == expected


def test_wheel_imports_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import internvl_hub.upload_to_hub as u; print(u.__file__)"
    # -S: no site-packages, hence no editable install that would answer in its place.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == tmp_path / "internvl_hub" / "upload_to_hub.py"


def test_console_script_points_at_the_tool() -> None:
    scripts = {"internvl": "internvl_hub.app.cli:main", "internvl-upload": "internvl_hub.upload_to_hub:main"}
    assert PROJECT["project"]["scripts"] == scripts
    assert callable(upload_to_hub.main) and callable(cli.main)


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


def test_readme_commands_exist() -> None:
    """The code blocks of README.md name the two main targets, and no target or module that does not exist."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```(?:bash|sh|console|shell)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL))
    used = set(re.findall(r"\bmake ([a-z-]+)", code))
    assert {"demo", "test"} <= used <= _make_targets()
    for module in re.findall(r"python3? -m (internvl_hub[\w.]*)", code):
        assert _exists(module), f"README.md runs python -m {module}"


@pytest.mark.parametrize(
    "module",
    re.findall(r"\$\(RUN\) (internvl_hub[\w.]+)", (ROOT / "Makefile").read_text(encoding="utf-8")),
)
def test_makefile_modules_exist(module: str) -> None:
    assert _exists(module)


def _exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split(".")[1:])
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
