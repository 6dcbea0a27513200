"""What the doctor says of the Python files in a checkpoint: whose they are, and whether transformers 5 can run them.

The files are read and parsed, never imported. Code that is not this package's is searched for the places at which the
original remote code was seen to fail on transformers 5; finding none of them is no proof that it works.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..upload_to_hub import CODE_ROOT, HubCodeError, relative_imports
from .checks import CONFIG, TOKENIZER_CONFIG, Finding, Subject, note, one_line, problem

_GATHER = "--fix OUT, or internvl-upload, puts this package's code beside the weights"
# Part of every version of this package's code and of no other.
_OWN = "weights_internvl.py"
_IMAGE_TEXT = "AutoModelForImageTextToText"


@dataclass(frozen=True)
class _Fault:
    """A place at which original code fails on transformers 5.

    Attributes:
        where: Pattern of the file's name.
        found: Whether a file's text has the fault.
        effect: What then happens, and on which versions that was seen.
    """

    where: str
    found: Callable[[str], bool]
    effect: str


def _has(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.search(pattern, text) is not None


def _bases(text: str) -> Iterator[tuple[str, set[str]]]:
    """(class, names of its bases) of a file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            yield node.name, {ast.unparse(base).rpartition(".")[2] for base in node.bases}


def _cannot_generate(text: str) -> bool:
    return any(name.endswith("ForCausalLM") and "GenerationMixin" not in bases for name, bases in _bases(text))


def _lacks_post_init(text: str) -> bool:
    """Whether the outer model never calls `self.post_init()`."""
    return "class InternVLChatModel" in text and "self.post_init()" not in text


_FAULTS = (
    _Fault(
        r"configuration_internvl_chat\.py",
        _has(r"""['"]architectures['"]\s*:\s*\[\s*['"]['"]\s*\]"""),
        "its default configuration cannot be built: transformers 4.53 to 5.0 raise 'Unsupported architecture'",
    ),
    _Fault(
        r"modeling_intern_vit\.py",
        _has(r"\.item\(\)\s+for\s+\w+\s+in\s+torch\.linspace"),
        "it calls .item() while the model is built: transformers 5.0 raises 'Tensor.item() cannot be called on meta "
        "tensors' (5.23 works around it)",
    ),
    _Fault(
        r"modeling_internvl_chat\.py",
        _lacks_post_init,
        "it never calls post_init(): transformers 5 raises \"no attribute 'all_tied_weights_keys'\" on loading",
    ),
    _Fault(
        r"modeling_(?!internvl_chat).*\.py",
        _cannot_generate,
        "its language model does not inherit GenerationMixin: chat and generate raise \"no attribute 'generate'\" "
        "since transformers 4.50",
    ),
    _Fault(
        r"modeling_.*\.py",
        _has(r"_tied_weights_keys\s*=\s*\["),
        "_tied_weights_keys is a list: transformers 5 raises \"'list' object has no attribute 'keys'\" on saving",
    ),
    _Fault(
        r"modeling_(?!intern_vit).*\.py",
        _has(r"register_buffer\([^)]*persistent\s*=\s*False"),
        "it keeps rotary tables in buffers that are not saved: transformers 5 leaves them uninitialised, and outputs "
        "are NaN or garbage without an error",
    ),
    _Fault(
        r"tokenization_.*\.py",
        _has(r"self\.clean_up_tokenization\("),
        "decoding calls clean_up_tokenization, which transformers 5.0 does not have",
    ),
)


def check_code(subject: Subject) -> Iterator[Finding]:
    """The files that `auto_map` names, with everything they import."""
    if not (subject.chat or subject.kind == "encoder"):
        return
    references = _references(subject)
    foreign = sorted({f"{reference} ({file})" for file, reference in references if "--" in reference})
    if foreign:
        message = f"auto_map names code of another repository, fetched at every load: {', '.join(foreign[:3])}"
        yield note("code", message, _GATHER)
    entries = {_file(reference): file for file, reference in references if "--" not in reference}
    files, missing, broken = _closure(subject.folder, entries)
    if not entries:
        if subject.kind == "native":
            yield Finding("code", "ok", f"{CONFIG}: transformers' own classes, no code needed")
        elif not foreign:
            message = f"{CONFIG} names no code (auto_map); this package loads the folder, AutoModel does not"
            yield note("code", message, _GATHER)
        return
    if missing and not files:
        named = f"{', '.join(sorted(set(entries.values())))}: auto_map names {', '.join(sorted(missing)[:3])}"
        message = f"{named}, and no code is here; this package loads the folder, AutoModel does not"
        yield note("code", message, _GATHER)
        return
    for name, wanted_by in sorted(missing.items()):
        yield problem("code", f"{name}, which {wanted_by} needs, is missing", _GATHER)
    for name, reason in sorted(broken.items()):
        yield problem("code", f"{name} is no module that transformers can load: {reason}", _GATHER)
    yield from _whose(subject, files, missing or broken)


def _whose(subject: Subject, files: list[str], incomplete: Any) -> Iterator[Finding]:
    changed = [name for name in files if not _same(subject.folder / name, CODE_ROOT / name)]
    own = _OWN in files or (not changed and not incomplete)
    if not changed and not incomplete:
        yield Finding("code", "ok", f"{len(files)} Python files, byte for byte those of the installed package")
    elif own and changed:
        message = f"code of this package in another version: {_shown(changed)} of {len(files)} files differ"
        yield note("code", message, f"nothing, if it was changed on purpose; {_GATHER}")
    elif not own:
        yield from _faults(subject, files)


def _faults(subject: Subject, files: Iterable[str]) -> Iterator[Finding]:
    files, found = list(files), False
    for name in files:
        text = (subject.folder / name).read_text(encoding="utf-8")
        for fault in _FAULTS:
            if re.fullmatch(fault.where, name) and fault.found(text):
                found = True
                yield problem("code", f"{name}: {fault.effect}", _GATHER)
    lacks = [] if _IMAGE_TEXT in (subject.values.get("auto_map") or {}) else [f"{CONFIG} names no {_IMAGE_TEXT}"]
    message = "; ".join([f"code of other origin ({len(files)} files)", *lacks])
    message += "" if found else "; no known fault found, not run"
    if subject.chat:
        yield note("code", message, _GATHER)


def _references(subject: Subject) -> list[tuple[str, str]]:
    """(file, `module.Class`) of every auto_map entry in the folder."""
    found: list[tuple[str, str]] = []
    files = (CONFIG, TOKENIZER_CONFIG, "processor_config.json", "preprocessor_config.json")
    for file in files:
        values = subject.read(file)
        nested = values.get("image_processor") or {}
        for auto_map in (values.get("auto_map"), nested.get("auto_map")):
            found += [(file, reference) for reference in _flat(auto_map)]
    return found


def _flat(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _flat(inner)


def _file(reference: str) -> str:
    return f"{reference.rpartition('.')[0]}.py"


def _closure(folder: Path, entries: dict[str, str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Files that are there, missing ones with what wants them, and unreadable ones with the reason."""
    queue, wanted = list(entries), dict(entries)
    files: list[str] = []
    missing: dict[str, str] = {}
    broken: dict[str, str] = {}
    for name in queue:  # grows while it is walked
        path = folder / name
        if not path.is_file():
            missing[name] = wanted[name]
            continue
        try:
            imports = [f"{module}.py" for module in relative_imports(path)]
        except (HubCodeError, SyntaxError, ValueError) as error:
            broken[name] = one_line(error)
            continue
        files.append(name)
        for other in imports:
            if other not in wanted:
                wanted[other] = name
                queue.append(other)
    return files, missing, broken


def _same(path: Path, own: Path) -> bool:
    return own.is_file() and path.read_bytes() == own.read_bytes()


def _shown(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
