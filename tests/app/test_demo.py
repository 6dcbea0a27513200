"""The demo: its command makes the picture, and its small parts do what they say."""

from pathlib import Path

import pytest
from PIL import Image

from internvl_hub.app import demo


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo run once: its folder and what it printed."""
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert demo.main(["--build", str(folder / "build")]) == 0
    return folder / "build", printed.getvalue()


def test_picture_shows_every_example(output: tuple[Path, str]) -> None:
    with Image.open(output[0] / "demo.png") as picture:
        assert min(picture.size) > 400
        colours = picture.convert("RGB").getcolors(maxcolors=2**24)
    names = {colour for _, colour in colours}
    assert (255, 0, 255) in names, "a magenta box is drawn"


def test_answers_about_unseen_images_are_mostly_right(output: tuple[Path, str]) -> None:
    marks = [line.rsplit("   ", 1)[1] for line in output[1].splitlines() if line.startswith("  A: ")]
    right = [mark.startswith("right") for mark in marks]
    assert len(marks) == sum(len(example.turns) for example in demo.read_examples(demo.EXAMPLES))
    assert all(right[:3]), "the three handwritten numbers"
    assert sum(right) >= 0.7 * len(right), output[1]


def test_gathered_folder_has_code_and_weights(output: tuple[Path, str]) -> None:
    names = {path.name for path in (output[0] / "internvl-tiny").iterdir()}
    assert {"model.safetensors", "modeling_internvl_chat.py", "processor_config.json", "config.json"} <= names


def test_own_image(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    image = demo.EXAMPLES / "number_4_wide.png"
    options = ["--build", str(tmp_path), "--image", str(image), "--question", "What number is written?"]
    assert demo.main(options) == 0
    assert f"A: {demo.read_examples(demo.EXAMPLES)[0].turns[0].expected}" in capsys.readouterr().out


def test_image_without_question_is_refused() -> None:
    with pytest.raises(SystemExit):
        demo.main(["--image", "x.png"])


@pytest.mark.parametrize(
    ("answer", "expected", "mark"),
    [
        ("7", "7", "right"),
        ("7", "8", "WRONG"),
        ("x", None, ""),
        ("<box>[[0, 0", "<box>[[0, 0, 9, 9]]</box>", "WRONG (IoU 0.00)"),
    ],
)
def test_mark(answer: str, expected: str | None, mark: str) -> None:
    assert demo.Turn("?", expected, answer).mark == mark
