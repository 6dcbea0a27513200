"""`internvl estimate`: the memory that a training run will need, printed as a table or as JSON.

The command only reads arguments and prints; the work is done by `training.estimate`. What a recipe can say is said as
in `internvl train`, by `key=value`; options are for what it cannot: the batch, the devices, the output.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .commands import run_command

if TYPE_CHECKING:
    from ..training.estimate import MemoryEstimate

# Modules that load torch are imported where they are needed, so that help and errors come at once.

_GIB = 2**30
_EPILOG = """\
examples:
  internvl estimate InternVL3-8B --devices 8 --sharding zero2 --memory 80
  internvl estimate internvl3/8b_mpo --devices 8 --sharding zero3 --memory 80
  internvl estimate internvl3/8b_2nd_lora training.use_llm_lora=64 model.quantization=nf4 --memory 24
  internvl estimate my-model training.freeze_backbone=true --tokens 8192 --tiles 24 --json

Without a recipe, everything is trained under bf16 and gradient checkpointing, one row at a time. The exit code is 0,
or 1 if the run does not fit into --memory or cannot be estimated.
"""


def estimate_main(argv: Sequence[str]) -> int:
    """Prints an estimate; returns 0, or 1 if the run does not fit into `--memory` or cannot be estimated."""
    return run_command(_estimate, _parser(), argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="internvl estimate",
        description="estimate the memory that a training run will need on each device, before it runs",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", help="recipe, release, checkpoint folder or Hub repository")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for internvl train")
    parser.add_argument("--model", metavar="NAME", help="of a recipe: take this release or folder as its model")
    parser.add_argument("--tokens", type=int, metavar="N", help="of a row or pack (default: the most it may have)")
    parser.add_argument("--tiles", type=int, metavar="N", help="of a row or pack, 0: text alone (default: the most)")
    parser.add_argument("--supervised", type=int, metavar="N", help="tokens of a row with a label (default: all text)")
    parser.add_argument("--devices", type=int, metavar="N", help="data-parallel devices (default: 1)")
    parser.add_argument("--sharding", metavar="KIND", help="ddp (default), zero1, zero2, zero3 or fsdp")
    parser.add_argument("--memory", type=float, metavar="GIB", help="of a device: says whether it fits, or what helps")
    parser.add_argument("--overhead", type=float, metavar="GIB", help="CUDA context, libraries (default: 1, assumed)")
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes")
    return parser


def _estimate(options: argparse.Namespace) -> int:
    if options.memory is not None and not options.memory > 0:
        raise ValueError(f"--memory must be above 0 GiB, got {options.memory:g}")
    if options.overhead is not None and not options.overhead >= 0:
        raise ValueError(f"--overhead must not be negative, got {options.overhead:g}")
    from ..training.estimate import OVERHEAD, estimate
    from ..training.memory_advice import suggestions
    from ..training.memory_sources import resolve

    given = {name: getattr(options, name) for name in ("tokens", "tiles", "supervised", "devices", "sharding")}
    changes = {name: value for name, value in given.items() if value is not None}
    config, settings = resolve(options.source, options.overrides, options.model, **changes)
    overhead = OVERHEAD if options.overhead is None else round(options.overhead * _GIB)
    memory = None if options.memory is None else round(options.memory * _GIB)
    result = estimate(config, settings, overhead)
    fits = memory is None or result.total <= memory
    found = [] if fits else suggestions(config, settings, overhead)
    if options.json:
        print(json.dumps(_as_json(result, memory, found), indent=2))
    else:
        print(_table(options.source, result, memory, found))
    return 0 if fits else 1


def _as_json(
    result: MemoryEstimate, memory: int | None, found: Sequence[tuple[str, MemoryEstimate]]
) -> dict[str, Any]:
    content = result.to_dict()
    if memory is not None:
        content |= {"memory": memory, "verdict": result.verdict(memory)}
        content["suggestions"] = [{"change": label, **other.to_dict()} for label, other in found]
    return content


def _table(
    source: str, result: MemoryEstimate, memory: int | None, found: Sequence[tuple[str, MemoryEstimate]]
) -> str:
    lines = [*_headline(source, result), ""]
    lines += [_line(label, size) for label, size in result.rows()]
    lines += ["", _line(f"tensors, at most (in the {result.moment})", result.peak)]
    lines += [_line("overhead (assumed)", result.overhead), _line("total", result.total)]
    if memory is not None:
        lines += ["", f"{result.verdict(memory)}: {memory / _GIB:g} GiB a device"]
        lines += ["", "What would help, each by itself:"] if found else []
        lines += [_line(label, other.total, f"  {other.verdict(memory)}") for label, other in found]
    return "\n".join(lines)


def _headline(source: str, result: MemoryEstimate) -> list[str]:
    """What was estimated, in two lines."""
    settings = result.settings
    place = f"each of {settings.devices} devices, {settings.kind}" if settings.devices > 1 else "one device"
    rows = f"{settings.rows} rows of " if settings.rows > 1 else "a pack of " if settings.packing else ""
    if settings.pairs:
        number = f"{settings.rows} pairs" if settings.rows > 1 else "a pair"
        rows = "a pack of pairs of " if settings.packing else f"{number} of answers, each sequence "
    precision = f"mixed precision {settings.mixed_precision or 'off'}"
    checkpointing = f"checkpointing {'on' if settings.gradient_checkpointing else 'off'}"
    return [
        f"{source} on {place}: {rows}{settings.tokens} tokens, {settings.tiles} tiles",
        f"{settings.dtype} weights, {precision}, {checkpointing}, "
        f"attention {settings.attn_implementation or 'as the model chooses'}, {settings.optim}",
    ]


def _line(label: str, size: int, more: str = "") -> str:
    return f"{label:<48}{size / _GIB:>10.2f} GiB{more}"
