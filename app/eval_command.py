"""`internvl eval`: reads its arguments, calls `evaluation.runner` and prints the report."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from .commands import run_command
from .engine_options import add_engine_options, make_engine, parse_shard

if TYPE_CHECKING:
    from ..evaluation.engines import Sampling
    from ..evaluation.presets import Preset
    from ..evaluation.questions import Question

# Modules that load torch are imported where they are needed, so that help and errors come at once.

_EPILOG = """\
examples:
  internvl eval OpenGVLab/InternVL3-8B docvqa_val.jsonl --preset docvqa --images images
  internvl eval OpenGVLab/InternVL3-8B mmmu_val.jsonl --preset mmmu --cot boxed --samples 8 --temperature 0.7
  internvl eval auto chartqa.jsonl --preset chartqa --server http://localhost:8000/v1 --batch-size 64
  internvl eval my-model questions.jsonl --shard 0/4 --output results
  internvl eval --list

Run the same command again to go on after an interruption; questions are not asked twice. Shards share the output
folder, and the one that ends last writes the report. The exit code is 0 if a report was written, or a shard is done
and others are not.
"""
_STYLES = ("final_answer", "boxed", "think")


def eval_main(argv: Sequence[str]) -> int:
    """Evaluates; returns 0, or 1 after an error that the user can mend."""
    return run_command(_evaluate, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl eval",
        description="ask a model the questions of a file and score its answers",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", nargs="?", help="folder or Hub repository; with --server, the name there, or 'auto'")
    parser.add_argument("data", nargs="?", help="questions with their answers (.jsonl, .json)")
    parser.add_argument("--preset", default="plain", metavar="NAME", help="of a benchmark (default: plain)")
    parser.add_argument("--list", action="store_true", help="print the presets")
    parser.add_argument("--images", default="", metavar="FOLDER", help="folder that paths in the data are relative to")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="(default: eval_results/MODEL/PRESET-DATA)")
    parser.add_argument(
        "--all-turns", action="store_true", help="every question of a conversation, not only the first"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument("--metric", metavar="NAME", help="judge by another rule than the preset's")
    parser.add_argument("--report-only", action="store_true", help="ask nothing; score the answers that are there")
    _add_asking(parser.add_argument_group("how it is asked"))
    add_engine_options(parser.add_argument_group("where it runs"))
    return parser


def _add_asking(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--cot", choices=_STYLES, help="ask for reasoning, and read the answer out of it")
    group.add_argument(
        "--samples", type=int, default=1, metavar="N", help="answers of a question; the majority counts"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="(default: 0, greedy; 0.7 with --samples)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="(default: 1)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="(default: 0, all tokens)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of samples (default: 0)")
    group.add_argument("--max-new-tokens", type=int, metavar="N", help="(default: the preset's)")
    group.add_argument("--max-tiles", type=int, metavar="N", help="of a question's images (default: the preset's)")
    group.add_argument("--num-frames", type=int, metavar="N", help="of a video (default: the preset's)")
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="questions at once (default: 8)")
    group.add_argument(
        "--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="ask only this part: 0/4 to 3/4"
    )
    group.add_argument("--retry-failures", action="store_true", help="ask again what failed")


def _evaluate(options: argparse.Namespace) -> int:
    from ..evaluation.presets import find_preset
    from ..evaluation.scoring import SCORERS

    if options.list:
        return _print_presets()
    if options.model is None or options.data is None:
        raise ValueError("name a model and a data file; --list prints the presets")
    if options.metric not in (None, *SCORERS):
        raise ValueError(f"no metric {options.metric!r}; there are {', '.join(sorted(SCORERS))}")
    preset = _changed(find_preset(options.preset), options)
    questions = _questions(options)
    folder = options.output or _folder(options)
    if options.report_only:
        return _report(questions, folder, options.metric, None)
    sampling = _sampling(options, preset)
    start = time.monotonic()
    missing = _ask(questions, preset, sampling, folder, options)
    if missing and options.shard[1] > 1:
        shard = "/".join(map(str, options.shard))
        print(f"shard {shard} is done; {missing:,} questions wait for other shards, the last of which reports")
        return 0
    return _report(questions, folder, options.metric, time.monotonic() - start)


def _questions(options: argparse.Namespace) -> list[Question]:
    from ..evaluation.questions import read_questions

    if options.limit is not None and options.limit < 1:
        raise ValueError(f"--limit must be at least 1, got {options.limit}")
    return read_questions(options.data, options.images, options.all_turns)[: options.limit]


def _changed(preset: Preset, options: argparse.Namespace) -> Preset:
    """The preset with what the command line says otherwise."""
    from ..evaluation.presets import REASONING_TOKENS

    changes = {
        name: value
        for name in ("max_new_tokens", "max_tiles", "num_frames")
        if (value := getattr(options, name)) is not None
    }
    if options.max_tiles is not None:
        changes["tiles_per_image"] = None
    if options.cot is not None:
        changes = {"style": options.cot, "max_new_tokens": REASONING_TOKENS, **changes}
    return replace(preset, **changes)


def _sampling(options: argparse.Namespace, preset: Preset) -> Sampling:
    from ..evaluation.engines import Sampling

    temperature = options.temperature
    if temperature is None:
        temperature = 0.7 if options.samples > 1 else 0.0
    more = {"top_p": options.top_p, "top_k": options.top_k, "seed": options.seed}
    return Sampling(options.samples, temperature, max_new_tokens=preset.max_new_tokens, **more)


def _folder(options: argparse.Namespace) -> Path:
    name = Path(options.model.rstrip("/")).name
    return Path("eval_results", name, f"{options.preset}-{Path(options.data).stem}")


def _ask(
    questions: Sequence[Question], preset: Preset, sampling: Sampling, folder: Path, options: argparse.Namespace
) -> int:
    """Asks this shard's questions; returns how many of all have no entry yet."""
    from ..evaluation.answer_store import read_entries
    from ..evaluation.runner import ask

    engine, details = make_engine(options, preset.num_frames, preset.exif)
    shard, shards = options.shard
    ask(
        questions, engine, preset, sampling, folder, batch_size=options.batch_size, shard=shard, shards=shards,
        retry_failures=options.retry_failures, **details,
    )  # fmt: skip
    return len(questions) - len(read_entries(folder))


def _report(questions: Sequence[Question], folder: Path, metric: str | None, seconds: float | None) -> int:
    from ..evaluation.report import render
    from ..evaluation.runner import score_folder

    report = score_folder(questions, folder, metric, seconds=seconds)
    report.write(folder)
    print(render(report.content))
    print(f"written: {folder / 'report.json'}, report.md, marks.jsonl")
    return 0


def _print_presets() -> int:
    from ..evaluation.presets import PRESETS

    for preset in PRESETS.values():
        tiles = "the checkpoint's" if preset.max_tiles is None else preset.max_tiles
        print(f"{preset.name:12} {preset.title}: {preset.metric}, {tiles} tiles, {preset.max_new_tokens} tokens")
        if preset.note:
            print(f"{'':12} {preset.note}", file=sys.stdout)
    return 0
