"""`internvl page`: its options, and the Space that it writes, which runs from its own folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from internvl_hub.app.cli import main
from internvl_hub.app.page_command import CHECKPOINT, EXAMPLES, build_parser, page_main
from internvl_hub.app.page_space import export_space, requirements


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_space(str(CHECKPOINT), tmp_path_factory.mktemp("space") / "tiny", EXAMPLES)


def front_matter(folder: Path) -> dict[str, object]:
    _, head, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head)


def test_space_has_what_it_needs(space: Path) -> None:
    names = {path.name for path in space.iterdir()}
    assert {"app.py", "requirements.txt", "README.md", "internvl_hub", "model", "examples", ".gitattributes"} <= names
    head = front_matter(space)
    assert head["sdk"] == "gradio" and head["app_file"] == "app.py" and "models" not in head
    assert (space / "examples" / "shapes.png").is_file() and (space / "model" / "model.safetensors").is_file()
    assert not list(space.rglob("__pycache__"))


@pytest.mark.newest
def test_code_of_the_space_runs_from_its_folder(space: Path, tmp_path: Path) -> None:
    """All modules but the one that needs Gradio are imported, from the Space, and the model answers."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from internvl_hub.app import page_command, page_media, page_messages, page_visitors, page_limits\n"
        "assert page_command.__file__.startswith(sys.argv[1]), page_command.__file__\n"
        "host = page_command._load('model', page_command.build_parser().parse_args([]))\n"
        "upload = page_media.read_upload('number_4_wide.png', 'examples', page_media.MediaLimits())\n"
        "talk = page_visitors.Conversations(host).get('x')\n"
        "*_, last = talk.ask('What is the number?', [upload], page_limits.Settings(max_tiles=6))\n"
        "outside = [m.__file__ for n, m in sys.modules.items() if n.startswith('internvl_hub.')\n"
        "           and not (m.__file__ or sys.argv[1]).startswith(sys.argv[1])]\n"
        "print(last.answer, outside)\n"
    )
    command = [sys.executable, "-c", code, str(space.resolve())]
    done = subprocess.run(command, cwd=space.resolve(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "5433 []"


def test_space_of_a_repository_names_it(tmp_path: Path) -> None:
    folder = export_space("some-name/some-model", tmp_path / "space")
    assert front_matter(folder)["models"] == ["some-name/some-model"]
    text = (folder / "app.py").read_text(encoding="utf-8")
    assert '[\'some-name/some-model\', "--host", "0.0.0.0", "--port", "7860"]' in text
    compile(text, "app.py", "exec")
    assert not (folder / "model").exists() and not (folder / "examples").exists()


@pytest.mark.parametrize("name", ["x/'); import os #", "a/b\nevil: true", "no/such/folder"])
def test_a_name_cannot_write_code(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError):
        export_space(name, tmp_path / "space")
    assert not (tmp_path / "space").exists()


def test_requirements_are_those_of_the_package() -> None:
    lines = requirements()
    names = {line.split(">")[0].split("<")[0] for line in lines}
    assert {"torch", "transformers", "pillow", "av"} <= names and "gradio" not in names and "pytest" not in names
    assert "pillow<13" in lines


def test_export_keeps_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").touch()
    assert page_main(["a/b", "--export", str(tmp_path / "mine")]) == 1
    assert "not empty" in capsys.readouterr().err and (tmp_path / "mine" / "x").exists()


def test_the_page_is_for_this_machine_unless_asked() -> None:
    options = build_parser().parse_args([])
    assert options.host == "127.0.0.1" and not options.share


def test_a_login_must_be_complete(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("LOGIN", "only-a-name")
    assert main(["page", "--auth-env", "LOGIN"]) == 1
    assert "LOGIN must read user:password" in capsys.readouterr().err
