"""What a training run left in its output folder, as text for a model card.

Read are `recipe.yaml`, `report.md` and `trainer_state.json`, which `internvl train` writes. Settings that only matter
on the machine of the run (folders, caches, workers, logging) are left out, and of every path only the last part stays:
a card must not tell how somebody's disk is laid out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BASES = ("model_name_or_path", "vision_path", "llm_path", "mlp_path")
_SECTIONS = ("Data", "Parameters", "Evaluation", "Preferences")
_LOCAL = re.compile(
    r"output_dir|index_cache|use_cpu|report_to|.*(path|folder|cache|workers|backend|log|save|eval_st).*"
)
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"(?:[A-Za-z]:[\\/]|\.{0,2}/|~/|file://)[^\s|,'\"]*[\\/]([^\s|,'\"\\/]+)")


@dataclass(frozen=True)
class Run:
    """Facts of a run.

    Attributes:
        summary: Sentences.
        tables: (title, Markdown table).
        bases: Hub names of the models that it began with; local folders are no names.
        curve: Whether `loss_curve.png` is there.
    """

    summary: str
    tables: list[tuple[str, str]]
    bases: list[str]
    curve: bool


def read_run(folder: Path) -> Run | None:
    """The facts of a run; None for a folder that no run wrote.

    Raises:
        ValueError: `recipe.yaml` or `trainer_state.json` is broken.
    """
    recipe, state = _recipe(folder / "recipe.yaml"), _json(folder / "trainer_state.json")
    if not recipe:
        return None
    tables = [("Settings", _table(("setting", "value"), _settings(recipe)))]
    path = folder / "report.md"
    report = path.read_text(encoding="utf-8") if path.is_file() else ""
    tables = [*_report_tables(report), *tables]
    return Run(_summary(recipe, state, report), tables, _bases(recipe), (folder / "loss_curve.png").is_file())


def _recipe(path: Path) -> dict[str, dict[str, Any]]:
    import yaml

    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no recipe: it holds a {type(content).__name__}")
    return {key: value if isinstance(value, dict) else {"": value} for key, value in content.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _bases(recipe: dict[str, dict[str, Any]]) -> list[str]:
    values = (recipe.get("model", {}).get(key) for key in _BASES)
    names = (value for value in values if isinstance(value, str) and _REPOSITORY.fullmatch(value))
    return list(dict.fromkeys(name for name in names if not Path(name).exists()))


def _settings(recipe: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for section, values in recipe.items():
        for key, value in values.items():
            if not _LOCAL.fullmatch(key):
                yield clean(f"{section}.{key}".rstrip(".")), clean(value)


def _summary(recipe: dict[str, dict[str, Any]], state: dict[str, Any], report: str) -> str:
    began = _bases(recipe)
    parts = [f"Began with {', '.join(f'`{name}`' for name in began)}."] if began else []
    parts += ["Trained on pairs of answers (MPO)."] if "preference" in recipe else []
    if "global_step" in state:
        epochs = f", {state['epoch']:.3g} epochs" if isinstance(state.get("epoch"), (int, float)) else ""
        losses = [entry["loss"] for entry in state.get("log_history", []) if "loss" in entry]
        last = f"; the last logged loss is {losses[-1]:.4g}" if losses else ""
        parts.append(f"{state['global_step']:,} steps{epochs}{last}.")
    if versions := re.search(r"^Python .*$", report, re.MULTILINE):
        parts.append(f"Made with {clean(versions[0])}.")
    return " ".join(parts)


def _report_tables(report: str) -> list[tuple[str, str]]:
    """The tables of a report's sections."""
    found = []
    for title, body in re.findall(r"^## (.+)\n((?:(?!^## ).*\n?)*)", report, re.MULTILINE):
        rows = [line for line in body.splitlines() if line.startswith("|")]
        if title in _SECTIONS and rows:
            found.append((title, "\n".join(clean(row, cell=False) for row in rows)))
    return found


def _table(head: tuple[str, str], rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"| {first} | {second} |" for first, second in (head, ("---", "---"), *rows))


def clean(value: Any, cell: bool = True) -> str:
    """A value as one line without paths, HTML or, in a cell, the end of the cell."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    text = _PATH.sub(r"\1", " ".join(text.split())).replace("<", "&lt;")
    return text.replace("|", "\\|").replace("[", "\\[") if cell else text
