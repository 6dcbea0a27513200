"""Whole checkpoints from one layout to another: `upgrade` to this package's form, `convert` to transformers' own.

Weights are streamed shard by shard, or linked where they can stay as they are. A target folder appears complete or not
at all. What tensors and fields become is decided in `weights_internvl.py` and `native_internvl.py`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint_internvl import INDEX
from ..conversation import chat_template, get_template
from ..native_internvl import refuse_unrepresentable, tensors_to_native
from ..upload_to_hub import gather, link_or_copy
from .expected import compare
from .folders import refuse_same, staged_folder, write_tensors
from .native_files import write_native_files
from .processors import SavedProcessor
from .source import Source, generation_config, load_tokenizer, open_checkpoint, readable, settle_context_token
from .tokenizers import TokenizerReport, make_loadable

LAYOUTS = ("original", "native")
# Beside model cards and licences, what a training run says of itself (`publishing.run_facts` reads it).
RUN_FILES = ("recipe.yaml", "report.md", "trainer_state.json", "loss_curve.png")
_DOCUMENTS = ("README.md", "LICENSE")


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion wrote.

    Attributes:
        target: The folder.
        layout: "original" or "native".
        tensors: Their number.
        rewritten: False where the weight files are links to, or copies of, the source's.
        tokenizer: What became of the tokenizer files.
        dropped: Names on disk that no model reads and that were left out.
        processor: One sentence for each setting of the saved processor that was changed, because `config.json` says
            otherwise, or that transformers' own processor does not apply.
    """

    target: Path
    layout: str
    tensors: int
    rewritten: bool
    tokenizer: TokenizerReport
    dropped: tuple[str, ...] = ()
    processor: tuple[str, ...] = ()

    def __str__(self) -> str:
        weights = "weights written" if self.rewritten else "weights linked"
        tokenizer = {"kept": "kept", "fast": "converted to tokenizer.json", "sentencepiece": "SentencePiece with code"}
        lines = [
            f"{self.target}: {self.layout} layout, {self.tensors} tensors, {weights}, tokenizer "
            f"{tokenizer[self.tokenizer.kind]}"
        ]
        if self.dropped:
            lines.append(f"left out, read by no model: {', '.join(self.dropped)}")
        lines += [f"processor: {sentence}" for sentence in self.processor]
        return "\n".join(lines)


def upgrade(
    name_or_path: str | Path,
    target: str | Path,
    *,
    rewrite: bool = False,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    **hub_options: Any,
) -> ConversionReport:
    """Writes a checkpoint that loads on transformers 5 with this package's remote code, from one of any layout.

    The configuration is cleaned (dead keys, `su` rope, null system message, auto_map), the processor, the right chat
    template and every stop token are added, a SentencePiece tokenizer is made loadable, the code is copied in. A saved
    processor keeps what the configuration does not say (`processors.py`). Weights of the original layout are
    hard-linked or copied; other layouts are converted and adapters merged.

    Args:
        name_or_path: A folder or a Hub repository; never changed.
        target: Must be absent or empty.
        rewrite: Write the weights anew though they could be linked.
        max_shard_size: Of written weight files.
        overwrite: Replace a folder that this function or `upload_to_hub` made.
        progress: Show bars.
        **hub_options: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: the source is incomplete, damaged, or its parts do not belong together.
        TokenizerError: its tokenizer cannot be used.
        ValueError: a kind of checkpoint that this package does not know.
        FileExistsError: `target` holds something.
    """
    source = open_checkpoint(name_or_path, **hub_options)
    refuse_same(source.folder, target)
    options = {"max_shard_size": max_shard_size, "overwrite": overwrite, "progress": progress}
    return write_checkpoint(source, target, rewrite=rewrite, **options)


def write_checkpoint(
    source: Source,
    target: str | Path,
    *,
    rewrite: bool = False,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> ConversionReport:
    """Writes an opened checkpoint in this package's form; see `upgrade`."""
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.clean.") as temporary:
        clean = Path(temporary)
        report, changes = _write_original_files(source, clean)
        rewritten = rewrite or not source.plain
        if rewritten:
            write_tensors(source.tensors, clean, max_shard_size, progress)
        else:
            _link_weights(source, clean)
        gather(clean, target, overwrite=overwrite)
    dropped = _dropped(source) if rewritten else ()
    return ConversionReport(target, "original", len(source.tensors), rewritten, report, dropped, changes)


def convert(
    name_or_path: str | Path,
    target: str | Path,
    to: str,
    *,
    max_shard_size: str | int = "5GB",
    overwrite: bool = False,
    progress: bool = True,
    **hub_options: Any,
) -> ConversionReport:
    """Converts a checkpoint between the original layout and that of transformers' own InternVL classes.

    Every tensor is accounted for before anything is written; there and back gives the same bits. At most one shard is
    in memory at a time.

    Args:
        name_or_path: A folder or a Hub repository of either layout; never changed.
        target: Must be absent or empty unless `overwrite`.
        to: "native" (`InternVLForConditionalGeneration`) or "original" (the same as `upgrade`).
        max_shard_size, overwrite, progress, **hub_options: As for `upgrade`.

    Raises:
        NativeLayoutError: the native classes would compute something else (pixel shuffle v1, for one).
        ValueError: unknown `to`; and as for `upgrade`.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to is {to!r}; choose one of {', '.join(LAYOUTS)}.")
    shared = {"max_shard_size": max_shard_size, "overwrite": overwrite, "progress": progress, **hub_options}
    if to == "original":
        return upgrade(name_or_path, target, **shared)
    source = open_checkpoint(name_or_path, **hub_options)
    refuse_same(source.folder, target)
    with staged_folder(target, overwrite) as staged:
        report, tokenizer = _write_shared_files(source, staged)
        refuse_unrepresentable(source.config)
        tensors = tensors_to_native(source.tensors, source.config)
        found = compare(tensors, source.config, native=True)
        if not found.sound:
            raise ValueError(f"transformers' own InternVL does not fit {source.folder}: {found.summary()}.")
        changes = write_native_files(staged, source.config, tokenizer, SavedProcessor.open(source.folder))
        write_tensors(tensors, staged, max_shard_size, progress)
    return ConversionReport(Path(target).resolve(), to, len(tensors), True, report, _dropped(source), changes)


def _write_shared_files(source: Source, folder: Path) -> tuple[TokenizerReport, Any]:
    """What both layouts have: tokenizer, generation settings, documents. Settles the id of `<IMG_CONTEXT>` too.

    Returns:
        What became of the tokenizer files, and the tokenizer.
    """
    template = chat_template(get_template(source.config.template), system_message=source.config.system_message)
    with readable(f"the tokenizer of {source.folder}", "take the tokenizer files of the InternVL release"):
        report = make_loadable(source.folder, folder, source.values, chat_template=template)
        tokenizer = load_tokenizer(folder)
        settle_context_token(source, tokenizer)
        generation_config(source.folder, source.config, tokenizer).save_pretrained(folder)
    copy_files(_DOCUMENTS, source.folder, folder)
    return report, tokenizer


def copy_files(names: Sequence[str], source: Path, folder: Path) -> None:
    """Copies those of the files that there are."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_original_files(source: Source, folder: Path) -> tuple[TokenizerReport, tuple[str, ...]]:
    """Everything beside weights and code; says what became of the tokenizer and what of the processor changed."""
    report, tokenizer = _write_shared_files(source, folder)
    copy_files(RUN_FILES, source.folder, folder)
    source.config.architectures = ["InternVLChatModel"]
    source.config.save_pretrained(folder)
    saved = SavedProcessor.open(source.folder)
    processor = saved.processor(source.config, tokenizer)
    with tempfile.TemporaryDirectory() as temporary:
        processor.save_pretrained(temporary)
        for name in ("processor_config.json", "chat_template.jinja"):
            shutil.copyfile(Path(temporary) / name, folder / name)
    return report, saved.changes(source.config)


def _link_weights(source: Source, folder: Path) -> None:
    for path in source.weights.paths:
        link_or_copy(path, folder / path.name)
    index = source.weights.paths[0].parent / INDEX
    if index.is_file():
        link_or_copy(index, folder / INDEX)


def _dropped(source: Source) -> tuple[str, ...]:
    used = {name for tensor in source.tensors.values() for name in tensor.sources}
    return tuple(sorted(set(source.weights.tensors) - used))
