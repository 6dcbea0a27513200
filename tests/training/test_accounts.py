"""Counts of a run: what is booked, when it stops, the rates it reports, and that a resumed run goes on counting."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from internvl_hub.data.skipped import Skipped
from internvl_hub.tests.training.tiny_models import Line
from internvl_hub.training import accounts as accounts_module
from internvl_hub.training.accounts import MEASURES, RunAccounts, TooManySkippedError


def batch(samples: int, tokens: int, slots: int, tiles: int, *skipped: Skipped) -> dict[str, Any]:
    counts = dict(zip(MEASURES, (samples, tokens, slots, tiles), strict=True))
    return {"input_ids": "kept", **counts, **({"skipped": list(skipped)} if skipped else {})}


def bad(source: str, line: int = 1) -> Skipped:
    return Skipped(source, f"{source}.jsonl:{line}", "no picture")


# --- counts ----------------------------------------------------------------------------------------------------------


def test_counts_are_taken_out_of_the_batches(caplog: pytest.LogCaptureFixture) -> None:
    accounts = RunAccounts({"a": 100, "b": 100})
    batches = [batch(2, 30, 40, 5, bad("b", 7)), batch(1, 10, 40, 0, bad("b", 8), bad("a", 9))]
    with caplog.at_level(logging.WARNING):
        vector = accounts.take(batches)
    assert batches == [{"input_ids": "kept"}] * 2
    assert vector.dtype == torch.float64 and vector.tolist() == [3, 40, 80, 5, 1, 2]
    assert accounts.width == len(vector)
    for line in ("b: skipped b.jsonl:7: no picture", "b: skipped b.jsonl:8", "a: skipped a.jsonl:9"):
        assert line in caplog.text
    assert accounts.totals == dict.fromkeys(MEASURES, 0)  # nothing is booked before the ranks have agreed


def test_a_step_is_the_sum_over_its_ranks() -> None:
    sources = {"a": 1000, "b": 1000}
    batches = [lambda i=i: batch(i, 10 * i, 16 * i, i % 2, *[bad("a", i)] * (i == 2)) for i in range(1, 5)]
    alone, shared = RunAccounts(sources), RunAccounts(sources)
    alone.add(alone.take([make() for make in batches]))
    ranks = [RunAccounts(sources) for _ in range(2)]
    shared.add(sum(rank.take([make() for make in batches[r::2]]) for r, rank in enumerate(ranks)))
    assert shared.totals == alone.totals == {"num_samples": 10, "num_tokens": 100, "num_slots": 160, "num_tiles": 2}
    assert shared.unusable() == alone.unusable() == {"a": 1, "b": 0}


def test_batches_without_counts_count_nothing() -> None:
    """A collator of one's own need not report any."""
    accounts = RunAccounts({"a": 1})
    accounts.add(accounts.take([{"input_ids": "kept"}]))
    assert accounts.totals == dict.fromkeys(MEASURES, 0) and accounts.rates() == {}


@pytest.mark.parametrize(("share", "allowed"), [(0.0, 0), (0.01, 2), (0.5, 100), (1.0, 200)])
def test_run_stops_past_the_share_of_one_data_set(share: float, allowed: int) -> None:
    accounts = RunAccounts({"good": 100_000, "poor": 200}, share)
    for line in range(allowed):
        accounts.add(accounts.take([batch(1, 1, 1, 0, bad("poor", line))]))
    vector = accounts.take([batch(1, 1, 1, 0, bad("poor", allowed))])
    with pytest.raises(
        TooManySkippedError, match=f"poor: {allowed + 1} of 200 rows .*max_skip_share={share};"
    ) as stop:
        accounts.add(vector)
    assert "raise data.max_skip_share" in str(stop.value)
    with pytest.raises(TooManySkippedError):  # another rank, with the same sums
        RunAccounts({"good": 100_000, "poor": 200}, share).add(vector + vector * allowed)


def test_rows_left_out_before_training_count_with_their_copies(caplog: pytest.LogCaptureFixture) -> None:
    accounts = RunAccounts({"a": 300, "b": 300}, 0.01)
    with caplog.at_level(logging.WARNING):
        accounts.leave_out(bad("a", 5), copies=2)
    assert "a: left out a.jsonl:5: no picture" in caplog.text
    accounts.add(accounts.take([batch(1, 1, 1, 0, bad("a", 6), bad("b", 6))]))
    assert accounts.unusable() == {"a": 3, "b": 1}
    with pytest.raises(TooManySkippedError, match=r"a: 4 of 300 .*one of them is a\.jsonl:7: no picture"):
        accounts.leave_out(bad("a", 7), copies=1)


# --- rates -----------------------------------------------------------------------------------------------------------


def test_rates_are_of_the_time_since_the_last_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(accounts_module.time, "monotonic", lambda: now[0])
    accounts = RunAccounts({"a": 100}, 1)
    accounts.add(accounts.take([batch(4, 300, 400, 1, bad("a"))]))
    now[0] = 102.0
    assert accounts.rates() == {"tokens_per_second": 150.0, "efficiency": 0.75, "skipped": 1}
    accounts.add(accounts.take([batch(4, 100, 400, 1)]))
    now[0] = 112.0
    assert accounts.rates() == {"tokens_per_second": 10.0, "efficiency": 0.25, "skipped": 1}
    now[0] = 120.0
    assert accounts.rates() == {}
    accounts.add(accounts.take([batch(1, 8, 8, 0)]))
    now[0] = 124.0
    assert accounts.rates()["tokens_per_second"] == 2.0  # the pause before is nobody's


# --- epochs and resuming ---------------------------------------------------------------------------------------------


class Booking(TrainerCallback):
    """Books ten tokens in every step and a bad row in the first of every epoch, as a trainer would."""

    def __init__(self, accounts: RunAccounts) -> None:
        self.accounts = accounts
        self.seen: list[tuple[int, int, int]] = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        skipped = [bad("a", 3)] if state.global_step % 3 == 1 else []
        self.accounts.add(self.accounts.take([batch(2, 10, 12, 1, *skipped)]))
        self.seen.append(
            (state.global_step, self.accounts.totals["num_tokens"], sum(self.accounts.unusable().values()))
        )


def run(folder: Path, accounts: RunAccounts, **options: Any) -> tuple[Booking, Trainer]:
    """Two epochs of three steps; a checkpoint after every other."""
    settings = TrainingArguments(
        str(folder), per_device_train_batch_size=2, num_train_epochs=2, save_strategy="steps", save_steps=2,
        report_to="none", use_cpu=True, disable_tqdm=True, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    rows, booking = [{"x": torch.ones(1)}] * 6, Booking(accounts)
    trainer = Trainer(Line(), settings, train_dataset=rows, callbacks=[accounts, booking])
    trainer.train(**options)
    return booking, trainer


def test_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    """After two of three steps of the first epoch, and at the same step in the second."""
    whole, _ = run(tmp_path / "a", RunAccounts({"a": 100}))
    # Bad rows are counted anew in every epoch.
    assert whole.seen == [(step, 10 * step, 1) for step in range(1, 7)]
    for step in (2, 4):
        checkpoint = tmp_path / "a" / f"checkpoint-{step}"
        resumed, _ = run(tmp_path / f"b{step}", RunAccounts({"a": 100}), resume_from_checkpoint=str(checkpoint))
        assert resumed.seen == whole.seen[step:]
        kept = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["RunAccounts"]
        assert kept["attributes"]["totals"]["num_tokens"] == 10 * step
        assert kept["attributes"]["skipped"] == {"a": 1} and kept["attributes"]["world_size"] == 1


def test_rates_after_resuming_are_of_the_new_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path / "a", RunAccounts({"a": 100}))
    now = [0.0]
    accounts = RunAccounts({"a": 100})
    run(tmp_path / "b", accounts, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    monkeypatch.setattr(accounts_module.time, "monotonic", lambda: now[0])
    accounts._clock, now[0] = 0.0, 2.0
    assert accounts.totals["num_tokens"] == 60
    assert accounts.rates()["tokens_per_second"] == 10.0  # 20 tokens, those of steps 5 and 6


def test_data_sets_that_are_gone_are_not_taken_up(tmp_path: Path) -> None:
    run(tmp_path / "a", RunAccounts({"a": 100, "gone": 100}))
    accounts = RunAccounts({"a": 100, "new": 100})
    run(tmp_path / "b", accounts, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert accounts.unusable() == {"a": 1, "new": 0}


def test_resuming_where_nothing_was_counted(tmp_path: Path) -> None:
    """A checkpoint of another trainer has no counts; new ones begin, and are saved."""
    run(tmp_path / "a", RunAccounts({"a": 100}))
    path = tmp_path / "a" / "checkpoint-2" / "trainer_state.json"
    state = json.loads(path.read_text())
    del state["stateful_callbacks"]["RunAccounts"]
    path.write_text(json.dumps(state))
    resumed, _ = run(tmp_path / "b", RunAccounts({"a": 100}), resume_from_checkpoint=str(path.parent))
    assert [tokens for _, tokens, _ in resumed.seen] == [10, 20, 30, 40]
    saved = json.loads((tmp_path / "b" / "checkpoint-6" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["RunAccounts"]["attributes"]["totals"]["num_tokens"] == 40
