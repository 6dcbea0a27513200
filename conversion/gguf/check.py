"""Whether GGUF files hold an InternVL checkpoint: every tensor and the metadata that llama.cpp computes with.

The files are read through the package `gguf` and compared with the folder that they were made of. What llama.cpp then
does with them is not run here; where it computes otherwise than this package, `gguf_export.check_exportable` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ...checkpoint_internvl import CheckpointError, LazyTensor, scan_weights
from ..checks import Finding, Subject, note, problem, quiet
from ..folders import resolve
from .files import MMPROJ, PLAIN, TEXT, GgufModel, GgufTensor, open_gguf
from .metadata import (
    AREA,
    CONVERT_AGAIN,
    check_chat_template,
    check_text,
    check_vision,
    check_vocabulary,
)
from .tensors import (
    ADDED,
    ARCHITECTURES,
    LLAMA_CPP,
    OUTPUT,
    POSITIONS,
    class_last,
    text_tensors,
    vision_tensors,
)

__all__ = ["AREA", "check_gguf", "relative_error", "worst_error"]

_DIFFER, _OVERFLOW = "differ from the checkpoint's", "overflow"
_REORDERED = (
    "position embeddings lie in the order in which llama.cpp {version} adds them, patches first, and not in the "
    "converter's; a llama.cpp that puts the class token in front needs the converter's order"
)


def check_gguf(checkpoint: str | Path, files: Sequence[str | Path], progress: bool = False) -> list[Finding]:
    """Compares GGUF files with the checkpoint that they were converted from, tensor by tensor.

    Args:
        checkpoint: Its folder or Hub repository, of the original layout.
        files: The encoder with its projector, the language model, or both; all shards of a file that is split.
        progress: Show a bar.

    Returns:
        Findings of the area `gguf`: "ok" for each kind of file whose tensors, and whose metadata, are the
        checkpoint's; "problem" for what differs; "note" for what could not be compared or was not given. Tensors
        stored as f32, f16 or bf16 must be equal after the cast; of quantised ones the relative error of the
        dequantised values may be `worst_error`.

    Raises:
        CheckpointError: the checkpoint or a file cannot be read.
        ImportError: the package `gguf` is not installed.
        ValueError: no files.
    """
    if not files:
        raise ValueError("files is empty: give the GGUF files that the converter wrote.")
    models = open_gguf(files)
    folder = resolve(checkpoint)
    with quiet():
        subject = Subject.open(folder, scan_weights(folder))
        if not subject.chat or subject.config is None or not subject.tensors:
            reason = subject.config_error or subject.tensors_error or "it is no whole InternVL with weights"
            raise CheckpointError(f"{folder} cannot be compared: {reason}: internvl doctor says more.")
        findings: list[Finding] = []
        for kind, checks in _CHECKS.items():
            if kind in models:
                findings += _judged(subject, models[kind], checks, progress)
            else:
                findings.append(note(AREA, f"the file of the {_TITLES[kind]} was not given", "give both files"))
    return findings


def _judged(
    subject: Subject, model: GgufModel, checks: Sequence[Callable[..., Iterator[Finding]]], progress: bool
) -> Iterator[Finding]:
    """All findings of one model's files, those that are in order first."""
    bad = list(_shards(model))
    for check in checks:
        bad += check(subject, model)
    tensors = list(_tensors(subject, model, progress))
    if not bad:
        yield Finding(AREA, "ok", f"{model.name}: metadata of the {_TITLES[model.kind]} as in the checkpoint")
    yield from (*tensors, *bad)


def _shards(model: GgufModel) -> Iterator[Finding]:
    if len(model.paths) != model.shards:
        message = f"{model.name}: {len(model.paths)} files of the {_TITLES[model.kind]}, but they say {model.shards}"
        yield problem(AREA, message, "give all shards of one conversion, and no other file of that kind")
    if model.doubled:
        message = f"{model.name}: {model.doubled[0]} is in two files"
        yield problem(AREA, message, "give the files of one conversion")


# ------------------------------------------------------------------------------------------------------------- tensors


def _tensors(subject: Subject, model: GgufModel, progress: bool) -> Iterator[Finding]:
    llm = subject.config.llm_config
    if model.kind == MMPROJ:
        wanted = vision_tensors(subject.tensors, subject.config)
    elif llm.architectures[0] in ARCHITECTURES:
        wanted = text_tensors(subject.tensors, subject.config)
    else:
        message = f"{model.name}: what the converter makes of {llm.architectures[0]} is not known here; tensors are "
        yield note(AREA, f"{message}not compared")
        return
    optional = {OUTPUT} if llm.tie_word_embeddings else set()
    bad = [*_names(model, wanted, optional), *_values(model, wanted, progress)]
    yield from bad
    if not any(finding.level == "problem" for finding in bad):
        kinds = Counter(tensor.kind for tensor in model.tensors.values())
        shown = ", ".join(f"{number} {kind}" for kind, number in kinds.most_common())
        near = "" if set(kinds) <= set(PLAIN) else ", the quantised ones within their bounds"
        message = f"{model.name}: {len(wanted)} tensors of the {_TITLES[model.kind]} equal the checkpoint's ({shown})"
        yield Finding(AREA, "ok", f"{message}{near}")


def _names(model: GgufModel, wanted: Mapping[str, LazyTensor], optional: set[str]) -> Iterator[Finding]:
    """Names and shapes."""
    found = model.tensors
    missing = [name for name in wanted if name not in found and name not in optional]
    extra = [name for name in found if name not in wanted and name not in optional and name not in ADDED]
    shapes = [
        f"{name} {found[name].shape} instead of {wanted[name].shape}"
        for name in wanted
        if name in found and found[name].shape != tuple(wanted[name].shape)
    ]
    for what, names in {"missing": missing, "unknown to the checkpoint": extra, "of another shape": shapes}.items():
        if names:
            yield problem(AREA, f"{model.name}: {_listed(names)} {what}", CONVERT_AGAIN)


def _values(model: GgufModel, wanted: Mapping[str, LazyTensor], progress: bool) -> Iterator[Finding]:
    """Values of all tensors of the right name and shape."""
    same = [n for n in wanted if n in model.tensors and model.tensors[n].shape == tuple(wanted[n].shape)]
    wrong: dict[str, list[str]] = {_DIFFER: [], _OVERFLOW: []}
    closed: list[str] = []
    for name in tqdm(same, desc=f"Comparing {model.kind}", disable=not progress):
        source, tensor = wanted[name], model.tensors[name]
        if not source.dtype.is_floating_point:
            closed.append(f"{name} ({source.dtype} in the checkpoint)")
            continue
        try:
            values = tensor.read()
        except NotImplementedError:
            closed.append(f"{name} ({tensor.kind})")
            continue
        expected = source.read()
        if name == POSITIONS and torch.equal(values, class_last(expected.float())):
            yield note(AREA, f"{model.name}: {_REORDERED.format(version=LLAMA_CPP)}")
        elif fault := _fault(expected, values, tensor):
            wrong[fault[0]].append(f"{name} ({fault[1]})")
    fixes = {_OVERFLOW: "convert with --outtype bf16, which has the range of float32"}
    for what, names in wrong.items():
        if names:
            yield problem(AREA, f"{model.name}: {_listed(names)} {what}", fixes.get(what, CONVERT_AGAIN))
    if closed:
        yield note(AREA, f"{model.name}: {_listed(closed)} of the right shape, values not comparable")


def _fault(source: torch.Tensor, values: torch.Tensor, tensor: GgufTensor) -> tuple[str, str] | None:
    """(what is wrong, how much) of one tensor; None if nothing is."""
    source = source.float()
    if tensor.kind in PLAIN:
        cast = source.to(PLAIN[tensor.kind]).float()
        if torch.equal(values, cast):
            return (_OVERFLOW, tensor.kind) if (~cast.isfinite() & source.isfinite()).any() else None
        bound = 0.0
    else:
        bound = worst_error(tensor.bits)
    error = relative_error(values, source)
    if tensor.kind not in PLAIN and error <= bound:
        return None
    allowed = "" if tensor.kind in PLAIN else f", allowed for {tensor.kind}: {bound:.2g}"
    return _DIFFER, f"relative error {error:.2g}{allowed}"


def relative_error(values: torch.Tensor, source: torch.Tensor) -> float:
    """Norm of the difference over the norm of `source`; 1 where `source` is zero and `values` is not."""
    difference, size = torch.linalg.vector_norm(values - source), torch.linalg.vector_norm(source)
    return float(difference / size) if size > 0 else float(difference > 0)


def worst_error(bits: int) -> float:
    """The relative error that is put up with for a quantised tensor: 4 / 2^bits, at most 0.9.

    A block of 32 normal values, rounded evenly between its extremes (about 2.1 deviations), has 1.2 / 2^bits; the
    rest is left for heavier tails and coarser formats. Tensors that have nothing to do with each other have 1.4.
    """
    return min(0.9, 4 / 2**bits)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown})"


_TITLES = {MMPROJ: "encoder and projector", TEXT: "language model"}
_CHECKS: dict[str, tuple[Callable[[Subject, GgufModel], Iterator[Finding]], ...]] = {
    MMPROJ: (check_vision,),
    TEXT: (check_text, check_vocabulary, check_chat_template),
}
