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
    r"|token|.*(hub|hf|access|auth)_token|.*(api_?key|password|secret).*",
    re.IGNORECASE,
)
_ON_DISK = re.compile(r"^# Weights on disk, no Hub names: (.+)$", re.MULTILINE)  # of `training.recipes.dump_recipe`
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# How paths begin that need no folder to start from: of a drive, a share, a home folder or variable, or of the root.
_BEGINNING = r"(?:file:/+|[A-Za-z]:[\\/]|\\\\|\.{1,2}[\\/]|~[\w.-]*[\\/]|[$%]\{?\w+[}%]?[\\/]|(?<!:)/+|/(?!/))"
# One inside a text, up to its last separator. Behind a word or another separator it would be a part of an address.
_PATH = re.compile(rf"(?<![\w.~$%}}/\\<-]){_BEGINNING}(?:[^\s|,'\"<>]*[\\/])?(?=[^\s|,'\"<>\\/])")
_WHOLE_PATH = re.compile(rf"{_BEGINNING}[^\n]*|(?!\w+://)(?:[^\s\\/]+[\\/]){{2,}}[^\s\\/]+[\\/]?")


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
    recipe, state = _recipe(folder / "recipe.yaml"), _state(folder / "trainer_state.json")
    if not recipe:
        return None
    try:
        tables = [("Settings", _table(("setting", "value"), _settings(recipe)))]
    except RecursionError as error:
        raise ValueError(f"{folder / 'recipe.yaml'} is no recipe: it holds itself") from error
    path = folder / "report.md"
    report = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    tables, bases = [*_report_tables(report), *tables], _bases(recipe, folder)
    summary = _summary(recipe, bases, state, report)
    return Run(summary, tables, bases, (folder / "loss_curve.png").is_file())


def _recipe(path: Path) -> dict[str, dict[str, Any]]:
    import yaml

    if not path.is_file():
        return {}
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no recipe: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no recipe: it holds a {type(content).__name__}")
    return {str(key): value if isinstance(value, dict) else {"": value} for key, value in content.items()}


def _state(path: Path) -> dict[str, Any]:
    """Content of a `trainer_state.json`, checked as far as a card needs it."""
    try:
        state = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not the state of a trainer")
    if not isinstance(state.get("global_step", 0), int):
        raise ValueError(f"{path}: global_step must be a number of steps, got {state['global_step']!r}")
    history = state.get("log_history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError(f"{path}: log_history must be a list of what was logged")
    return state


def _bases(recipe: dict[str, dict[str, Any]], run: Path) -> list[str]:
    on_disk = _ON_DISK.search((run / "recipe.yaml").read_text(encoding="utf-8"))
    local = on_disk[1].split(", ") if on_disk else []
    values = (recipe.get("model", {}).get(key) for key in _BASES if key not in local)
    names = (value for value in values if isinstance(value, str) and _REPOSITORY.fullmatch(value))
    # `runs/stage1` could be a Hub name too. A recipe without the comment is older: it is mostly published from where
    # the run began, and the run's own folder is below that.
    places = [Path(), run.resolve(), *run.resolve().parents]
    return list(dict.fromkeys(name for name in names if not any((place / name).exists() for place in places)))


def _settings(recipe: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for section, values in recipe.items():
        for key, value in values.items():
            if not _LOCAL.fullmatch(str(key)):
                yield clean(f"{section}.{key}".rstrip(".")), clean(value)


def _summary(recipe: dict[str, dict[str, Any]], began: list[str], state: dict[str, Any], report: str) -> str:
    parts = [f"Began with {', '.join(f'`{name}`' for name in began)}."] if began else []
    parts += ["Trained on pairs of answers (MPO)."] if "preference" in recipe else []
    if "global_step" in state:
        epochs = f", {state['epoch']:.3g} epochs" if isinstance(state.get("epoch"), (int, float)) else ""
        logged = (entry.get("loss") for entry in state.get("log_history", []))
        losses = [loss for loss in logged if isinstance(loss, (int, float))]
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
            found.append((title, "\n".join(map(_clean_row, rows))))
    return found


def _clean_row(row: str) -> str:
    """A row of a table, each cell on its own: only a whole cell can be known as a path with spaces."""
    cells = ((cell, clean(cell, cell=False)) for cell in re.split(r"(?<!\\)\|", row))
    return "|".join(cell if cell.strip() == cleaned else f" {cleaned} " for cell, cleaned in cells)


def _table(head: tuple[str, str], rows: Iterator[tuple[str, str]]) -> str:
    return "\n".join(f"| {first} | {second} |" for first, second in (head, ("---", "---"), *rows))


def clean(value: Any, cell: bool = True) -> str:
    """A value as one line without folders, HTML or, in a cell, the end of the cell.

    Of a path the last part stays. Addresses (`https://`) and names of two parts (`user/name`) are no paths.
    """
    text = _without_folders(value).replace("<", "&lt;")
    return text.replace("|", "\\|").replace("[", "\\[") if cell else text


def _without_folders(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_without_folders, value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_without_folders(each)}' for key, each in value.items())}}}"
    text = " ".join(str(value).split())
    if _WHOLE_PATH.fullmatch(text):
        return re.split(r"[\\/]", text.rstrip("\\/"))[-1]
    return _PATH.sub("", text)
