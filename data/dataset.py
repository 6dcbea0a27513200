"""Map-style data set of training features: a row of records, or of a mixture of files, to model inputs.

A row that cannot be used is an error or, with `on_error="skip"`, a `Skipped` in its place: never another row. Nothing
here shuffles, batches or counts; `training` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from .augmentation import Take
from .features import FeatureMaker, Features, SequenceTooLongError, make_features, to_conversation
from .lengths import LengthIndex, RowLength, hash_of, load_or_measure, measure_all, tokenizer_fingerprint
from .media import RowSettings
from .mixture import Mixture
from .records import RecordError, RecordFile
from .skipped import Skipped

__all__ = ["ConversationDataset", "RowSettings", "SequenceTooLongError", "make_features", "to_conversation"]

OnError = Literal["raise", "skip"]


@dataclass
class ConversationDataset(Dataset):
    """Features of rows, see `FeatureMaker.features`.

    An index is a row, or a row with its occurrence and epoch (`training.sampling.SampleKey`): what is random in a
    row (frames, JPEG quality) depends on these and on `seed` alone, not on workers or on the order of loading.

    Args:
        records: Any sequence of `Record`s: a `Mixture`, a `RecordFile`, a list, or one that makes them up.
        tokenizer: The checkpoint's tokenizer.
        image_processor: The checkpoint's `InternVLImageProcessor`.
        config: The `InternVLChatConfig`; gives the template and the visual tokens of a tile.
        max_seq_length: Most tokens of a row, visual ones included; None for what `settings` say.
        on_error: `"raise"`, or `"skip"`: a `Skipped` takes the place of a row that cannot be used.
        name: Of the data set in messages; the data sets of a mixture have names of their own.
        settings: How rows are read; the entries of a mixture may say otherwise for their rows.
        seed: Of all that is random in a row.

    Raises:
        RecordError: from indexing, with `on_error="raise"`.
    """

    records: Sequence[Any]
    tokenizer: Any
    image_processor: Any
    config: Any
    max_seq_length: int | None = None
    on_error: OnError = "raise"
    name: str = "dataset"
    settings: RowSettings = RowSettings()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.on_error not in ("raise", "skip"):
            raise ValueError(f"on_error must be 'raise' or 'skip', got {self.on_error!r}")
        if self.max_seq_length is not None:
            self.settings = replace(self.settings, max_seq_length=self.max_seq_length)
        self.maker = FeatureMaker(self.tokenizer, self.image_processor, self.config)
        self.index: LengthIndex | None = None

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int, int]) -> Features | Skipped:
        row, copy, epoch = key if isinstance(key, tuple) else (key, 0, 0)
        if not 0 <= row < len(self):  # iteration ends by this
            raise IndexError(f"{self.name}: row {row} of {len(self)}")
        try:
            features = self._features(row, self._take(row, copy, epoch))
            self._check_length(row, features)
            return features
        except RecordError as error:
            return self._skipped(row, error)

    def measure(self, row: int) -> RowLength | Skipped:
        """What `row` costs, without decoding its pictures."""
        try:
            return self._measure(row, self._take(row))
        except RecordError as error:
            return self._skipped(row, error)

    # What a row is made into; `preference_dataset` makes something else of it.

    def _features(self, row: int, take: Take) -> Features:
        return self.maker.features(self.records[row], self.settings_of(row), take)

    def _measure(self, row: int, take: Take) -> RowLength:
        return self.maker.measure(self.records[row], self.settings_of(row), take)

    def _tokens(self, features: Features) -> int:
        return len(features["input_ids"])

    def _take(self, row: int, copy: int = 0, epoch: int = 0) -> Take:
        return Take(self.seed, row, copy, epoch)

    def _skipped(self, row: int, error: RecordError) -> Skipped:
        if self.on_error == "raise":
            raise error
        return Skipped(self.source_name(row), error.where, error.problem)

    def _check_length(self, row: int, features: Features) -> None:
        """A row must be what the plan took it for, or its pack exceeds the budgets."""
        if self.index is None:
            return
        tokens, tiles = self._tokens(features), sum(features["num_patches"])
        planned = (int(self.index.tokens[row]), int(self.index.tiles[row]))
        if (tokens, tiles) != planned:
            raise RecordError(
                self.records[row].where,
                f"has {tokens} tokens and {tiles} tiles where the length index says {planned[0]} "
                "and {planned[1]}: its media have changed since. Delete the index (data.index_cache) to measure again",
            )

    # ----------------------------------------------------------------------------------------------------- data sets

    def settings_of(self, row: int) -> RowSettings:
        """How `row` is read: `settings`, with what its data set says otherwise."""
        if not isinstance(self.records, Mixture):
            return self.settings
        return self.settings.of(self.records.source_of(row))

    def source_name(self, row: int) -> str:
        """Name of the data set that `row` belongs to."""
        return self.records.source_of(row).name if isinstance(self.records, Mixture) else self.name

    def source_sizes(self) -> dict[str, int]:
        """Rows of each data set."""
        if isinstance(self.records, Mixture):
            return self.records.sizes()
        return {self.name: len(self)}

    def epoch_rows(self) -> np.ndarray:
        """Rows of an epoch, int64, repeated as the mixture says, with those that cannot be used."""
        return self.records.epoch_rows(self.seed) if isinstance(self.records, Mixture) else np.arange(len(self))

    # --------------------------------------------------------------------------------------------------------- index

    def build_index(self, cache: str | Path | None = None, workers: int = 0, progress: bool = True) -> LengthIndex:
        """Measures all rows, or reads what an earlier run measured, and keeps it as `index`.

        Args:
            cache: Folder of cached indices; None: measure anew. Records that come from no file are always measured.
            workers: Processes that measure; 0 for this one.
            progress: Show a bar.
        """
        fingerprint = None if cache is None else self.fingerprint()
        if cache is None or fingerprint is None:
            self.index = measure_all(self, workers, progress)
        else:
            self.index = load_or_measure(self, Path(cache), fingerprint, workers, progress)
        return self.index

    def fingerprint(self) -> str | None:
        """Hash of all that the lengths depend on but the media themselves; None for records without a file."""
        if isinstance(self.records, (Mixture, RecordFile)):
            config = self.config
            template = (config.template, config.system_message, config.tokens_per_tile(1))
            tokenizer, tiling = tokenizer_fingerprint(self.tokenizer), self.image_processor.to_dict()
            settings = (asdict(self.settings), self.seed, self.on_error)
            return hash_of(self.records.fingerprint(), tokenizer, tiling, template, settings)
        return None
