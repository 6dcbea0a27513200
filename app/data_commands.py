"""`internvl validate` and `internvl preview`: looking at training data before any device is used.

The commands only read arguments and print; the work is done by `data.validate` and `data.preview`.
"""

from __future__ import annotations

import argparse
import re
import sys
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import run_command

if TYPE_CHECKING:
    from ..data.mixture import Mixture

# Modules that load torch are imported by the command that needs them, so that help and errors come at once.


def validate_main(argv: Sequence[str]) -> int:
    """Checks data; returns 0, or 1 if there are errors or the data cannot be opened."""
    return run_command(_validate, _validate_parser(), argv)


def preview_main(argv: Sequence[str]) -> int:
    """Shows rows; returns 0, or 1 if one of them cannot be used or the data cannot be opened."""
    return run_command(_preview, _preview_parser(), argv)


def _parser(name: str, description: str, *examples: str) -> argparse.ArgumentParser:
    shown = "examples:\n" + "\n".join(f"  internvl {name} {example}" for example in examples)
    return argparse.ArgumentParser(
        prog=f"internvl {name}",
        description=description,
        epilog=shown,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


# ------------------------------------------------------------------------------------------------------------ validate


def _validate_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "validate",
        "look for problems in training data: every row, its media, its length",
        "train.jsonl --images images",
        "meta.json --model OpenGVLab/InternVL3-1B --max-seq-length 8192 --report problems.jsonl",
        "internvl3/8b_2nd_full data.meta_path=meta.json --decode --workers 8",
    )
    _add_inputs(parser)
    parser.add_argument("--max-seq-length", type=int, metavar="N", help="most tokens of a row (default: the recipe's)")
    parser.add_argument("--no-lengths", action="store_true", help="do not load the model's files; lengths unchecked")
    parser.add_argument("--decode", action="store_true", help="decode pictures and frames instead of reading headers")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one alone)")
    parser.add_argument("--report", type=Path, metavar="FILE.jsonl", help="write every problem with its row")
    parser.add_argument("--examples", type=int, default=3, metavar="N", help="to print for each check (default: 3)")
    return parser


def _validate(options: argparse.Namespace) -> int:
    from dataclasses import replace

    from ..data.validate import validate
    from .data_inputs import DataInputError, load_maker, read_inputs

    inputs = read_inputs(options)
    limits = inputs.limits
    if options.max_seq_length is not None:
        if inputs.model is None or options.no_lengths:
            raise DataInputError("--max-seq-length needs a tokenizer; name a checkpoint with --model, no --no-lengths")
        limits = replace(limits, max_seq_length=options.max_seq_length)
    measured = inputs.model is not None and not options.no_lengths
    report = validate(
        inputs.data,
        load_maker(inputs.model) if inputs.model is not None and measured else None,
        limits,
        parse=inputs.parse,
        decode=options.decode,
        workers=options.workers,
        report=options.report,
        examples=options.examples,
        progress=True,
    )
    if measured and limits.max_seq_length is None:
        report.notes.append("rows of any length passed: neither the recipe nor --max-seq-length sets a limit")
    print(report.summary())
    if options.report is not None:
        print(f"\nevery problem with its row: {options.report}")
    return 0 if report.is_ok else 1


# ------------------------------------------------------------------------------------------------------------- preview


def _preview_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "preview",
        "show rows of training data as the model will see them: text, what is learned, tiles",
        "train.jsonl --images images --model checkpoints/internvl-tiny",
        "meta.json --model OpenGVLab/InternVL3-1B --row train.jsonl:12",
        "internvl3/8b_2nd_full data.meta_path=meta.json --random 5 --seed 1 --output preview",
    )
    _add_inputs(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="N", help="number over all data sets from 0, or FILE:LINE as validate prints")
    which.add_argument("--random", type=int, metavar="K", help="so many different rows")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of --random (default: 0)")
    parser.add_argument("--output", type=Path, default=Path("preview"), metavar="FOLDER", help="(default: preview)")
    parser.add_argument("--color", choices=("auto", "always", "never"), default="auto", help="(default: auto)")
    return parser


def _preview(options: argparse.Namespace) -> int:
    from ..data.mixture import Mixture, load_sources
    from .data_inputs import DataInputError, load_maker, read_inputs

    inputs = read_inputs(options)
    if inputs.model is None:
        raise DataInputError("a preview needs a tokenizer and a template; name a checkpoint with --model")
    mixture = Mixture(load_sources(inputs.data), inputs.parse)
    rows = _chosen_rows(options, mixture)
    maker = load_maker(inputs.model)
    color = options.color == "always" or (options.color == "auto" and sys.stdout.isatty())
    done = [_show(row, mixture, maker, inputs, options.output, color) for row in rows]
    return 0 if all(done) else 1


def _show(row: int, mixture: Mixture, maker: Any, inputs: Any, folder: Path, color: bool) -> bool:
    """Prints a row and writes its picture; False, after a line on stderr, if it cannot be used."""
    from ..data.augmentation import Take
    from ..data.preview_picture import draw_preview
    from ..data.records import RecordError

    source = mixture.source_of(row)
    try:
        record = mixture.record(row)
        preview, text = _read(record, maker, inputs, inputs.settings.of(source), Take(inputs.limits.seed, row), color)
    except RecordError as error:
        print(f"internvl preview: row {row} of data set {source.name!r}: {error}", file=sys.stderr)
        return False
    print(f"row {row}, data set {source.name!r}, {record.where}\n\n{text}")
    limit = inputs.limits.max_seq_length
    if limit is not None and preview.tokens > limit:
        print(f"too long for max_seq_length={limit}: training leaves this row out")
    picture = draw_preview(preview, maker.image_processor)
    if picture is not None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"row{row}.png"
        picture.save(path)
        print(f"picture  {path}")
    print()
    return True


def _read(record: Any, maker: Any, inputs: Any, settings: Any, take: Any, color: bool) -> tuple[Any, str]:
    """The preview of a row of either kind, and its text."""
    from ..data.pair_preview import make_pair_preview, render_pair
    from ..data.pairs import PairRecord
    from ..data.preview import make_preview, render

    if isinstance(record, PairRecord):
        pair = make_pair_preview(maker, record, settings, take)
        return pair, render_pair(pair, color)
    preview = make_preview(maker, record, settings, take)
    return preview, render(preview, inputs.loss_reduction, color)


def _chosen_rows(options: argparse.Namespace, mixture: Mixture) -> list[int]:
    if options.random is not None:
        import numpy as np

        if not 1 <= options.random <= len(mixture):
            raise ValueError(f"--random must be between 1 and the {len(mixture)} rows, got {options.random}")
        drawn = np.random.default_rng(options.seed).choice(len(mixture), options.random, replace=False)
        return [int(row) for row in drawn]
    text = options.row or "0"
    row = int(text) if text.isdecimal() else _find_row(text, mixture)
    if not 0 <= row < len(mixture):
        raise ValueError(f"--row must be between 0 and {len(mixture) - 1}, got {row}")
    return [row]


def _find_row(text: str, mixture: Mixture) -> int:
    """The row at `file.jsonl:12` or `file.json[11]`; the file may be given by the end of its path."""
    match = re.fullmatch(r"(.+\.jsonl):(\d+)|(.+\.json)\[(\d+)\]", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"--row must be a number, FILE.jsonl:LINE or FILE.json[INDEX], got {text!r}")
    name, line = match[1] or match[3], int(match[2]) if match[2] else int(match[4]) + 1
    start = 0
    for file in mixture.files:
        if file is not None and Path(file.path).parts[-len(Path(name).parts) :] == Path(name).parts:
            place = bisect_left(range(len(file)), line, key=file.annotations.line)
            if place < len(file) and file.annotations.line(place) == line:
                return start + place
        start += 0 if file is None else len(file)
    raise ValueError(f"--row {text!r}: no data set has such a row; blank lines are none")


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="recipe (file or name of a bundled one), meta json, or annotation file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of a recipe, as for internvl train")
    parser.add_argument("--images", metavar="FOLDER", help="folder of an annotation file's media")
    parser.add_argument("--model", metavar="CHECKPOINT", help="folder or Hub repository; weights are not read")
