"""The pass that precomputes the reference's log-probabilities, and the reference that reads them.

Every row once, in evaluation mode, shared among ranks; what lies on the disk already (`reference_cache`) is not made
again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..data.dataset import ConversationDataset
from ..data.lengths import rows_without
from .accounts import MEASURES
from .preference_arguments import PreferenceArguments
from .preference_batch import PairBatch
from .reference_cache import REFERENCE_CACHE, ReferenceValues, cache_key, refuse_random_rows, weights_identity

logger = logging.getLogger(__name__)

PART_ROWS = 256  # an interruption loses less than so many of a rank


class PrecomputedReference:
    """Values made before training (`make`), looked up by row; no reference model while training.

    Args:
        trainer: Whose data sets and settings it is for.
        preference: `reference_cache`.
        module: Another checkpoint than the starting weights, dropped after the pass; None for the model in training.
        adapters_given: The model came with adapters, which belong to the reference; others do nothing yet.

    Raises:
        ValueError: rows differ from epoch to epoch, or a data set has no numbered rows.
    """

    same_vision = False
    language_models: list[Any] = []

    def __init__(
        self,
        trainer: Any,
        preference: PreferenceArguments,
        module: nn.Module | None = None,
        adapters_given: bool = False,
    ) -> None:
        self.trainer = trainer
        self.module = module
        self.folder = Path(preference.reference_cache or REFERENCE_CACHE)
        source = trainer.model if module is None else module
        self.identity = weights_identity(source, hasattr(source, "peft_config") and not adapters_given)
        self.values: dict[int, ReferenceValues] = {}
        self._done = False
        self._current: Any = trainer.train_dataset
        for dataset in self._datasets():
            self._check(dataset)

    def _datasets(self) -> list[Any]:
        """Those of training and evaluation; a data set whose rows carry their values needs none."""
        evaluation = self.trainer.eval_dataset
        evaluation = evaluation.values() if isinstance(evaluation, dict) else [evaluation]
        return [dataset for dataset in (self.trainer.train_dataset, *evaluation) if dataset is not None]

    def _check(self, dataset: Any) -> None:
        if _carries_values(dataset):
            return
        if not isinstance(dataset, ConversationDataset):
            raise ValueError(
                f"precompute_reference needs a PreferenceDataset, whose rows have numbers, got "
                f"{type(dataset).__name__}; or rows with reference_log_probs"
            )
        refuse_random_rows(dataset)

    def read_from(self, dataset: Any) -> Any:
        """Looks rows up in the values of `dataset` from now on; returns the one before."""
        before, self._current = self._current, dataset
        return before

    def log_probs(self, model: nn.Module, batch: PairBatch) -> torch.Tensor:
        """(2P,) of the answers; `model` is not used.

        Raises:
            ValueError: a row has no value.
        """
        values = self.values.get(id(self._current))
        if values is None or batch.rows is None:
            raise ValueError(
                "there are no precomputed reference values of this data set: give it to MPOTrainer as eval_dataset"
            )
        return values.of(list(batch.rows), batch.counts.device)

    def make(self, model: nn.Module, fresh: bool = True) -> None:
        """Fills in what is missing; once, later calls do nothing.

        Args:
            model: Of the starting weights, whole or wrapped as the trainer wraps it.
            fresh: Whether it still has them.

        Raises:
            ValueError: values are missing, and the starting weights are gone.
        """
        for dataset in () if self._done else self._datasets():
            if id(dataset) not in self.values and not _carries_values(dataset):
                self._make(dataset, model, fresh)
        self._done, self.module = True, None

    def _make(self, dataset: Any, model: nn.Module, fresh: bool) -> None:
        trainer = self.trainer
        key = cache_key(dataset, self.identity, _precision(trainer))
        if key is None:
            logger.warning("%s comes from no file: its reference values are kept in memory alone", dataset.name)
        values = ReferenceValues(len(dataset), None if key is None else self.folder / key)
        self.values[id(dataset)] = values
        values.share(trainer.args.device)
        unusable = dataset.index.unusable if dataset.index is not None else {}
        rows = values.missing(np.unique(rows_without(dataset.epoch_rows(), unusable)))
        if len(rows) and not (fresh or self.module is not None):
            raise ValueError(
                f"{len(rows)} reference values are missing in {values.folder}, and the starting weights they come "
                "from are gone: restore the folder, or start the run anew"
            )
        module = model if self.module is None else self.module.to(trainer.args.device)
        training = module.training
        module.eval()
        for found, numbers in _scored(trainer, dataset, rows, module):
            values.add(found, numbers)
        module.train(training)
        values.share(trainer.args.device)


def _precision(trainer: Any) -> list[str]:
    """What the values depend on beside weights and inputs."""
    return [str(trainer.accelerator.mixed_precision), str(trainer.model.dtype)]


def _carries_values(dataset: Any) -> bool:
    """Whether rows have `reference_log_probs` of their own."""
    if isinstance(dataset, ConversationDataset) or not hasattr(dataset, "__getitem__") or not len(dataset):
        return False
    return "reference_log_probs" in dataset[0]


def _loader(trainer: Any, dataset: Any, rows: np.ndarray) -> DataLoader:
    """This rank's share of `rows` in padded batches; every rank has as many, empty ones where need be."""
    args = trainer.args
    if dataset.index is not None:
        rows = rows[np.argsort(-dataset.index.tokens[rows], kind="stable")]  # like lengths share a batch
    size = args.per_device_eval_batch_size
    batches = [rows[start : start + size].tolist() for start in range(0, len(rows), size)]
    batches += [[]] * (-len(batches) % args.world_size)
    own: Any = batches[args.process_index :: args.world_size]
    collator = trainer._eval_collator or trainer.data_collator
    return DataLoader(dataset, batch_sampler=own, collate_fn=collator, num_workers=args.dataloader_num_workers)


def _scored(trainer: Any, dataset: Any, rows: np.ndarray, model: nn.Module) -> Iterator[tuple[list[int], np.ndarray]]:
    """Rows of this rank with their values, in parts."""
    found: list[int] = []
    numbers: list[np.ndarray] = []
    quiet = trainer.args.disable_tqdm or not trainer.is_world_process_zero() or not len(rows)
    for batch in tqdm(_loader(trainer, dataset, rows), desc="Reference", unit=" batches", disable=quiet):
        for entry in batch.pop("skipped", ()):
            logger.warning("%s: no reference value: %s: %s", entry.source, entry.where, entry.reason)
        inputs = {name: value for name, value in batch.items() if name not in MEASURES}
        with torch.no_grad(), trainer.accelerator.autocast():
            pairs = PairBatch.of(trainer._prepare_inputs(inputs))
            answers = pairs.score(model).answers
        found += pairs.rows or ()
        numbers.append(answers.double().cpu().numpy().reshape(-1, 2))
        if len(found) >= PART_ROWS:
            yield found, np.concatenate(numbers)
            found, numbers = [], []
    if found:
        yield found, np.concatenate(numbers)
