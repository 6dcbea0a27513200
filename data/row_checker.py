"""Checks one row at a time: is it read, are its media there, is it short enough? `validate` goes through all of them.

What is looked for is in `checks`, `media_checks` and `features`; here is the order, and which of them a row needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ..tiling_internvl import MAX_PIXELS
from .augmentation import Take
from .checks import CHECKS, Problem, check_text, explain_refusal, hash_record
from .features import FeatureMaker, SequenceTooLongError
from .lengths import RowLength
from .media import RowSettings, count_frames
from .media_checks import check_pictures, check_videos, explain_unusable
from .mixture import Mixture
from .pairs import PairRecord
from .records import Record, RecordError


@dataclass(frozen=True)
class Limits:
    """What a row may cost, and the draw of its frames; see `InternVLTrainingArguments`.

    Attributes:
        max_seq_length: Most tokens of a row, visual ones included; None for no limit.
        max_tiles: Most tiles of a row; None for no limit. Packing has one.
        seed: Of the run; a row's number of frames depends on it.
    """

    max_seq_length: int | None = None
    max_tiles: int | None = None
    seed: int = 42


class CheckedRow(NamedTuple):
    """What `RowChecker.check` found.

    Attributes:
        problems: In the order of the checks.
        content: Hash of the row's content; None if it cannot be read.
        is_pair: Whether it is a preference row that can be read.
    """

    problems: list[Problem]
    content: int | None = None
    is_pair: bool = False


@dataclass(frozen=True)
class RowChecker:
    """Checks single rows.

    Args:
        mixture: The data sets; what it parses rows with decides which kinds of rows are accepted.
        settings: How rows are read; data sets may say otherwise for theirs.
        limits: What a row may cost.
        maker: Measures rows with a checkpoint's tokenizer and processor; None: lengths are not checked.
        decode: Decode pictures and frames instead of reading headers.
    """

    mixture: Mixture
    settings: RowSettings
    limits: Limits = Limits()
    maker: FeatureMaker | None = None
    decode: bool = False

    def check(self, row: int) -> CheckedRow:
        """Problems of a row and what it is."""
        source, place = self.mixture.locate(row)
        file = self.mixture.files[source]
        assert file is not None  # a source that is off has no rows to locate
        try:
            record = file[place]
        except RecordError as error:
            return CheckedRow([explain_refusal(error)])
        settings = self.settings.of(self.mixture.sources[source])
        take = Take(self.limits.seed, row)
        problems = [*check_text(record), *self._check_media(record, settings, take)]
        return CheckedRow(problems, hash_record(record), isinstance(record, PairRecord))

    def _check_media(self, row: Record | PairRecord, settings: RowSettings, take: Take) -> list[Problem]:
        """Media first: a row with a bad picture has no length."""
        record = row if isinstance(row, Record) else row.chosen
        most = MAX_PIXELS
        if self.maker is not None and self.maker.image_processor.max_pixels is not None:
            most = min(most, self.maker.image_processor.max_pixels)
        problems = list(check_pictures(record, settings.exif, self.decode, most))
        problems += check_videos(record, settings, take, self.decode and not problems)
        if not any(CHECKS[problem.check].is_left_out for problem in problems):
            problems += self._check_length(row, settings, take)
        return problems

    def _check_length(self, row: Record | PairRecord, settings: RowSettings, take: Take) -> Iterator[Problem]:
        record = row if isinstance(row, Record) else row.chosen
        try:
            length = self._measure(row, settings, take)
        except SequenceTooLongError as error:
            yield Problem("too-long", error.problem)
            return
        except RecordError as error:
            yield explain_unusable(record, error)
            return
        if length is None:
            return
        if not length.supervised:
            yield Problem("unsupervised", f"none of its {length.tokens} tokens is learned")
        if self.limits.max_tiles is not None and length.tiles > self.limits.max_tiles:
            yield Problem("too-long", f"{length.tiles} tiles exceed num_images_expected={self.limits.max_tiles}")

    def _measure(self, row: Record | PairRecord, settings: RowSettings, take: Take) -> RowLength | None:
        """What a row costs; None without a `maker`, but its videos are looked at."""
        if self.maker is None:
            count_frames(row if isinstance(row, Record) else row.chosen, settings, take)
            return None
        if isinstance(row, PairRecord):
            return self.maker.measure_pair(row, settings, take)
        return self.maker.measure(row, settings, take)
