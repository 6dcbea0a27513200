"""`internvl gguf`: whether a checkpoint can go to llama.cpp, the conversion, and the comparison of its files.

The command only reads arguments and prints; the work is done by `conversion.gguf.export` and `conversion.gguf.check`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .commands import run_command

if TYPE_CHECKING:
    from ..conversion.checks import Finding

# Modules that load torch are imported where they are needed, so that help and errors come at once.

_WIDTH = 119
_EPILOG = """\
examples:
  internvl gguf my-model
  internvl gguf my-model my-model-f16.gguf mmproj-my-model-f16.gguf
  internvl gguf my-model --converter llama.cpp/convert_hf_to_gguf.py --output gguf --reorder-positions

Without files, it says what llama.cpp cannot represent and which two commands convert the rest. With files, or after
--converter has written them, every tensor and the metadata are compared with the checkpoint. The exit code is 1 if
there is a problem.
"""


def gguf_main(argv: Sequence[str]) -> int:
    """Runs the command; returns 0, or 1 if there is a problem."""
    return run_command(_gguf, build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Options of `internvl gguf`."""
    parser = argparse.ArgumentParser(
        prog="internvl gguf",
        description="llama.cpp: can a checkpoint be exported, and do GGUF files hold it",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="folder or Hub repository")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="GGUF files to compare with it")
    parser.add_argument("--converter", type=Path, metavar="FILE", help="convert_hf_to_gguf.py of a llama.cpp")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="with --converter: convert, into this folder")
    parser.add_argument("--outtype", default="f16", help="of the conversion: f16 (default), bf16, f32 or q8_0")
    parser.add_argument(
        "--reorder-positions",
        action="store_true",
        help="with --output: write position embeddings in the order in which llama.cpp adds them (docs/gguf.md)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _gguf(options: argparse.Namespace) -> int:
    _check_options(options)
    from ..conversion.gguf.check import check_gguf
    from ..conversion.gguf.convert import command_lines
    from ..conversion.gguf.export import check_exportable

    report: dict[str, object] = {"checkpoint": options.checkpoint}
    findings = [] if options.files else check_exportable(options.checkpoint, options.converter)
    files = list(options.files)
    if not files:
        converter = options.converter or Path("convert_hf_to_gguf.py")
        commands = command_lines(options.checkpoint, converter, options.output or Path(), options.outtype)
        report["commands"] = [shlex.join(["python", *command]) for command in commands.values()]
    if options.output and not _problems(findings):
        files = _convert(options)
    if files:
        findings += check_gguf(options.checkpoint, files, progress=not options.json)
    report |= {"files": [str(file) for file in files], "healthy": not _problems(findings)}
    report["findings"] = [asdict(finding) for finding in findings]
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else _text(report, findings))
    return 1 if _problems(findings) else 0


def _check_options(options: argparse.Namespace) -> None:
    if options.files and (options.converter or options.output):
        raise ValueError("FILE and --converter exclude each other: compare files, or convert.")
    if options.output and not options.converter:
        raise ValueError("--output needs --converter, the convert_hf_to_gguf.py of a llama.cpp.")
    if options.reorder_positions and not options.output:
        raise ValueError(
            "--reorder-positions needs --converter and --output; for a file there is reorder_positions()."
        )


def _convert(options: argparse.Namespace) -> list[Path]:
    from ..conversion.gguf.convert import convert_to_gguf, reorder_positions

    text, mmproj = convert_to_gguf(options.checkpoint, options.converter, options.output, options.outtype)
    if options.reorder_positions:
        reordered = mmproj.with_suffix(".reordered")
        reorder_positions(options.checkpoint, mmproj, reordered)
        os.replace(reordered, mmproj)
    return [text, mmproj]


def _problems(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "problem" for finding in findings)


def _text(report: dict[str, object], findings: Sequence[Finding]) -> str:
    lines = [line for finding in findings for line in _lines(finding)]
    commands = report.get("commands")
    if isinstance(commands, list) and not report["files"] and report["healthy"]:
        lines += ["", "Convert it with:", *(f"  {command}" for command in commands)]
    return "\n".join(lines)


def _lines(finding: Finding) -> list[str]:
    margin = " " * 9
    lines = textwrap.wrap(f"{finding.level:<9}{finding.message}", _WIDTH, subsequent_indent=margin)
    if finding.fix:
        lines += textwrap.wrap(f"{margin}fix: {finding.fix}", _WIDTH, subsequent_indent=f"{margin}     ")
    return lines
