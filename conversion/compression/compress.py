"""Compressed checkpoints for inference engines: `compress` writes FP8, W8A8, GPTQ and AWQ through llm-compressor.

The decoder's linear layers are compressed; vision encoder, projector and output head stay as they are, to the bit.
The arithmetic is llm-compressor's and the format that of compressed-tensors, which vLLM, SGLang, LMDeploy and
transformers read; this file decides what goes in (layers, calibration rows with images) and writes a complete folder.
It does not compress mixtures of experts, nor quantize while loading (`quantization_internvl.py`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint_internvl import read_json
from ...modeling_internvl_chat import InternVLChatModel
from ...processing_internvl import InternVLProcessor
from ...upload_to_hub import MARKER
from ..convert import write_checkpoint
from ..folders import refuse_same, resolve
from ..processors import SavedProcessor
from ..source import Source, open_checkpoint, settle_context_token
from .data import CalibrationRows, choose_rows
from .plan import (
    METHODS,
    CompressionPlan,
    check_arguments,
    plan_compression,
    refuse_quantized,
    refuse_source,
)
from .run import compressed_source, run_compressor

INSTALL = (
    "compressing needs llm-compressor: pip install 'llmcompressor>=0.14,<0.15', in an environment of its own, because "
    "it wants transformers <= 5.17; newer versions load the result with compressed-tensors"
)


@dataclass(frozen=True)
class CompressionReport:
    """What was compressed.

    Attributes:
        target: The folder.
        method: Of `METHODS`.
        plan: Layers that were compressed and layers that were kept.
        calibration: The rows; None without data.
        bytes_before, bytes_after: Of all tensors.
        processor: Settings of the saved processor that were changed.
    """

    target: Path
    method: str
    plan: CompressionPlan
    calibration: CalibrationRows | None
    bytes_before: int
    bytes_after: int
    processor: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = ", ".join(f"{count} {part}" for part, count in self.plan.kept_by_part().items() if count)
        share = 100 * self.bytes_after / self.bytes_before
        lines = [
            f"{self.target}: {METHODS[self.method]}",
            f"compressed: {len(self.plan.compressed)} linear layers of the decoder; kept: {kept}",
            f"size: {_megabytes(self.bytes_before)} -> {_megabytes(self.bytes_after)} ({share:.0f} %)",
        ]
        lines += [f"calibration: {self.calibration}"] if self.calibration else []
        return "\n".join([*lines, *(f"processor: {sentence}" for sentence in self.processor)])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def compress(
    source: str | Path,
    target: str | Path,
    method: str,
    *,
    rows: str | Path | None = None,
    images: str | Path | None = None,
    samples: int = 256,
    max_length: int = 2048,
    group_size: int = 128,
    ignore: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> CompressionReport:
    """Writes a compressed copy of a checkpoint: weights, `quantization_config`, code, processor, template.

    Args:
        source: A folder or a Hub repository of any layout; never changed.
        target: Must be absent or empty; appears complete or not at all.
        method: "fp8" (FP8 by channel, dynamic activations; no data), "int8" (W8A8), "gptq" or "awq" (W4A16).
        rows: Conversations with images as for training; needed by all methods but fp8.
        images: Folder that paths in the rows are relative to.
        samples: Rows to calibrate on, drawn at random.
        max_length: Most tokens of a row, visual ones included; longer rows are left out.
        group_size: Inputs that share a scale, for gptq and awq; -1 for one scale per output channel.
        ignore: Further layers to keep: whole names, or `re:` and an expression that matches from the start of a name.
            vLLM joins query, key and value, and gate and up: keep all of a group or none.
        seed: Of the draw.
        overwrite: Replace a folder that this function, `upgrade` or `upload_to_hub` made.

    Raises:
        ValueError: arguments that contradict each other or the checkpoint; one that is quantized already, has adapters
            in its weights or is a mixture of experts.
        CheckpointError: the source is incomplete or damaged.
        RecordError: a row cannot be used.
        ImportError: llm-compressor is missing.
        FileExistsError: `target` holds something.
    """
    check_arguments(method, rows, samples, max_length, group_size)
    folder = resolve(source)
    _refuse_target(folder, target, overwrite)
    refuse_quantized(folder, read_json(folder / "config.json"))
    opened = open_checkpoint(folder)
    refuse_source(opened)
    plan = plan_compression(opened.config, method, group_size, ignore)
    processor = _processor(opened)
    drawn = {"samples": samples, "max_length": max_length, "seed": seed}
    chosen = None if rows is None else choose_rows(rows, images, processor, opened.config, **drawn)
    if importlib.util.find_spec("llmcompressor") is None:
        raise ImportError(INSTALL)
    model = InternVLChatModel.from_pretrained(folder, dtype="auto").eval()
    model.img_context_token_id = opened.config.img_context_token_id
    run_compressor(model, processor, method, group_size, plan, chosen)
    compressed = compressed_source(model, opened, plan)
    written = write_checkpoint(compressed, target, overwrite=overwrite)
    sizes = [sum(tensor.nbytes for tensor in each.tensors.values()) for each in (opened, compressed)]
    return CompressionReport(written.target, method, plan, chosen, *sizes, written.processor)


def _refuse_target(folder: Path, target: str | Path, overwrite: bool) -> None:
    """What `write_checkpoint` would find only after the work."""
    refuse_same(folder, target)
    target = Path(target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (overwrite and (target / MARKER).is_file()):
        raise FileExistsError(
            f"{target} is not empty: choose another place; overwrite replaces only what this package wrote"
        )


def _processor(source: Source) -> InternVLProcessor:
    """Tokenizer and image processor of any checkpoint; settles the id of `<IMG_CONTEXT>` in its configuration."""
    from ...training.vocabulary import load_own_tokenizer

    tokenizer = load_own_tokenizer(source.folder)
    settle_context_token(source, tokenizer)
    return SavedProcessor.open(source.folder).processor(source.config, tokenizer)
