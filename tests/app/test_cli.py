"""The command line: every command does its work, has help with an example, and says in one line what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny import CHAT, LLAMA, QWEN2, assert_same

from internvl_hub.app.cli import build_parser, main
from internvl_hub.modeling_intern_vit import InternVisionModel

COMMANDS = ("describe", "doctor", "upgrade", "convert", "merge", "vision", "upload", "demo", "train", "pairs", "eval")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A fixture checkpoint as it was released."""
    return Path(shutil.copytree(CHAT / QWEN2, tmp_path / "old", ignore=shutil.ignore_patterns("expected*")))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"usage: {'python -m' if command == 'demo' else 'internvl'}" in text
    assert command == "demo" or "example" in text


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = build_parser().format_help()
    assert all(f"\n    {command} " in text for command in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main([])


def test_describe(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe"]) == 0
    everything = capsys.readouterr().out
    assert "InternVL3_5-241B-A28B" in everything and "InternViT-300M-448px" in everything
    assert main(["describe", "OpenGVLab/InternVL2_5-8B"]) == 0
    one = capsys.readouterr().out
    assert "InternLM2ForCausalLM" in one and "internvl2_5" in one and "92546" in one
    assert main(["describe", str(source)]) == 0
    assert "Qwen2ForCausalLM" in capsys.readouterr().out
    assert main(["describe", "InternVL9-1B"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("internvl describe: ") and error.count("\n") == 1


def test_upgrade_then_convert_and_back(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new, native, back = (str(tmp_path / name) for name in ("new", "native", "back"))
    assert main(["upgrade", str(source), new]) == 0
    assert "weights linked" in capsys.readouterr().out
    assert main(["convert", new, native, "--to", "native", "--max-shard-size", "50KB"]) == 0
    assert len(list(Path(native).glob("*.safetensors"))) > 1
    assert main(["convert", native, back, "--to", "original"]) == 0
    assert_same(load_file(f"{back}/model.safetensors"), load_file(source / "model.safetensors"))
    capsys.readouterr()
    assert main(["upgrade", str(source), new]) == 1
    assert "internvl upgrade: " in capsys.readouterr().err
    assert main(["upgrade", str(source), new, "--overwrite"]) == 0


def test_what_cannot_be_done_is_one_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("convert", str(CHAT / LLAMA), str(tmp_path / "native"), "--to", "native"): "pixel shuffle is v2",
        ("merge", str(source), str(tmp_path / "merged")): "has no adapter",
        ("upgrade", str(tmp_path / "absent"), str(tmp_path / "new")): "no folder here",
    }
    for arguments, message in cases.items():
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert error[-1].startswith(f"internvl {arguments[0]}: ") and message in error[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


_UNREADABLE = {
    "a part that is a text": {"llm_config": "x"},
    "an encoder that is a text": {"vision_config": "x"},
    "an encoder without heads": {"vision_config": {"num_attention_heads": 0}},
    "an unknown dtype": {"dtype": "float33"},
    "an unknown rotary type": {"llm_config": {"rope_scaling": {"type": "no_such", "factor": 2.0}}},
    "quantization that is a text": {"quantization_config": "awq"},
    "a ratio of nothing": {"downsample_ratio": 0},
    "a layer that is a text": {"select_layer": "x"},
}


@pytest.mark.parametrize("name", [*_UNREADABLE, "nested without end"])
def test_a_configuration_from_anywhere_is_never_a_traceback(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source / "config.json"
    values = json.loads(path.read_text())
    for field, value in _UNREADABLE.get(name, {}).items():
        values[field] = {**values[field], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(values) if name in _UNREADABLE else "[" * 100_000)
    commands = [["describe", str(source)], ["upgrade", str(source), str(tmp_path / "new")],
                ["convert", str(source), str(tmp_path / "native"), "--to", "native"]]  # fmt: skip
    for arguments in commands:
        assert main(arguments) == 1
        error = capsys.readouterr().err.strip().splitlines()
        assert len([line for line in error if line.startswith(f"internvl {arguments[0]}: ")]) == 1
        assert error[-1].startswith(f"internvl {arguments[0]}: ")
    assert main(["doctor", str(source)]) in (1, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]


def test_doctor(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = source / "model.safetensors"
    assert main(["upgrade", str(source), str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert main(["doctor", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["doctor", str(source)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_vision(tmp_path: Path) -> None:
    folder = str(CHAT / LLAMA)
    assert main(["vision", "extract", folder, str(tmp_path / "vit")]) == 0
    layers = InternVisionModel.from_pretrained(tmp_path / "vit").config.num_hidden_layers
    assert main(["vision", "cut", str(tmp_path / "vit"), str(tmp_path / "cut"), "--layers", str(layers - 1)]) == 0
    assert main(["vision", "resize", str(tmp_path / "cut"), str(tmp_path / "large"), "--image-size", "112"]) == 0
    config = InternVisionModel.from_pretrained(tmp_path / "large").config
    assert (config.num_hidden_layers, config.image_size) == (layers - 1, 112)
    assert main(["vision", "cut", str(tmp_path / "vit"), str(tmp_path / "none"), "--layers", "99"]) == 1


def test_upload_is_delegated(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["upgrade", str(source), str(tmp_path / "new")]) == 0
    assert main(["upload", str(tmp_path / "new"), "--folder", str(tmp_path / "gathered")]) == 0
    assert (tmp_path / "gathered" / "modeling_internvl_chat.py").is_file()
