"""`internvl pairs`: preference pairs from a model's own answers, printed as statistics, with an exit code that tells.

The commands only read arguments and print; the work is done by `preference`, and the files are checked by
`data.validate`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .commands import run_command
from .engine_options import add_engine_options, make_engine, parse_shard

if TYPE_CHECKING:
    from ..evaluation.engines import Engine
    from ..preference.pairing import PairingResult
    from ..preference.question_sources import QuestionSource
    from ..preference.sampling import SamplingPlan

# Modules that load torch are imported where they are needed, so that help and errors come at once.

_EPILOG = """\
examples:
  internvl pairs correctness OpenGVLab/InternVL3-8B chartqa.jsonl --images images --task relaxed --output pairs
  internvl pairs correctness OpenGVLab/InternVL3-8B meta.json --output pairs --shard 0/4
  internvl pairs correctness InternVL3-8B meta.json --server http://localhost:8000/v1 --output pairs
  internvl pairs dropout OpenGVLab/InternVL3-8B captions.jsonl --images images --output pairs

Run the same command again to go on after an interruption, or to pair the stored answers with other caps. Of shards,
the one that ends last writes the pairs. The exit code is 0 if pairs were written and the check of their rows found no
errors, or if a shard is done and others are not; else 1.
"""
_STYLES = ("final_answer", "boxed", "think", "direct")


def pairs_main(argv: Sequence[str]) -> int:
    """Makes pairs; returns 0, or 1 if there are none, if a row of them is wrong, or if they cannot be made."""
    return run_command(_pairs, _parser(), argv)


# ----------------------------------------------------------------------------------------------------------- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl pairs",
        description="make preference pairs, for MPO, from a model's own answers",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", choices=("correctness", "dropout"), help="right and wrong answers, or DropoutNTP")
    parser.add_argument("model", help="folder or Hub repository; with --server, the name of the model there")
    parser.add_argument("data", nargs="+", help="annotation files (.jsonl, .json) and meta files")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="answers, pairs and statistics")
    parser.add_argument("--images", metavar="FOLDER", help="folder of the annotation files' media")
    parser.add_argument("--all-turns", action="store_true", help="every question of a conversation")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions of each data set")
    _add_sampling(parser.add_argument_group("sampling"))
    add_engine_options(parser.add_argument_group("where it runs"))
    pairing = parser.add_argument_group("pairs of correctness")
    pairing.add_argument(
        "--task", metavar="NAME", help="how answers are judged (default: as the row or the data set's name says)"
    )
    pairing.add_argument("--max-pairs", type=int, metavar="N", help="of a question (default: 15; 3 above 500k lines)")
    pairing.add_argument("--max-format-pairs", type=int, metavar="N", help="of a question (default: as --max-pairs)")
    pairing.add_argument("--workers", type=int, metavar="N", help="processes that judge (default: this one)")
    dropout = parser.add_argument_group("pairs of dropout")
    dropout.add_argument("--from-answers", action="store_true", help="the data's answers are the chosen ones")
    dropout.add_argument("--keep-cut", action="store_true", help="keep continuations that were cut at the limit")
    return parser


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--style", choices=_STYLES, help="of the prompt (default: final_answer; direct for dropout)")
    group.add_argument("--samples", type=int, metavar="N", help="answers of a question (default: 32; 1 for dropout)")
    group.add_argument("--temperature", type=float, default=0.7, metavar="T", help="(default: 0.7)")
    group.add_argument("--top-k", type=int, default=50, metavar="K", help="(default: 50; 0 for all tokens)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: 1)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: 4096; 2048 for dropout)")
    group.add_argument("--max-tiles", type=int, metavar="N", help="of an image (default: the meta file's or model's)")
    group.add_argument("--num-frames", type=int, default=16, metavar="N", help="of a video (default: 16)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of samples and pairs (default: 0)")
    group.add_argument("--batch-size", type=int, metavar="N", help="questions at once (default: 8; 128 with --server)")
    group.add_argument("--shard", type=parse_shard, metavar="I/N", help="ask only this part: 0/4 to 3/4")
    group.add_argument("--retry-failures", action="store_true", help="ask again what failed")


# ------------------------------------------------------------------------------------------------------------- running


def _pairs(options: argparse.Namespace) -> int:
    _check(options)
    options.batch_size = _given(options.batch_size, 8 if options.server is None else 128)
    from ..preference.question_sources import read_sources

    sources = read_sources(options.data, options.images, options.all_turns, options.limit)
    plan = _plan(options, sources)
    result = _run(options, sources, plan)
    if result.missing:
        return _say_missing(options, result.missing)
    return _report(result)


def _check(options: argparse.Namespace) -> None:
    """Refuses options of the other pipeline, which would have no effect."""
    others = {
        "correctness": ("from_answers", "keep_cut"),
        "dropout": ("task", "max_pairs", "max_format_pairs", "workers"),
    }[options.pipeline]
    for name in others:
        value = getattr(options, name)
        if value is not None and value is not False:
            raise ValueError(f"--{name.replace('_', '-')} is not an option of {options.pipeline} pairs; leave it out")
    if options.pipeline == "dropout" and options.samples not in (None, 1):
        raise ValueError(f"dropout pairs take one answer of each question, got --samples {options.samples}")
    if options.model == "auto":
        raise ValueError("name the model: stored answers of different models must not be mixed")


def _plan(options: argparse.Namespace, sources: Sequence[QuestionSource]) -> SamplingPlan:
    from ..evaluation.engines import Sampling
    from ..preference.sampling import LazyEngine, SamplingPlan

    is_dropout = options.pipeline == "dropout"
    sampling = Sampling(
        n=_given(options.samples, 1 if is_dropout else 32),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        max_new_tokens=_given(options.max_new_tokens, 2048 if is_dropout else 4096),
        seed=options.seed,
    )
    exif = {source.source.exif for source in sources}
    if len(exif) > 1:
        raise ValueError("some data sets set exif to false and others do not; give them in two runs, one folder each")
    upright = exif.pop()
    return SamplingPlan(
        options.output,
        LazyEngine(options.model.rstrip("/"), lambda: _engine(options, upright)),
        sampling,
        style=options.style or ("direct" if is_dropout else "final_answer"),
        batch_size=options.batch_size,
        details=_details(options, upright),
        max_tiles=options.max_tiles,
        shard=options.shard,
        retry_failures=options.retry_failures,
        progress=sys.stderr.isatty(),
    )


def _given(value: int | None, default: int) -> int:
    return default if value is None else value


def _details(options: argparse.Namespace, exif: bool) -> dict[str, Any]:
    """What answers depend on beside the plan, as far as it is known without loading the model."""
    from .engine_options import weights_digest

    details = {"exif": exif, "num_frames": options.num_frames}
    if options.server is not None:
        return {"backend": "server", **details}
    folder = Path(options.model)
    return {"backend": "local", "weights": weights_digest(folder) if folder.is_dir() else None, **details}


def _engine(options: argparse.Namespace, exif: bool) -> Engine:
    """The engine; markup stays in the answers, which are learned as they are."""
    from ..evaluation.local_engine import LocalEngine

    engine, _ = make_engine(options, options.num_frames, exif)
    if isinstance(engine, LocalEngine):
        engine.keep_markup = True
    return engine


def _run(options: argparse.Namespace, sources: Sequence[QuestionSource], plan: SamplingPlan) -> PairingResult:
    if options.pipeline == "dropout":
        from ..preference.dropout_pipeline import make_dropout_pairs

        return make_dropout_pairs(sources, plan, options.from_answers, options.keep_cut)
    from ..preference.correctness import Caps
    from ..preference.correctness_pipeline import make_correctness_pairs

    most_format = options.max_pairs if options.max_format_pairs is None else options.max_format_pairs
    return make_correctness_pairs(
        sources, plan, options.task, Caps(options.max_pairs, most_format), options.workers or 0
    )


# ------------------------------------------------------------------------------------------------------------ printing


def _say_missing(options: argparse.Namespace, missing: int) -> int:
    """What is still to be done by others; an error where nothing was asked at all."""
    print(f"{missing:,} questions have no entry in {options.output / 'answers'} yet")
    if options.shard is None:
        raise ValueError("shards have been asked that are not complete; go on with each: --shard I/N")
    print(f"shard {options.shard[0]}/{options.shard[1]} is done; the one that ends last writes the pairs")
    return 0


def _report(result: PairingResult) -> int:
    from ..preference.statistics import render_statistics

    print(render_statistics(result.statistics))
    if not result.files:
        print("internvl pairs: no pairs came out; the lines above say why", file=sys.stderr)
        return 1
    report = _validate(result)
    print(f"\n{report.summary()}\n\nmeta file  {result.meta}")
    return 0 if report.is_ok else 1


def _validate(result: PairingResult) -> Any:
    """Checks what was written as `internvl validate` does."""
    from ..data.validate import validate
    from ..training.arguments import DataArguments

    paths = [str(path) for path in result.files.values()]
    roots: list[str | None] = [result.entries[name]["root"] for name in result.files]
    exif = all(entry.get("exif", True) for entry in result.entries.values())
    data = DataArguments(data_paths=paths, image_folders=roots, exif=exif)
    return validate(data, progress=sys.stderr.isatty())
