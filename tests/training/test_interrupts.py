"""Signals end a run in good order: a checkpoint after the step, the end, and a resumed run like one never stopped."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from internvl_hub.tests.training.tiny_models import Line
from internvl_hub.training.interrupts import SaveOnSignal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def _own_handlers() -> Iterator[None]:
    """Whatever a test does, the handlers of the test run come back."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def begun() -> tuple[SaveOnSignal, TrainerControl]:
    """A callback that listens; sending a signal before would end the test run."""
    callback, control = SaveOnSignal(), TrainerControl()
    callback.on_train_begin(None, None, control)
    assert all(signal.getsignal(number) == callback._handle for number in SIGNALS)
    return callback, control


def step(callback: SaveOnSignal, control: TrainerControl, number: int = 4) -> None:
    state = TrainerState(global_step=number, is_world_process_zero=True)
    callback.on_step_end(SimpleNamespace(output_dir="out"), state, control)


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS, ids=["interrupt", "terminate"])
def test_first_signal_is_a_wish_and_agreement_stops(number: signal.Signals, caplog: pytest.LogCaptureFixture) -> None:
    callback, control = begun()
    step(callback, control)
    assert not (callback.requested or control.should_save or control.should_training_stop)
    os.kill(os.getpid(), number)
    assert callback.requested and number.name in caplog.text
    step(callback, control)  # the other ranks do not know of it yet
    assert not (control.should_save or control.should_training_stop)
    callback.agreed = True
    step(callback, control)
    assert control.should_save and control.should_training_stop
    assert "Stopping after step 4; out/checkpoint-4 continues the run" in caplog.text


def test_rank_without_a_signal_stops_with_the_others() -> None:
    callback, control = begun()
    callback.agreed = True
    step(callback, control)
    assert control.should_save and control.should_training_stop and not callback.requested


def test_second_interrupt_stops_at_once() -> None:
    former = {number: signal.getsignal(number) for number in SIGNALS}
    callback, _ = begun()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert {number: signal.getsignal(number) for number in SIGNALS} == former


def test_schedulers_that_send_terminate_twice_are_patient() -> None:
    callback, _ = begun()
    for number in (signal.SIGTERM, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert callback.requested
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_come_back_and_wishes_do_not_stay() -> None:
    mine = signal.signal(signal.SIGTERM, lambda number, frame: None)
    assert mine is not None
    former = {number: signal.getsignal(number) for number in SIGNALS}
    callback, control = begun()
    os.kill(os.getpid(), signal.SIGTERM)
    callback.agreed = True
    callback.on_train_end(None, None, control)
    assert {number: signal.getsignal(number) for number in SIGNALS} == former
    callback.restore()
    assert {number: signal.getsignal(number) for number in SIGNALS} == former
    callback.on_train_begin(None, None, control)  # the callback serves another run
    assert not (callback.requested or callback.agreed)


def test_in_a_thread_nothing_changes() -> None:
    former = {number: signal.getsignal(number) for number in SIGNALS}
    callback, found = SaveOnSignal(), []

    def train() -> None:
        callback.on_train_begin(None, None, TrainerControl())
        found.append({number: signal.getsignal(number) for number in SIGNALS})
        callback.on_train_end(None, None, TrainerControl())

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert found == [former] and {number: signal.getsignal(number) for number in SIGNALS} == former


# --- a run -----------------------------------------------------------------------------------------------------------


class Killer(TrainerCallback):
    """Sends this process a signal in the middle of a step, and agrees as a trainer of one rank does."""

    def __init__(self, signals: SaveOnSignal, at: int | None) -> None:
        self.signals, self.at = signals, at

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step + 1 == self.at:
            assert signal.getsignal(signal.SIGTERM) == self.signals._handle
            os.kill(os.getpid(), signal.SIGTERM)
        self.signals.agreed = self.signals.requested


def train(folder: Path, at: int | None = None, **options: Any) -> tuple[int, float, list[str]]:
    """Six steps with Adam, unless stopped: the last step, the weight and the checkpoints."""
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=2, max_steps=6, save_strategy="no", learning_rate=0.1,
        report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    signals = SaveOnSignal()
    rows = [{"x": torch.tensor([1.0 + k])} for k in range(12)]
    trainer = Trainer(Line(), settings, train_dataset=rows, callbacks=[Killer(signals, at), signals])
    trainer.train(**options)
    checkpoints = sorted(path.name for path in folder.glob("checkpoint-*"))
    return trainer.state.global_step, float(trainer.model.weight.detach()), checkpoints


def test_stopped_and_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    former = {number: signal.getsignal(number) for number in SIGNALS}
    steps, weight, checkpoints = train(tmp_path / "whole")
    assert (steps, checkpoints) == (6, [])
    steps, half_way, checkpoints = train(tmp_path / "stopped", at=3)
    assert (steps, checkpoints) == (3, ["checkpoint-3"]) and half_way != weight
    assert {number: signal.getsignal(number) for number in SIGNALS} == former
    checkpoint = str(tmp_path / "stopped" / "checkpoint-3")
    assert train(tmp_path / "resumed", resume_from_checkpoint=checkpoint) == (6, weight, [])
