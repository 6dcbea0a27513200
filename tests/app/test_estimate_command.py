"""`internvl estimate`: what is printed, and the exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from internvl_hub.app import estimate_command
from internvl_hub.app.estimate_command import estimate_main
from internvl_hub.training import memory_advice
from internvl_hub.training.estimate import GIB, OVERHEAD, estimate
from internvl_hub.training.memory_sources import resolve

FEW = ("--tokens", "256", "--tiles", "2")


@pytest.fixture(scope="module")
def tiny(root: Path) -> str:
    """A model of a few million parameters."""
    return str(root / "checkpoints" / "internvl-tiny")


def test_prints_a_table_that_adds_up(tiny: str, capsys: pytest.CaptureFixture) -> None:
    assert estimate_main([tiny, *FEW, "--memory", "8"]) == 0
    printed = capsys.readouterr().out
    assert "one device: 256 tokens, 2 tiles" in printed and "float32 weights, mixed precision bf16" in printed
    assert "weights, vision encoder" in printed and printed.rstrip().endswith("fits: 8 GiB a device")


def test_prints_json_in_bytes(tiny: str, capsys: pytest.CaptureFixture) -> None:
    changes = ["training.bf16=false", "training.per_device_train_batch_size=2", "training.gradient_checkpointing=no"]
    assert estimate_main([tiny, "--tokens", "256", *changes, "--tiles", "0", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["total"] == content["peak"] + GIB == sum(content["parts"].values()) + GIB
    expected = {"per_device_train_batch_size": 2, "gradient_checkpointing": False, "mixed_precision": None, "tiles": 0}
    assert expected.items() <= content["settings"].items()
    assert "verdict" not in content
    config, settings = resolve(tiny, changes, tokens=256, tiles=0)
    assert content["peak"] == estimate(config, settings).peak


@pytest.mark.newest
def test_says_what_would_help(tiny: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    config, settings = resolve(tiny, ["training.freeze_llm=true"], tokens=128, tiles=1)
    monkeypatch.setattr(memory_advice, "suggestions", lambda *_: [("less of everything", estimate(config, settings))])
    arguments = [tiny, *FEW, "--memory", "0.5", "--overhead", "2"]
    assert estimate_main(arguments) == 1
    printed = capsys.readouterr().out
    assert "does not fit: 0.5 GiB a device" in printed and "less of everything" in printed
    assert estimate_main([*arguments, "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert (content["verdict"], content["overhead"], content["memory"]) == ("does not fit", 2 * GIB, GIB // 2)
    assert [item["change"] for item in content["suggestions"]] == ["less of everything"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["InternVL9-8B"], "InternVL9-8B"),
        (["InternVL3-1B", "--memory", "0"], "--memory must be above 0 GiB, got 0"),
        (["InternVL3-1B", "--overhead", "-1"], "--overhead must not be negative, got -1"),
        (["InternVL3-1B", "--sharding", "zero4"], "sharding must be one of"),
        (["InternVL3-1B", "--tokens", "100"], "cannot hold the 3328 visual tokens of tiles=13"),
    ],
    ids=["name", "memory", "overhead", "sharding", "tokens"],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert estimate_main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("internvl estimate: ") and message in error and error.count("\n") == 1


def test_help_names_the_defaults_and_examples_that_parse(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        estimate_main(["--help"])
    printed = capsys.readouterr().out
    assert printed.startswith("usage: internvl estimate") and f"default: {OVERHEAD // GIB}, assumed" in printed
    examples = [line.split()[2:] for line in printed.splitlines() if line.startswith("  internvl estimate")]
    assert len(examples) == 4
    for example in examples:
        assert estimate_command._parser().parse_intermixed_args(example).source == example[0]


def test_help_does_not_wait_for_torch(root: Path) -> None:
    code = "import sys, internvl_hub.app.estimate_command as c; c._parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
