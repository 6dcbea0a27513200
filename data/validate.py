"""Goes through every row of the data of a run and reports what is wrong with it, before any device is used.

Rows are checked in worker processes and forgotten, all but a hash: a report keeps counts and a few examples, and
writes everything else to a file. Nothing is mended or left out here; see `checks` for what is looked for.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checks import Finding, Problem, to_finding
from .features import FeatureMaker
from .media import RowSettings
from .mixture import DataSource, Mixture, load_sources
from .pairs import parse_any
from .records import RowParser
from .row_checker import Limits, RowChecker
from .validation_report import ValidationReport

if TYPE_CHECKING:
    from ..training.arguments import DataArguments

__all__ = ["Limits", "RowChecker", "find_duplicates", "validate"]

_CHUNK = 64


class _Checked(NamedTuple):
    """Rows of a chunk: 64-bit hashes, whether there is one, how many are pairs, and (place in the chunk, problem)."""

    hashes: np.ndarray
    hashed: np.ndarray
    pairs: int
    problems: list[tuple[int, Problem]]


class _Chunks(Dataset):
    """Chunks of checked rows, so that the workers of a DataLoader check them."""

    def __init__(self, checker: RowChecker) -> None:
        self.checker = checker

    def __len__(self) -> int:
        return -(-len(self.checker.mixture) // _CHUNK)

    def __getitem__(self, index: int) -> _Checked:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = range(index * _CHUNK, min((index + 1) * _CHUNK, len(self.checker.mixture)))
        hashes, hashed = np.zeros(len(rows), dtype=np.uint64), np.zeros(len(rows), dtype=bool)
        problems: list[tuple[int, Problem]] = []
        pairs = 0
        for i, row in enumerate(rows):
            found, content, is_pair = self.checker.check(row)
            problems += [(i, problem) for problem in found]
            if content is not None:
                hashes[i], hashed[i] = content, True
            pairs += is_pair
        return _Checked(hashes, hashed, pairs, problems)


def validate(
    data_arguments: DataArguments,
    maker: FeatureMaker | None = None,
    limits: Limits = Limits(),  # noqa: B008 - frozen
    *,
    parse: RowParser = parse_any,
    decode: bool = False,
    workers: int = 0,
    report: str | Path | None = None,
    examples: int = 3,
    progress: bool = False,
) -> ValidationReport:
    """Checks every row of the training and evaluation data that the arguments name.

    Rows are numbered and read as in training, so lengths are those of a run with this checkpoint, these limits and
    this seed. Data sets with `repeat_time` 0 are left out; names of evaluation data begin with `eval:`.

    Args:
        data_arguments: Which data, and how it is read.
        maker: Tokenizer, image processor and configuration of a checkpoint; None: lengths are not checked.
        limits: What a row may cost.
        parse: Which rows are accepted: conversations and preference rows, as they come; with `records.parse_record`
            only the former, with `pairs.parse_pair` only the latter, as in training with either.
        decode: Decode every picture, and the frames of videos that the first epoch takes; else only headers are read.
        workers: Processes; 0 for this one.
        report: A `.jsonl` file to write: one object per problem with `source`, `where`, `check`, `severity`,
            `message` and `row`, the row as it is in its file (text if it is not json). Duplicates come last.
        examples: Findings to keep for each data set and check.
        progress: Show a bar, if there is a terminal.

    Raises:
        DataSourceError: there is no data, or a data set cannot be opened. OSError: `report` cannot be written.
    """
    mixture = Mixture(_sources_of(data_arguments), parse)
    settings = RowSettings(
        max_seq_length=limits.max_seq_length,
        exif=data_arguments.exif,
        min_num_frame=data_arguments.min_num_frame,
        max_num_frame=data_arguments.max_num_frame,
        frame_sampling=data_arguments.frame_sampling,
    )
    checker = RowChecker(mixture, settings, limits, maker, decode)
    output = ValidationReport(mixture.sizes(), data_arguments.max_skip_share, examples=examples)
    if maker is None:
        output.notes.append("lengths were not checked: no model is named")
    output.notes += [
        f"data set {source.name!r} has repeat_time 0 and was not checked"
        for source, file in zip(mixture.sources, mixture.files, strict=True)
        if file is None
    ]
    with ExitStack() as stack:
        sink = None if report is None else stack.enter_context(Path(report).open("w", encoding="utf-8"))
        kinds: Counter[str] = Counter()
        for row, problem in _find(checker, workers, progress, kinds):
            finding = _place(mixture, row, problem)
            output.add(row, finding)
            if sink is not None:
                sink.write(json.dumps(_line(mixture, row, finding), ensure_ascii=False) + "\n")
    if len(+kinds) > 1:
        output.notes.append(
            f"{kinds['pairs']:,} are preference rows and {kinds['conversations']:,} are conversations; a run takes "
            "one kind: the former if its recipe has a 'preference' section, else the latter"
        )
    return output


def _sources_of(data_arguments: DataArguments) -> list[DataSource]:
    """Training data first, so that its rows have the numbers that they have in training."""
    evaluation = load_sources(data_arguments, evaluation=True)
    return [*load_sources(data_arguments), *(replace(source, name=f"eval:{source.name}") for source in evaluation)]


def _find(checker: RowChecker, workers: int, progress: bool, kinds: Counter[str]) -> Iterator[tuple[int, Problem]]:
    """(row, problem) in the order of rows, then those of duplicates; counts the kinds of rows that can be read."""
    rows = len(checker.mixture)
    hashes, hashed = np.zeros(rows, dtype=np.uint64), np.zeros(rows, dtype=bool)
    loader = DataLoader(_Chunks(checker), batch_size=None, num_workers=workers)
    start = 0
    with tqdm(total=rows, desc="Checking rows", unit=" rows", disable=None if progress else True) as bar:
        for chunk in loader:
            end = start + len(chunk.hashes)
            hashes[start:end], hashed[start:end] = chunk.hashes, chunk.hashed
            kinds.update(pairs=chunk.pairs, conversations=int(chunk.hashed.sum()) - chunk.pairs)
            yield from ((start + place, problem) for place, problem in chunk.problems)
            bar.update(end - start)
            start = end
    for row, first in find_duplicates(hashes, np.flatnonzero(hashed)):
        origin = _place(checker.mixture, first, Problem("duplicate", ""))
        yield row, Problem("duplicate", f"the same as {origin.where} of data set {origin.source!r}")


def find_duplicates(hashes: np.ndarray, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, first row with the same hash) for every row but the first of its kind, in the order of rows.

    Args:
        hashes: uint64 (R,).
        rows: Ascending rows whose hashes count, int64.
    """
    order = rows[np.argsort(hashes[rows], kind="stable")]
    repeats = np.concatenate([[False], hashes[order[1:]] == hashes[order[:-1]]]) if len(order) else np.zeros(0, bool)
    places = np.maximum.accumulate(np.where(repeats, 0, np.arange(len(order)))) if len(order) else repeats
    pairs = np.stack([order[repeats], order[places[repeats]]], axis=1) if repeats.any() else np.zeros((0, 2), int)
    for row, first in pairs[np.argsort(pairs[:, 0])]:
        yield int(row), int(first)


def _place(mixture: Mixture, row: int, problem: Problem) -> Finding:
    source, place = mixture.locate(row)
    file = mixture.files[source]
    assert file is not None
    return to_finding(mixture.sources[source].name, file.annotations.where(place), problem)


def _line(mixture: Mixture, row: int, finding: Finding) -> dict[str, Any]:
    """A finding with its row for the report."""
    source, place = mixture.locate(row)
    file = mixture.files[source]
    assert file is not None
    text = file.annotations.read(place)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text.decode("utf-8", errors="replace").rstrip("\r\n")
    return {**vars(finding), "row": value}
