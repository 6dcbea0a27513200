"""What a run on pairs of answers says of itself: its reference, its settings, and the curves of its rewards.

Numbers come from the log (`MPOTrainer.log`, `PairEvaluation`); the report around them is `report`'s.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .preference_arguments import PreferenceArguments
from .preference_terms import PAIR_METRICS
from .reference import AdapterReference
from .reference_pass import PrecomputedReference

History = Sequence[Mapping[str, Any]]

_SHIFT = "reward_shift"
_LOGGED = (*PAIR_METRICS, "loss_generation", _SHIFT)
# Title, label of the y axis, its limits, and what is drawn: keys of the log and their names.
_PANELS: tuple[tuple[str, str, tuple[float, float] | None, dict[str, str]], ...] = (
    (
        "Terms of the loss, unweighted", "loss", None,
        {"loss_preference": "preference", "loss_quality": "quality", "loss_generation": "generation"},
    ),
    (
        "Rewards", "reward", None,
        {"rewards/chosen": "chosen", "rewards/rejected": "rejected", "rewards/margins": "margin", _SHIFT: "shift"},
    ),
    ("Accuracy", "share of pairs", (0, 1.02), {"rewards/accuracies": "chosen above rejected"}),
)  # fmt: skip


def describe_reference(trainer: Any) -> str:
    """What the answers are compared with, in a few words.

    Args:
        trainer: An `MPOTrainer`.
    """
    path = trainer.preference.reference_path
    if isinstance(trainer.reference, PrecomputedReference):
        return f"values precomputed with {path or 'the starting weights'}"
    if path is not None:
        return str(path)
    if isinstance(trainer.reference, AdapterReference):
        return "the model without its adapters"
    return "a frozen copy of the starting weights"


def is_preference_measure(key: str) -> bool:
    """Whether a key of an evaluation is one of pairs, drawn or tabled here, such as `eval_rewards/margins`."""
    return key.startswith("eval_") and key.endswith(tuple(f"_{name}" for name in _LOGGED))


def preference_rows(trainer: Any) -> list[tuple[str, Any]]:
    """Name and value: the settings, the reference, and what the rewards began and ended with."""
    settings: PreferenceArguments = trainer.preference
    named = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    rows: list[tuple[str, Any]] = [("reference", describe_reference(trainer))]
    rows += [(name, value) for name, value in named.items() if value is not None and name != "reference_path"]
    history = trainer.state.log_history
    for key in ("rewards/margins", "rewards/accuracies", _SHIFT):
        values = [entry[key] for entry in history if key in entry]
        if values:
            rows += [(f"first logged {key}", values[0]), (f"last logged {key}", values[-1])]
    return rows


def write_preference_curves(path: Path, history: History) -> None:
    """Terms of the loss, rewards and accuracy over the steps, as a picture; evaluations dashed, with points.

    Args:
        path: Of the picture.
        history: `trainer.state.log_history`.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True)
    for axes, (title, unit, limits, metrics) in panels:
        for number, (key, name) in enumerate(metrics.items()):
            _draw(axes, history, key, name, f"C{number}")
        axes.set(xlabel="step", ylabel=unit, title=title, **({"ylim": limits} if limits else {}))
        if axes.lines:
            if unit == "loss" and all((line.get_ydata() > 0).all() for line in axes.lines):
                axes.set_yscale("log")
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)
    figure.savefig(path, dpi=110)


def _draw(axes: Any, history: History, key: str, name: str, colour: str) -> None:
    """One metric: the line of training, and one of every evaluation data set."""
    lines = {key: name}
    for entry in history if key != _SHIFT else ():  # an evaluation has that of training
        for other in entry:
            if other.startswith("eval_") and other.endswith(f"_{key}"):
                dataset = other.removeprefix("eval_").removesuffix(key).rstrip("_")
                lines[other] = f"{name}, {dataset or 'evaluation'}"
    for logged, label in lines.items():
        values = [(entry["step"], entry[logged]) for entry in history if logged in entry]
        if values:
            style = {"linewidth": 0.9} if logged == key else {"linestyle": "--", "marker": ".", "linewidth": 0.9}
            axes.plot(*zip(*values, strict=True), color=colour, label=label, **style)
