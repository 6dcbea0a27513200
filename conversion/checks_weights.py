"""What the doctor says of a checkpoint's architecture and tensors: release, files, names, shapes and dtypes.

Everything follows from `config.json`, the table of releases and the headers of the weights; values are not looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from ..modeling_intern_vit import InternVisionModel
from ..weights_internvl import holds_lora
from .checks import CONFIG, Finding, Subject, note, problem, split_fix
from .expected import KeyReport, compare, compare_shapes, not_numbers, quantization_of, without_quantized
from .families import Release, differences
from .source import EMBEDDINGS

_ONE_REVISION = "take weights and config.json from one revision of one repository"
_HEADS = ("language_model.lm_head.weight", "language_model.output.weight")
_PARTS = {"vision": "vision_model.", "projector": "mlp1.", "language model": "language_model."}
# Settings that change what a model computes: one that no release of the same shapes has is wrong.
_DECISIVE = ("ps_version", "select_layer", "template")

# -------------------------------------------------------------------------------------------------------------- family


def check_family(subject: Subject) -> Iterator[Finding]:
    """Which release this is, by shapes, with parameter counts from the headers."""
    if subject.config is None:
        return
    counts = _counts(subject)
    sizes = f"; {sum(counts.values()):,} parameters" if counts else ""
    if len(counts) > 1:
        sizes += f" ({', '.join(f'{name} {number:,}' for name, number in counts.items())})"
    if not subject.releases:
        message = f"{CONFIG}: the shapes are of no released InternVL{sizes}"
        yield note("family", message)
        yield from _pixel_shuffle(subject, None)
        return
    names = [release.name for release in subject.releases]
    same = f", shared by {', '.join(names[1:4])}{' and others' if len(names) > 4 else ''}" if names[1:] else ""
    yield Finding("family", "ok", f"{CONFIG}: architecture of {names[0]}{same}{sizes}")
    yield from _unlike(subject)


def _counts(subject: Subject) -> dict[str, int]:
    tensors = {name: torch.Size(tensor.shape).numel() for name, tensor in (subject.tensors or {}).items()}
    if not subject.chat:
        return {"vision": sum(tensors.values())} if tensors else {}
    counts = {
        part: sum(number for name, number in tensors.items() if name.startswith(prefix))
        for part, prefix in _PARTS.items()
    }
    return {part: number for part, number in counts.items() if number}


def _unlike(subject: Subject) -> Iterator[Finding]:
    """Settings that differ from the closest release."""
    closest = subject.releases[0]
    found = differences(subject.config, closest)
    every = [differences(subject.config, release) for release in subject.releases]
    decisive = [name for name in _DECISIVE if all(name in one for one in every)]
    for name in decisive:
        if name == "ps_version":
            yield from _pixel_shuffle(subject, closest)
            continue
        own, field_name = found[name][0], _field(subject, name)
        theirs: dict[str, str] = {}
        for release, one in zip(subject.releases, every, strict=True):
            theirs.setdefault(repr(one[name][1]), release.name)
        released = " or ".join(f"{value} ({name})" for value, name in theirs.items())
        yield problem(
            "template" if name == "template" else "family",
            f"{CONFIG}: {field_name} is {own!r}, which no release of these shapes has",
            f"set {field_name} to {released}, unless the model was trained with {own!r}",
        )
    rest = [f"{name} {own} instead of {theirs}" for name, (own, theirs) in found.items() if name not in _DECISIVE]
    if rest:
        message = f"{CONFIG}: unlike {closest.name}: {'; '.join(rest)}"
        yield note("family", message, "nothing, if the model was trained so")


def _field(subject: Subject, name: str) -> str:
    return "vision_feature_layer" if name == "select_layer" and subject.kind == "native" else name


def _pixel_shuffle(subject: Subject, release: Release | None) -> Iterator[Finding]:
    if subject.kind not in ("original", "adapters"):
        return
    version, missing = subject.config.ps_version, "ps_version" not in subject.values
    says = f"{CONFIG} has no ps_version, which means {version!r}" if missing else f"{CONFIG}: ps_version {version!r}"
    fix = 'set "ps_version" in config.json to what the model was trained with ("v2" since 1.5)'
    if release is not None:
        wanted = release.config().ps_version
        message = f"{says}; {release.name} has {wanted!r}, the other one exchanges rows and columns of visual tokens"
        yield problem("family", message, fix)
    elif missing:
        yield note("family", f"{says} (transposed visual tokens)", fix)


# ------------------------------------------------------------------------------------------------------------- weights


def check_weights(subject: Subject) -> Iterator[Finding]:
    """Files, names, shapes and dtypes of the tensors."""
    if not (subject.chat or subject.kind == "encoder"):
        return
    for text in subject.weights.problems:
        yield problem("weights", *split_fix(text))
    if subject.weights.problems:  # what the files lack would show in every other check
        return
    if subject.tensors_error:
        message = f"{_files(subject)}: {subject.tensors_error}"
        yield problem("weights", message, "fetch the checkpoint again")
    if not subject.weights.tensors:
        message = f"{_files(subject)}: no tensor at all"
        yield problem("weights", message, "fetch the checkpoint again")
    if not subject.weights.tensors or subject.config is None or subject.tensors is None:
        return
    sound = True
    for finding in (*_keys(subject), *_adapters(subject), *_dtypes(subject)):
        sound = sound and finding.level != "problem"
        yield finding
    if any(path.suffix == ".bin" for path in subject.weights.paths):
        message = f"{_files(subject)}: pickled weights, which load slowly and cannot be published"
        yield note("weights", message, "--fix OUT writes safetensors")
    if sound:
        size = sum(tensor.nbytes for tensor in subject.weights.tensors.values())
        message = f"{_files(subject)}: {len(subject.weights.tensors):,} tensors, {_bytes(size)}, as {CONFIG} asks"
        yield Finding("weights", "ok", message)


def _files(subject: Subject) -> str:
    names = list(dict.fromkeys(subject.weights.files.values())) or [path.name for path in subject.weights.paths]
    return names[0] if len(names) == 1 else f"{len(names)} weight files"


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.2f} MB"


def _keys(subject: Subject) -> Iterator[Finding]:
    """Names and shapes against the configuration; vocabulary and head get sentences of their own."""
    report = _report(subject)
    if method := quantization_of(subject.values):
        report, layers = without_quantized(report, subject.tensors)
        yield from _quantized(layers, method)
    explained: set[str] = set()
    for finding, told in (*_vocabulary(subject), *_head(subject, report)):
        explained |= told
        yield finding
    examples = {
        "are missing": [name for name in report.missing if name not in explained],
        "are read by no model": report.unexpected,
        "have other shapes": [f"{n} {a} instead of {b}" for n, a, b in report.misshapen if n not in explained],
    }
    for what, names in examples.items():
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            yield problem("weights", f"{_files(subject)}: {len(names)} tensors {what}: {shown}", _ONE_REVISION)
    if report.dead:
        message = f"{_files(subject)}: {len(report.dead)} buffers that nothing reads, such as {report.dead[0]}"
        yield note("weights", message, "harmless; leave them")


def _quantized(layers: Sequence[str], method: str) -> Iterator[Finding]:
    seeing = [layer for layer in layers if not layer.startswith(("language_model.", "model.language_model."))]
    message = f"{len(layers)} layers are quantized ({method}); what is inside them was not looked at"
    if not seeing:
        yield Finding("weights", "ok", message)
        return
    fix = "such checkpoints often talk nonsense about images: quantize again, without encoder, projector and head"
    yield note("weights", f"{message}; {len(seeing)} see or project images, such as {seeing[0]}", fix)


def _report(subject: Subject) -> KeyReport:
    if subject.chat:
        return compare(subject.tensors, subject.config)
    with torch.device("meta"):
        wanted = {name: tuple(t.shape) for name, t in InternVisionModel(subject.config).state_dict().items()}
    return compare_shapes(subject.tensors, wanted)


def _vocabulary(subject: Subject) -> Iterator[tuple[Finding, set[str]]]:
    if not subject.chat:
        return
    vocabulary = subject.config.llm_config.vocab_size
    names = {name for name in (*EMBEDDINGS, *_HEADS) if name in subject.tensors}
    rows = {name: subject.tensors[name].shape[0] for name in sorted(names)}
    if wrong := {name: number for name, number in rows.items() if number != vocabulary}:
        part = "text_config" if subject.kind == "native" else "llm_config"
        shown = ", ".join(f"{name} has {number} rows" for name, number in wrong.items())
        message = f"{_files(subject)}: {shown}, but {CONFIG} says {part}.vocab_size {vocabulary}"
        fix = f"set {part}.vocab_size to {max(wrong.values())} if the tokenizer has no larger id; otherwise "
        yield problem("weights", message, fix + _ONE_REVISION), set(wrong)


def _head(subject: Subject, report: KeyReport) -> Iterator[tuple[Finding, set[str]]]:
    if not subject.chat:
        return
    stored = any(name in subject.tensors for name in _HEADS)
    missing = set(_HEADS) & set(report.missing)
    if missing and not stored:
        message = f"{_files(subject)}: no output head ({min(missing)}), but {CONFIG} does not say tie_word_embeddings"
        fix = "set tie_word_embeddings to true in the language model's configuration if it was trained so; otherwise "
        yield problem("weights", message, fix + _ONE_REVISION), missing
    if stored and subject.config.llm_config.tie_word_embeddings:
        message = f"{_files(subject)}: an output head is stored though {CONFIG} says tie_word_embeddings"
        fix = "set tie_word_embeddings to false, which keeps the stored head"
        yield (
            note("weights", message + "; where the two differ, programs disagree on which to use", fix),
            set(),
        )


def _adapters(subject: Subject) -> Iterator[Finding]:
    for flag, prefix in (("use_backbone_lora", "vision_model."), ("use_llm_lora", "language_model.")):
        rank = subject.values.get(flag) or 0
        names = [name for name in subject.weights.tensors if name.startswith(prefix)]
        stored = holds_lora(names)
        if subject.chat and names and bool(rank) != stored:
            have = "holds adapters" if stored else "holds none"
            message = f"{CONFIG}: {flag} is {rank}, but {_files(subject)} {have} under {prefix}*"
            fix = "--fix OUT merges what is stored and sets the flag to 0; the original code would load random weights"
            yield problem("weights", message, fix)


def _dtypes(subject: Subject) -> Iterator[Finding]:
    if wrong := not_numbers(subject.tensors, subject.values):
        yield problem("weights", f"{_files(subject)}: {wrong}", "fetch the checkpoint again")
    bytes_of: Counter[str] = Counter()
    small = 2 if quantization_of(subject.values) else 0  # bytes; 8-bit floats are then as they should be
    for tensor in subject.weights.tensors.values():
        if tensor.dtype.is_floating_point and tensor.dtype.itemsize >= small:
            bytes_of[str(tensor.dtype).removeprefix("torch.")] += tensor.nbytes
    said = subject.values.get("dtype") or subject.values.get("torch_dtype")
    shown = ", ".join(f"{_bytes(number)} of {name}" for name, number in bytes_of.most_common())
    if len(bytes_of) > 1 or (said and bytes_of and said not in bytes_of):
        message = f"{_files(subject)}: {shown}; {CONFIG} says {said}, the dtype in which transformers 5 loads it all"
        yield note("weights", message, f'pass dtype="{next(iter(bytes_of))}" to keep the stored precision')
