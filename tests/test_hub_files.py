"""Hub files obey the loader of remote code (`transformers.dynamic_module_utils`); importing them does nothing else.

The rules are checked on the whole import closure, as the loader does for a repository on the Hub; for a local folder
it looks at the entry files only, so a file that breaks them would load here and fail there.
"""

import ast
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

from internvl_hub.upload_to_hub import AUTO_MAP, IMAGE_PROCESSOR, PROCESSOR, HubCodeError, hub_files, relative_imports

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = sorted({ROOT / f"{ref.split('.')[0]}.py" for ref in [*AUTO_MAP.values(), PROCESSOR, IMAGE_PROCESSOR]})
# Beyond torch and Pillow, only what transformers itself cannot do without.
ALLOWED = {"torch", "transformers", "PIL", "numpy", "huggingface_hub", "safetensors", "packaging"}


def _closure() -> list[Path]:
    # A missing file fails test_closure_is_complete, with a better message than a collection error.
    try:
        return hub_files(ENTRIES)
    except HubCodeError:
        return [entry for entry in ENTRIES if entry.is_file()]


CLOSURE = _closure()
each_file = pytest.mark.parametrize("path", CLOSURE, ids=lambda path: path.name)


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_closure_is_complete_and_flat() -> None:
    files = hub_files(ENTRIES)
    assert all(path.parent == ROOT for path in files)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda path: path.name)
def test_closure_is_what_the_loader_copies(entry: Path) -> None:
    assert {str(path) for path in hub_files([entry])} == {str(entry), *get_relative_import_files(entry)}


@each_file
def test_no_import_lines_in_text(path: Path) -> None:
    """The loader's regular expression takes such a line in a docstring for code and looks for the file."""
    assert sorted(get_relative_imports(path)) == sorted(set(relative_imports(path)))


@each_file
def test_absolute_imports_are_few(path: Path) -> None:
    """`get_imports` refuses the whole model if one is missing, even inside a function; `try` blocks are free."""
    assert set(get_imports(path)) <= ALLOWED | sys.stdlib_module_names


@each_file
def test_no_import_of_the_package_or_of_type_checking(path: Path) -> None:
    names = {node.id for node in ast.walk(_tree(path)) if isinstance(node, ast.Name)}
    modules = {alias.name for node in ast.walk(_tree(path)) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module or "" for node in ast.walk(_tree(path)) if isinstance(node, ast.ImportFrom)}
    assert "TYPE_CHECKING" not in names
    assert not {module for module in modules if module.split(".")[0] == "internvl_hub"}


@cache
def _config_classes() -> set[str]:
    nodes = [node for path in CLOSURE for node in ast.walk(_tree(path))]
    return {node.name for node in nodes if isinstance(node, ast.ClassDef) and node.name.endswith("Config")}


@each_file
def test_no_isinstance_on_own_config_classes(path: Path) -> None:
    """Each entry file gets its own copy of a configuration class, so such a check fails on remote code."""
    calls = [node for node in ast.walk(_tree(path)) if isinstance(node, ast.Call) and len(node.args) == 2]
    checks = [call for call in calls if getattr(call.func, "id", "") in {"isinstance", "issubclass"}]
    tested = {getattr(node, "id", getattr(node, "attr", "")) for call in checks for node in ast.walk(call.args[1])}
    assert not tested & _config_classes()


_IMPORT_ALL = """
import ast, contextlib, importlib, io, json, pathlib, sys, sysconfig
files = [pathlib.Path(name) for name in sys.argv[1:]]
for file in files:  # what libraries do when they are first imported is not the Hub files' doing
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and node.level == 0:
            with contextlib.suppress(ImportError):
                exec(ast.unparse(node), {})
libraries = tuple({sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), "__editable__"})
acts = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.mkdir", "os.remove", "os.rename"}
current, seen = None, []
def hook(event, args):
    if current is None:
        return
    if event == "open" and isinstance(args[0], str):
        if not args[0].startswith(libraries) and not args[0].endswith((".py", ".pyc")):
            seen.append([current, event, args[0]])
    elif event in acts:
        seen.append([current, event, repr(args)])
sys.addaudithook(hook)
text = io.StringIO()
for file in files:
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        current = file.stem
        importlib.import_module("internvl_hub." + current)
        current = None
print(json.dumps([seen, text.getvalue()]))
"""


def test_importing_has_no_effects(tmp_path: Path) -> None:
    """No output, no file beyond code, no connection, no process: what a user fears from remote code."""
    command = [sys.executable, "-B", "-c", _IMPORT_ALL, *map(str, CLOSURE)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    events, text = json.loads(done.stdout.splitlines()[-1])
    assert events == []
    assert text == ""


@pytest.mark.parametrize("line", ["from . import other", "from .sub.other import x", "from ..other import x"])
def test_imports_that_the_loader_cannot_follow_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "entry.py").write_text(f"def f():\n    {line}\n")
    with pytest.raises(HubCodeError, match="entry.py:2"):
        hub_files([tmp_path / "entry.py"])


def test_closure_follows_imports_through_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("from .b import x\n")
    (tmp_path / "b.py").write_text("try:\n    from .c import (\n        x,\n    )\nexcept ImportError:\n    pass\n")
    (tmp_path / "c.py").write_text("from .a import y\nimport os\n")  # a cycle ends
    (tmp_path / "unused.py").write_text("")
    assert [path.name for path in hub_files([tmp_path / "a.py"])] == ["a.py", "b.py", "c.py"]
    (tmp_path / "c.py").unlink()
    with pytest.raises(HubCodeError, match="c.py, which b.py names"):
        hub_files([tmp_path / "a.py"])


def test_upload_names_the_classes_that_the_configuration_names() -> None:
    """`upload_to_hub.py` runs without torch, so it repeats the table."""
    from internvl_hub import upload_to_hub
    from internvl_hub.configuration_internvl_chat import AUTO_MAP

    assert upload_to_hub.AUTO_MAP == AUTO_MAP
