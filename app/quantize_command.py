"""`internvl quantize`: reads its arguments, calls `conversion.compression.compress` and prints its report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from .commands import run_command

# Modules that load torch are imported where they are needed, so that help and errors come at once.

METHODS = ("fp8", "int8", "gptq", "awq")
_EPILOG = """\
examples:
  internvl quantize OpenGVLab/InternVL3-8B internvl3-8b-fp8 --method fp8
  internvl quantize my-model my-model-awq --method awq --data train.jsonl --images images
  internvl quantize my-model my-model-int8 --method int8 --data train.jsonl --images images --samples 512

methods:
  fp8   weights and activations in 8-bit floats; needs no data
  int8  weights and activations in 8-bit integers (W8A8)
  gptq  weights in 4-bit integers (W4A16)
  awq   weights in 4-bit integers (W4A16), the channels that matter scaled first

Vision encoder, projector and output head stay as they are. The data are rows as for training: take pictures and
questions of the kind that the model will see. Needs llm-compressor, which wants transformers <= 5.17.
"""


def quantize_main(argv: Sequence[str]) -> int:
    """Compresses; returns 0, or 1 after an error that the user can mend."""
    return run_command(_quantize, build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Options of `internvl quantize`."""
    parser = argparse.ArgumentParser(
        prog="internvl quantize",
        description="write a compressed copy of a checkpoint, for vLLM, SGLang, LMDeploy and transformers",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="folder or Hub repository (organisation/name); never changed")
    parser.add_argument("target", type=Path, help="folder to write; must be absent or empty")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier call wrote there")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN",
        help="keep these layers too: a whole name, or re: and a regular expression; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--group-size", type=int, default=128, metavar="N",
        help="inputs that share a scale, for gptq and awq; -1: all of an output channel (default: 128)",
    )  # fmt: skip
    data = parser.add_argument_group("calibration")
    data.add_argument("--data", metavar="FILE", help="conversations as for training (.jsonl, .json)")
    data.add_argument("--images", metavar="FOLDER", help="folder that paths in the data are relative to")
    data.add_argument("--samples", type=int, default=256, metavar="N", help="rows to use (default: 256)")
    data.add_argument("--max-length", type=int, default=2048, metavar="N", help="most tokens of a row (default: 2048)")
    data.add_argument("--seed", type=int, default=0, metavar="S", help="of the draw of rows (default: 0)")
    return parser


def _quantize(options: argparse.Namespace) -> int:
    from ..conversion.compression.compress import compress

    report = compress(
        options.source, options.target, options.method, rows=options.data, images=options.images,
        samples=options.samples, max_length=options.max_length, group_size=options.group_size,
        ignore=options.ignore, seed=options.seed, overwrite=options.overwrite,
    )  # fmt: skip
    print(report)
    return 0
