"""From a data set to the batches of a run: the plan of its epochs, and the data loader that serves it.

Only `ConversationDataset`s are planned; `Trainer` samples any other data set itself.
"""

from __future__ import annotations

import signal
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from ..data.dataset import ConversationDataset
from ..data.lengths import LengthIndex, hash_of, rows_without
from ..data.preference_dataset import PreferenceDataset
from ..data.skipped import Skipped
from .arguments import InternVLTrainingArguments
from .batching import BatchPlanner
from .packing import EpochPlanner
from .sampling import PlanBatchSampler, Planner


class LeftOut(NamedTuple):
    """A row that the plan leaves out, and its copies in an epoch."""

    row: Skipped
    copies: int


class RunPlan(NamedTuple):
    """What a run goes through.

    Attributes:
        sampler: Of the batches of every epoch.
        entries: Entries of an epoch by data set, a row counted as often as it is repeated, left-out ones included.
        left_out: Rows that are in none of the batches.
        fingerprint: Hash of all that the plan depends on; a run can be resumed only on the same one.
    """

    sampler: PlanBatchSampler
    entries: dict[str, int]
    left_out: list[LeftOut]
    fingerprint: str


def check_kind(name: str, dataset: Any, trainer: str, takes_pairs: bool) -> None:
    """Refuses pairs where conversations are wanted, and conversations where pairs are.

    Args:
        name: Of the argument.
        dataset: What was given: a data set, a dictionary of them, or None; data sets of other classes are not judged.
        trainer: Name of the trainer.
        takes_pairs: What it trains on.

    Raises:
        ValueError: the data set is of the other kind.
    """
    for each in dataset.values() if isinstance(dataset, dict) else (dataset,):
        if not isinstance(each, ConversationDataset) or isinstance(each, PreferenceDataset) == takes_pairs:
            continue
        if takes_pairs:
            wrong = "trains on pairs of answers: give it a PreferenceDataset, or train with InternVLTrainer"
        else:
            wrong = "trains on conversations: give it a ConversationDataset, or train with MPOTrainer"
        raise ValueError(f"{name} is a {type(each).__name__}, but {trainer} {wrong}")


def plan_run(dataset: ConversationDataset, args: InternVLTrainingArguments) -> RunPlan:
    """Plans every epoch of a run; equal on all ranks and at every resumption.

    Rows are measured first, where the plan needs lengths (`packing`, or `train_sampling_strategy="group_by_length"`)
    and `dataset.build_index` was not called before.

    Args:
        dataset: Its rows.
        args: Budgets, batch size, ranks, accumulation and seed (`data_seed`, else `seed`).

    Raises:
        ValueError: no row can be used.
    """
    if args.needs_lengths and dataset.index is None:
        dataset.build_index(progress=not args.disable_tqdm)
    rows = dataset.epoch_rows()
    reasons = _reasons(dataset, rows, args)
    kept = rows_without(rows, reasons)
    if not len(kept):
        first = next(iter(reasons.values()), None)
        example = "" if first is None else f"; {first.where}: {first.reason}"
        raise ValueError(f"the training data has {len(rows)} rows in an epoch, none of which can be used{example}")
    values, counts = np.unique(rows, return_counts=True)
    copies = dict(zip(values.tolist(), counts.tolist(), strict=True))
    left_out = [LeftOut(reason, copies[row]) for row, reason in reasons.items() if row in copies]
    planner = _planner(dataset.index, kept, args)
    sampler = PlanBatchSampler(planner, kept)
    return RunPlan(sampler, _entries(dataset, rows), left_out, hash_of(kept.tobytes(), planner.fingerprint()))


def _planner(index: LengthIndex | None, rows: np.ndarray, args: InternVLTrainingArguments) -> Planner:
    seed = args.seed if args.data_seed is None else args.data_seed
    multiple = args.world_size * args.gradient_accumulation_steps
    tokens = np.ones(len(rows), dtype=np.int64) if index is None else index.tokens[rows]
    if args.packing and index is not None:
        budgets = args.max_packed_tokens, args.num_images_expected
        return EpochPlanner(tokens, index.tiles[rows], *budgets, seed, multiple)
    return BatchPlanner(tokens, args.per_device_train_batch_size, seed, args.groups_by_length, multiple)


def _reasons(dataset: ConversationDataset, rows: np.ndarray, args: InternVLTrainingArguments) -> dict[int, Skipped]:
    """Why rows are left out: the index's reasons, and those that no pack can hold."""
    index = dataset.index
    if index is None:
        return {}
    reasons = dict(index.unusable)
    if not args.packing:
        return reasons
    for lengths, limit, name in (
        (index.tokens, args.max_packed_tokens, "max_packed_tokens"),
        (index.tiles, args.num_images_expected, "num_images_expected"),
    ):
        for row in np.flatnonzero(lengths > limit).tolist():
            what = f"{lengths[row]} {'tokens' if name == 'max_packed_tokens' else 'tiles'}, more than {name}={limit}"
            reasons.setdefault(row, Skipped(dataset.source_name(row), dataset.records[row].where, what))
    return reasons


def _entries(dataset: ConversationDataset, rows: np.ndarray) -> dict[str, int]:
    """Entries of an epoch by data set."""
    sizes = dataset.source_sizes()
    ends = np.cumsum(list(sizes.values()))
    counts = np.bincount(np.searchsorted(ends, rows, side="right"), minlength=len(sizes))
    return dict(zip(sizes, counts.tolist(), strict=True))


def make_loader(dataset: ConversationDataset, sampler: PlanBatchSampler, collator: Any, args: Any) -> DataLoader:
    """A loader of the plan's batches, to be handed to accelerate."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and torch.accelerator.is_available(),
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        worker_init_fn=partial(_start_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
    )


def _start_worker(worker: int, num_workers: int, rank: int) -> None:
    """Ctrl-C reaches every process of a terminal; workers must live until the run has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    seed_worker(worker, num_workers=num_workers, rank=rank)
