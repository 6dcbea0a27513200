"""What a run leaves for readers: the loss curve and a report in Markdown, from recorded numbers only."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .preference_report import is_preference_measure, preference_rows, write_preference_curves

History = Sequence[Mapping[str, Any]]

_PACKAGES = ("internvl-hub", "torch", "transformers", "accelerate", "peft")
# What `Trainer` logs of an evaluation beside its measures: how long it took.
_TIMINGS = ("_runtime", "_per_second", "_preparation_time")
_COUNTS = ("_generated", "_skipped")  # beside which losses and shares would be a flat line


def points(history: History, key: str) -> list[tuple[float, float]]:
    """(step, value) of every entry of a `Trainer`'s log that has `key`."""
    return [(entry["step"], entry[key]) for entry in history if key in entry]


def write_curve(
    path: Path,
    history: History,
    metrics: Mapping[str, str],
    title: str = "Evaluation",
    limits: tuple[float, float] | None = None,
) -> None:
    """Training loss and metrics over the steps, as a picture.

    Args:
        path: Of the picture.
        history: `trainer.state.log_history`.
        metrics: Keys of the history to their names in the right panel; those without a value are left out, and the
            panel with them if there are none.
        title: Of the right panel.
        limits: Of its y axis.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the curve needs matplotlib: pip install 'internvl-hub[plot]'") from error
    shown = {name: points(history, key) for key, name in metrics.items() if points(history, key)}
    figure = Figure(figsize=(9 if shown else 5, 4), layout="constrained")
    left, *rest = figure.subplots(1, 2 if shown else 1, squeeze=False)[0]
    losses = points(history, "loss")
    left.plot([step for step, _ in losses], [loss for _, loss in losses], linewidth=0.8)
    left.set(xlabel="step", ylabel="loss", title="Training loss")
    if losses and min(loss for _, loss in losses) > 0:
        left.set_yscale("log")
    for axes in rest:
        for name, values in shown.items():
            axes.plot(*zip(*values, strict=True), marker=".", label=name)
        axes.set(xlabel="step", title=title, **({"ylim": limits} if limits else {}))
        axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is left-aligned, numbers get thousands separators."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def _versions() -> str:
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def _seconds(history: History) -> float | None:
    return next((entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry), None)


def _results(trainer: Any) -> list[tuple[str, Any]]:
    history, accounts, args = trainer.state.log_history, trainer.accounts, trainer.args
    rows: list[tuple[str, Any]] = [
        ("steps", trainer.state.global_step),
        ("epochs", round(float(trainer.state.epoch or 0), 3)),
        ("processes", args.world_size),
        ("micro-batches per step", args.gradient_accumulation_steps * args.world_size),
        ("samples", accounts.totals["num_samples"]),
        ("tokens", accounts.totals["num_tokens"]),
        ("tiles", accounts.totals["num_tiles"]),
    ]
    if accounts.totals["num_slots"]:
        efficiency = accounts.totals["num_tokens"] / accounts.totals["num_slots"]
        rows.append(("packing efficiency" if args.packing else "share of tokens that are not padding", efficiency))
    if (seconds := _seconds(history)) is not None:
        rows.append(("minutes, this part of the run", seconds / 60))
    losses = points(history, "loss")
    if losses:
        rows += [("first logged loss", losses[0][1]), ("last logged loss", losses[-1][1])]
    return rows


def _measures(history: History) -> list[str]:
    """Keys of what evaluations measured, in the order of their first appearance."""
    keys = dict.fromkeys(key for entry in history for key in entry)
    return [key for key in keys if key.startswith("eval_") and not key.endswith(_TIMINGS)]


def _evaluations(history: History) -> str:
    """A table with a row for every step that was evaluated; several data sets are several entries of one step."""
    keys, steps = _measures(history), dict[int, dict[str, Any]]()
    for entry in history:
        if any(key in entry for key in keys):
            steps.setdefault(entry["step"], {}).update(entry)
    if not steps:
        return ""
    rows = [(step, *(entry.get(key, "") for key in keys)) for step, entry in steps.items()]
    return "\n## Evaluation\n\n" + table(["step", *(key.removeprefix("eval_") for key in keys)], rows) + "\n"


def _preferences(folder: Path, trainer: Any) -> str:
    """The section of a run on pairs of answers, with its picture; empty for other runs."""
    if getattr(trainer, "preference", None) is None:
        return ""
    curves = ""
    try:
        write_preference_curves(folder / "preference_curves.png", trainer.state.log_history)
        curves = "\n![Preferences](preference_curves.png)\n"
    except ImportError:
        pass
    return f"\n## Preferences\n\n{table(['', 'value'], preference_rows(trainer))}\n{curves}"


def write_report(
    folder: Path, trainer: Any, settings: str, trainable: Sequence[tuple[str, int, int]], title: str = "Training run"
) -> Path:
    """Writes `report.md` and, where matplotlib is installed, `loss_curve.png` to `folder`.

    Of a run on pairs of answers also their settings, and `preference_curves.png`.

    Args:
        folder: Of the run.
        trainer: The `InternVLTrainer` or `MPOTrainer` after `train()`.
        settings: The recipe, resolved, as YAML.
        trainable: (module, trained parameters, parameters), as `parameters.trainable_summary` gives.
        title: Headline.

    Returns:
        The report's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    history, accounts = trainer.state.log_history, trainer.accounts
    curve = ""
    try:
        measured = (key for key in _measures(history) if not is_preference_measure(key))
        drawn = (key for key in measured if not key.endswith(_COUNTS))
        write_curve(folder / "loss_curve.png", history, {key: key.removeprefix("eval_") for key in drawn})
        curve = "![Loss](loss_curve.png)\n"
    except ImportError:
        pass
    unusable = accounts.unusable()
    sources = [(name, count, unusable[name]) for name, count in accounts.entries.items()]
    text = (
        f"# {title}\n\n{_versions()}\n\n{table(['', 'value'], _results(trainer))}\n\n{curve}"
        f"\n## Data\n\n{table(['data set', 'entries of an epoch', 'left out'], sources)}\n"
        f"\n## Parameters\n\n{table(['module', 'trained', 'all'], trainable)}\n"
        f"{_preferences(folder, trainer)}{_evaluations(history)}\n## Settings\n\n```yaml\n{settings.strip()}\n```\n"
    )
    path = folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path
