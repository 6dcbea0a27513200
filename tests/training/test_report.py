"""The report of a run and its picture, against the log that they were made from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from internvl_hub.examples.internvl_tiny import report as tiny_report
from internvl_hub.training.report import points, table, write_curve, write_report

HISTORY = [
    {"loss": 4.0, "learning_rate": 0.1, "step": 1},
    {"eval_val_loss": 3.5, "eval_val_runtime": 2.0, "eval_val_samples_per_second": 7.0, "step": 2},
    {"eval_test_loss": 3.75, "eval_test_runtime": 2.0, "eval_test_steps_per_second": 1.0, "step": 2},
    {"loss": 0.5, "learning_rate": 0.01, "step": 3},
    {"eval_val_loss": 1.25, "eval_val_runtime": 2.0, "eval_model_preparation_time": 0.01, "step": 4},
    {"train_runtime": 90.0, "train_loss": 2.25, "step": 4},
]


def make_trainer(history: list[dict[str, Any]], packing: bool = False, slots: int = 2000) -> SimpleNamespace:
    """What a report reads of a trainer."""
    totals = {"num_samples": 40, "num_tokens": 1500, "num_slots": slots, "num_tiles": 1234}
    return SimpleNamespace(
        state=SimpleNamespace(log_history=history, global_step=4, epoch=1.23456),
        accounts=SimpleNamespace(totals=totals, entries={"a|b": 30, "c": 12}, unusable=lambda: {"a|b": 2, "c": 0}),
        args=SimpleNamespace(world_size=2, gradient_accumulation_steps=3, packing=packing),
    )


def read_tables(text: str) -> dict[str, list[list[str]]]:
    """Cells of the Markdown tables by the headline above them, rules left out."""
    found: dict[str, list[list[str]]] = {}
    headline = ""
    for line in text.splitlines():
        if line.startswith("#"):
            headline = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith("|---"):
            cells = line.replace("\\|", "\0").strip("|").split("|")
            found.setdefault(headline, []).append([cell.strip().replace("\0", "|") for cell in cells])
    return found


def write(tmp_path: Path, trainer: SimpleNamespace, **changes: Any) -> str:
    arguments = {"settings": "model: x\n", "trainable": [("mlp1", 5, 10_000)], **changes}
    path = write_report(tmp_path / "run", trainer, **arguments)
    assert path == tmp_path / "run" / "report.md"
    return path.read_text(encoding="utf-8")


def colours(path: Path) -> np.ndarray:
    """Distinct colours of a picture, (n, 3)."""
    with Image.open(path) as image:
        return np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)


def test_points_are_those_of_the_log() -> None:
    assert points(HISTORY, "loss") == [(1, 4.0), (3, 0.5)]
    assert points(HISTORY, "eval_val_loss") == [(2, 3.5), (4, 1.25)]
    assert points(HISTORY, "nothing") == []


def test_table_escapes_and_groups() -> None:
    lines = table(["a", "b"], [("x|y", 1234567), (True, 0.123456)]).splitlines()
    assert lines == ["| a | b |", "|---|---:|", "| x\\|y | 1,234,567 |", "| True | 0.1235 |"]


def test_report_says_what_was_logged(tmp_path: Path) -> None:
    text = write(tmp_path, make_trainer(HISTORY), title="My run")
    assert text.startswith("# My run\n") and "```yaml\nmodel: x\n```" in text
    tables = read_tables(text)
    results = dict(tables["My run"][1:])
    assert results == {
        "steps": "4", "epochs": "1.235", "processes": "2", "micro-batches per step": "6", "samples": "40",
        "tokens": "1,500", "tiles": "1,234", "share of tokens that are not padding": "0.75",
        "minutes, this part of the run": "1.5", "first logged loss": "4", "last logged loss": "0.5",
    }  # fmt: skip
    assert tables["Data"] == [["data set", "entries of an epoch", "left out"], ["a|b", "30", "2"], ["c", "12", "0"]]
    assert tables["Parameters"] == [["module", "trained", "all"], ["mlp1", "5", "10,000"]]


def test_evaluations_of_one_step_are_one_row(tmp_path: Path) -> None:
    tables = read_tables(write(tmp_path, make_trainer(HISTORY)))
    assert tables["Evaluation"] == [["step", "val_loss", "test_loss"], ["2", "3.5", "3.75"], ["4", "1.25", ""]]


def test_report_without_evaluation_or_counts(tmp_path: Path) -> None:
    tables = read_tables(write(tmp_path, make_trainer([{"loss": 1.0, "step": 1}], slots=0)))
    assert "Evaluation" not in tables and "share of tokens that are not padding" not in dict(tables["Training run"])


def test_packs_have_an_efficiency(tmp_path: Path) -> None:
    tables = read_tables(write(tmp_path, make_trainer(HISTORY, packing=True)))
    assert dict(tables["Training run"])["packing efficiency"] == "0.75"


def test_curve_is_drawn_where_the_report_shows_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = write(tmp_path, make_trainer(HISTORY))
    assert "![Loss](loss_curve.png)" in text
    drawn = colours(tmp_path / "run" / "loss_curve.png")
    assert [255, 255, 255] in drawn.tolist() and (np.ptp(drawn, axis=1) > 100).any()  # paper, and coloured lines


def test_counts_are_in_the_table_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a hundred answers, losses and shares would be a flat line."""
    drawn: dict[str, str] = {}
    monkeypatch.setattr(
        "internvl_hub.training.report.write_curve", lambda path, history, metrics: drawn.update(metrics)
    )
    history = [{"step": 2, "eval_loss": 0.5, "eval_exact_match": 0.7, "eval_generated": 100.0, "eval_skipped": 3}]
    text = write(tmp_path, make_trainer(history))
    assert drawn == {"eval_loss": "loss", "eval_exact_match": "exact_match"}
    assert read_tables(text)["Evaluation"][0] == ["step", "loss", "exact_match", "generated", "skipped"]


def test_report_does_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = write(tmp_path, make_trainer(HISTORY))
    assert "loss_curve.png" not in text and not (tmp_path / "run" / "loss_curve.png").exists()
    with pytest.raises(ImportError, match=r"internvl-hub\[plot\]"):
        write_curve(tmp_path / "curve.png", HISTORY, {})


def test_curve_shows_every_metric_that_has_values(tmp_path: Path, drawn_figures: list[Any]) -> None:
    history = [*HISTORY, {"held_out_color": 0.25, "step": 2}, {"held_out_color": 1.0, "step": 4}]
    tiny_report.write_curve(tmp_path / "curve.png", history)
    left, right = drawn_figures[0].axes
    assert left.lines[0].get_xydata().tolist() == [[1, 4.0], [3, 0.5]] and left.get_yscale() == "log"
    assert {line.get_label(): line.get_xydata().tolist() for line in right.lines} == {"colour": [[2, 0.25], [4, 1.0]]}
    assert right.get_ylim() == (0, 1.02) and right.get_title() == "Held-out (val) accuracy"
    write_curve(tmp_path / "zero.png", [{"loss": 0.0, "step": 1}, {"loss": 1.0, "step": 2}], {"absent": "absent"})
    assert len(drawn_figures[1].axes) == 1 and drawn_figures[1].axes[0].get_yscale() == "linear"
