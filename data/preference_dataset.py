"""Map-style data set of preference rows: two answers to one prompt, with the media of the row once.

It differs from `ConversationDataset` in what a row is made into and what it costs, in nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from .augmentation import Take
from .dataset import ConversationDataset
from .features import Features
from .lengths import RowLength, hash_of

__all__ = ["PreferenceDataset"]


@dataclass
class PreferenceDataset(ConversationDataset):
    """Features of preference rows, see `FeatureMaker.pair_features`, and `row`, the number of the row, an int.

    What is random in a row, frames and JPEG quality, is drawn once for both answers. `max_seq_length` holds for each
    of the two sequences; the index counts the tokens of both and the tiles once.

    Args:
        records: Any sequence of `pairs.PairRecord`s: a `Mixture` or `RecordFile` with `parse=parse_pair`, a list.

    The other arguments and the errors are those of `ConversationDataset`.
    """

    def _features(self, row: int, take: Take) -> Features:
        return {**self.maker.pair_features(self.records[row], self.settings_of(row), take), "row": row}

    def _measure(self, row: int, take: Take) -> RowLength:
        return self.maker.measure_pair(self.records[row], self.settings_of(row), take)

    def _tokens(self, features: Features) -> int:
        return len(features["chosen_input_ids"]) + len(features["rejected_input_ids"])

    def fingerprint(self) -> str | None:
        """As of `ConversationDataset`, and never the same as one of it."""
        fingerprint = super().fingerprint()
        return None if fingerprint is None else hash_of(fingerprint, "pairs")
