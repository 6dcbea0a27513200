"""A progress bar that shows loss, speed, packing efficiency and skipped rows in place, instead of a line per log."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback

_SHOWN = {
    "loss": "loss",
    "learning_rate": "lr",
    "tokens_per_second": "tokens/s",
    "efficiency": "full",
    "skipped": "skipped",
}


class RunProgress(ProgressCallback):
    """As the parent's; entries with a training loss go behind the bar, all others are printed."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the latest numbers."""
        if not logs or "loss" not in logs or self.training_bar is None:
            super().on_log(args, state, control, logs=logs, **kwargs)
            return
        self.training_bar.set_postfix({name: _short(logs[key]) for key, name in _SHOWN.items() if key in logs})


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and value < 1000 else f"{float(value):.0f}"
