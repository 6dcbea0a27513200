"""The batch sampler inside accelerate's and the Trainer's wrappers: ranks, resuming, epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from internvl_hub.training.batching import BatchPlanner
from internvl_hub.training.packing import EpochPlanner
from internvl_hub.training.sampling import PlanBatchSampler, SampleKey

ROWS = 37
Keys = list[SampleKey]


class EchoDataset(Dataset):
    """Returns what it is asked for."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, key: SampleKey) -> SampleKey:
        assert isinstance(key, SampleKey)
        return key


def collate(keys: Keys) -> Keys:
    return list(keys)


def packed_sampler(multiple: int = 4) -> PlanBatchSampler:
    lengths = np.random.default_rng(0).integers(10, 60, ROWS)
    return PlanBatchSampler(EpochPlanner(lengths, lengths % 3, 100, 5, seed=7, multiple=multiple))


def padded_sampler(multiple: int = 4) -> PlanBatchSampler:
    return PlanBatchSampler(BatchPlanner(np.arange(ROWS) + 1, 3, seed=7, group=True, multiple=multiple))


def tiny_sampler(multiple: int = 4) -> PlanBatchSampler:
    """Two entries for four ranks: half of the batches are empty."""
    return PlanBatchSampler(EpochPlanner(np.full(2, 60), np.ones(2, int), 100, 5, seed=7, multiple=multiple))


SAMPLERS = {"packed": packed_sampler, "padded": padded_sampler, "tiny": tiny_sampler}


def loader(sampler: PlanBatchSampler, rank: int, ranks: int, even: bool = True, workers: int = 0) -> Any:
    plain = DataLoader(
        EchoDataset(), batch_sampler=sampler, collate_fn=collate, num_workers=workers, persistent_workers=workers > 0
    )
    return prepare_data_loader(plain, num_processes=ranks, process_index=rank, put_on_device=False, even_batches=even)


# ------------------------------------------------------------------------------------------------------------- alone


def test_keys_follow_the_plan() -> None:
    sampler = packed_sampler()
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) == len(sampler.planner)
        assert [[key.row for key in batch] for batch in batches] == [p.tolist() for p in sampler.planner.packs(epoch)]
        assert {(key.copy, key.epoch) for batch in batches for key in batch} == {(0, epoch)}
        assert all(type(number) is int for batch in batches for key in batch for number in key)


def test_repeated_rows_are_told_apart() -> None:
    """Rows 4 and 0 three times, row 9 once."""
    rows = np.array([4, 0, 4, 9, 0, 0, 4])
    sampler = PlanBatchSampler(BatchPlanner(np.ones(7, int), 2, seed=0), rows)
    seen = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = [key for batch in sampler for key in batch]
        assert sorted(keys) == sorted(SampleKey(r, c, epoch) for r, n in ((4, 3), (0, 3), (9, 1)) for c in range(n))
        seen.append(keys)
    assert [key[:2] for key in seen[0]] != [key[:2] for key in seen[1]]


def test_rows_must_fit_the_plan() -> None:
    with pytest.raises(ValueError, match=r"rows has shape \(3,\), but the plan has 4 entries"):
        PlanBatchSampler(BatchPlanner(np.ones(4, int), 2, seed=0), np.arange(3))


# ---------------------------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("even", [True, False])
def test_each_rank_gets_its_batches_once(kind: str, even: bool) -> None:
    for ranks in (1, 2, 4):
        for epoch in (0, 2):
            sampler = SAMPLERS[kind]()
            sampler.set_epoch(epoch)
            plan = list(sampler)
            for rank in range(ranks):
                own = SAMPLERS[kind]()
                prepared = loader(own, rank, ranks, even)
                prepared.set_epoch(epoch)  # as Trainer does; alone, it does not reach the sampler of several ranks
                own.set_epoch(epoch)
                assert len(prepared) == len(plan) // ranks
                assert list(prepared) == plan[rank::ranks]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_resuming_gives_the_rest(kind: str, ranks: int) -> None:
    """In the order of Trainer: it skips first and sets the epoch of what it can reach afterwards."""
    for epoch in (0, 1):
        for rank in range(ranks):
            sampler = SAMPLERS[kind]()
            sampler.set_epoch(epoch)
            whole = list(sampler)[rank::ranks]
            for done in range(len(whole)):
                own = SAMPLERS[kind]()
                own.set_epoch(epoch)
                rest = skip_first_batches(loader(own, rank, ranks), done)
                rest.set_epoch(epoch)
                assert len(rest) == len(whole) - done
                assert list(rest) == whole[done:]


def test_epoch_set_on_the_sampler_itself_is_seen_through_the_wrappers() -> None:
    """Two ranks and skipped batches put two wrappers around the sampler, which pass nothing on."""
    sampler = packed_sampler()
    rest = skip_first_batches(loader(sampler, 1, 2), 1)
    sampler.set_epoch(5)
    rest.set_epoch(5)
    assert {key.epoch for batch in rest for key in batch} == {5}


def test_workers_that_live_on_see_the_epoch() -> None:
    sampler = packed_sampler()
    prepared = loader(sampler, 0, 2, workers=2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        assert list(prepared) == list(sampler)[::2]


# ----------------------------------------------------------------------------------------------------------- Trainer


class SetEpoch(TrainerCallback):
    """Tells the sampler the epoch, as the package's trainer does."""

    def __init__(self, sampler: PlanBatchSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch))


class Scale(torch.nn.Module):
    """One number to train."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.scale * x).sum()}


class Recorder(Trainer):
    """Notes the keys of every micro-batch that is trained on."""

    def __init__(self, sampler: PlanBatchSampler, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, callbacks=[SetEpoch(sampler)])
        self.sampler, self.seen = sampler, []

    def get_train_dataloader(self) -> DataLoader:
        plain = DataLoader(EchoDataset(), batch_sampler=self.sampler, collate_fn=self.data_collator)
        return self.accelerator.prepare(plain)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append([SampleKey(*row) for row in inputs.pop("keys").tolist()])
        return super().training_step(model, inputs, *args, **kwargs)


def to_tensors(keys: Keys) -> dict[str, torch.Tensor]:
    return {"x": torch.tensor([float(len(keys))]), "keys": torch.tensor(keys, dtype=torch.long).reshape(-1, 3)}


def train(folder: Path, resume: str | None = None, **options: Any) -> Recorder:
    settings = {"gradient_accumulation_steps": 2, "num_train_epochs": 3, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(
        str(folder),
        **settings,
        use_cpu=True,
        remove_unused_columns=False,
        save_strategy="steps",
        save_steps=1,
        **options,
    )
    trainer = Recorder(packed_sampler(), Scale(), arguments, data_collator=to_tensors, train_dataset=EchoDataset())
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_trainer_sees_every_plan_and_resumes_inside_an_epoch(tmp_path: Path) -> None:
    whole = train(tmp_path)
    expected, sampler = [], packed_sampler()
    for epoch in range(3):
        sampler.set_epoch(epoch)
        expected += list(sampler)
    assert whole.seen == expected
    steps = len(sampler) // 2
    assert whole.state.global_step == 3 * steps
    for step in (1, steps, steps + 1, 2 * steps + 2):  # inside the first, second and third epoch, and between two
        resumed = train(tmp_path / f"resumed-{step}", str(tmp_path / f"checkpoint-{step}"))
        assert resumed.seen == expected[2 * step :]
