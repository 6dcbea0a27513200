"""Conversion to GGUF by llama.cpp's own converter, run as it is, and the one change that its files can need.

`convert_to_gguf` runs `convert_hf_to_gguf.py` for the language model and for encoder and projector;
`reorder_positions` moves one row of a file. Whether a checkpoint can be converted is for `gguf_export.py` to say,
whether the files are right for `gguf_check.py`.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from ...checkpoint_internvl import CheckpointError, scan_weights
from ..checks import Subject, quiet
from ..folders import resolve
from .files import MMPROJ, gguf_package, open_gguf
from .tensors import POSITIONS, class_last, vision_tensors

OUTTYPES = ("f16", "bf16", "f32", "q8_0")


def require_converter(converter: Path) -> None:
    """Raises `FileNotFoundError` unless there is such a file."""
    if not converter.is_file():
        raise FileNotFoundError(f"converter {converter} is no file: give convert_hf_to_gguf.py of a llama.cpp.")


def command_lines(
    checkpoint: str | Path, converter: str | Path = "convert_hf_to_gguf.py", output: str | Path = ".",
    outtype: str = "f16",
) -> dict[Path, list[str]]:  # fmt: skip
    """The converter's arguments by the file that they write: language model, then encoder with projector.

    Raises:
        CheckpointError: there is no such checkpoint. ValueError: unknown `outtype`.
    """
    if outtype not in OUTTYPES:
        raise ValueError(f"outtype is {outtype!r}; choose among {', '.join(OUTTYPES)}.")
    name, output = Path(checkpoint).resolve().name, Path(output)  # of a Hub repository, not of its snapshot
    common = [str(converter), str(resolve(checkpoint)), "--outtype", outtype, "--outfile"]
    text, mmproj = output / f"{name}-{outtype}.gguf", output / f"mmproj-{name}-{outtype}.gguf"
    return {text: [*common, str(text)], mmproj: [*common, str(mmproj), "--mmproj"]}


def convert_to_gguf(
    checkpoint: str | Path, converter: str | Path, output: str | Path, outtype: str = "f16"
) -> list[Path]:
    """Runs llama.cpp's converter twice.

    Args:
        checkpoint: Folder or Hub repository.
        converter: `convert_hf_to_gguf.py`, run by this Python; it brings its own `gguf` along.
        output: Folder, made if missing; what a run says is kept there, in a `.log` beside each file.
        outtype: One of `OUTTYPES`.

    Returns:
        The two files, language model first.

    Raises:
        CheckpointError: the converter failed; the message has its last line. ValueError: unknown `outtype`.
        FileNotFoundError: there is no such converter. FileExistsError: a file is there already.
    """
    require_converter(Path(converter))
    commands = command_lines(checkpoint, Path(converter).resolve(), output, outtype)
    Path(output).mkdir(parents=True, exist_ok=True)
    for file in commands:
        if file.exists():
            raise FileExistsError(f"{file} is there already: choose another folder or remove it.")
    for file, command in commands.items():
        log = file.with_suffix(".log")
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(  # without input: transformers would ask whether to run the folder's code
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode or not file.is_file():
            file.unlink(missing_ok=True)
            said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            reason = said[-1].strip() if said else f"exit code {done.returncode}"
            raise CheckpointError(f"the converter wrote no {file.name} ({reason}): all that it said is in {log}.")
    return list(commands)


def reorder_positions(checkpoint: str | Path, source: str | Path, target: str | Path) -> None:
    """Copies an mmproj file with its position embeddings in the order in which llama.cpp `LLAMA_CPP` adds them.

    That version appends the class token to the patches, while the table begins with the class token's row; here the
    row moves to the end, and llama.cpp computes what the checkpoint does. A later llama.cpp that puts the class token
    in front must get the converter's file instead: compare an answer after every update.

    Args:
        checkpoint: The folder that `source` was converted from.
        source: As the converter wrote it.
        target: A new file.

    Raises:
        CheckpointError: `source` is no mmproj file, or its table is not the checkpoint's (reordered already, perhaps).
        FileExistsError: `target` exists.
    """
    source, target, folder = Path(source), Path(target), resolve(checkpoint)
    if target.exists():
        raise FileExistsError(f"{target} is there already: choose another name.")
    model = open_gguf([source]).get(MMPROJ)
    if model is None or POSITIONS not in model.tensors:
        raise CheckpointError(f"{source} has no {POSITIONS}: give the file that the converter wrote with --mmproj.")
    with quiet():
        subject = Subject.open(folder, scan_weights(folder))
    wanted = vision_tensors(subject.tensors, subject.config)[POSITIONS].read().float()
    if model.tensors[POSITIONS].kind != "F32" or not torch.equal(model.tensors[POSITIONS].read(), wanted):
        raise CheckpointError(f"{source}: {POSITIONS} is not the checkpoint's table: convert again.")
    shutil.copyfile(source, target)
    reader = gguf_package().GGUFReader(target, "r+")
    entry = next(entry for entry in reader.tensors if entry.name == POSITIONS)
    entry.data[...] = class_last(wanted).numpy().astype(np.float32).reshape(entry.data.shape)
    reader.data.flush()
