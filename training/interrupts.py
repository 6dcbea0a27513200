"""Stopping a run in good order: Ctrl-C and SIGTERM finish the step, save a checkpoint and end the training."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SaveOnSignal(TrainerCallback):
    """Turns the first signal into a request to save and stop; a second Ctrl-C stops at once, without saving.

    Signals reach the ranks of a run at different moments, or only some. The trainer therefore tells all of them, with
    the counts of each step, whether one of them has `requested` a stop, and sets `agreed`.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        self._former: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Takes over the signals; in a thread, where Python forbids it, nothing changes."""
        self.requested = self.agreed = False
        try:
            self._former = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        except ValueError:
            self._former = {}

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Saves and stops, where all ranks know that one wants to."""
        if self.agreed:
            control.should_save = control.should_training_stop = True
            if state.is_world_process_zero:
                logger.warning(
                    "Stopping after step %d; %s/checkpoint-%d continues the run",
                    state.global_step,
                    args.output_dir,
                    state.global_step,
                )

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """Gives the signals back."""
        self.restore()

    def restore(self) -> None:
        """Gives the signals back; calling it twice is harmless."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            self.restore()
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("%s: saving after this step; press Ctrl-C again to stop at once", signal.Signals(number).name)
