"""A checkpoint opened without its weights, and what the doctor says of its format.

The other areas have files of their own beside this one. A check only reports: it repairs nothing, runs no code of the
checkpoint and reads no tensor beyond its header.

Levels: what is there and wrong, or missing and needed, is a "problem"; what is missing and can be derived, or unusual
and handled, is a "note".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging

from ..checkpoint_internvl import CheckpointError, Weights, read_json
from ..configuration_intern_vit import InternVisionConfig
from ..configuration_internvl_chat import InternVLChatConfig
from ..conversation import ConversationTemplate, TemplateError, get_template
from ..native_internvl import config_from_native, foreign_tensors, holds_native, is_native
from ..weights_internvl import holds_lora
from .checks_settings import impossible
from .families import Release, identify
from .source import embedding_rows, load_tokenizer, told
from .source import one_line as one_line  # the checks take it from here

AREAS = ("format", "family", "weights", "tokenizer", "template", "processor", "generation", "code")
LEVELS = ("ok", "note", "problem")
CONFIG, ADAPTER = "config.json", "adapter_config.json"
TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_MODEL = "tokenizer.json", "tokenizer_config.json", "tokenizer.model"
_PINS = ("attn_implementation", "_attn_implementation")


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        area: One of `AREAS`, or "serving".
        level: "ok", "note" (works, but worth knowing) or "problem".
        message: What and in which file.
        fix: What to do; empty where nothing needs to be done.
    """

    area: str
    level: str
    message: str
    fix: str = ""


def problem(area: str, message: str, fix: str) -> Finding:
    """A finding of that level."""
    return Finding(area, "problem", message, fix)


def note(area: str, message: str, fix: str = "") -> Finding:
    """A finding of that level."""
    return Finding(area, "note", message, fix)


@dataclass
class Subject:
    """A checkpoint as far as it could be opened; what could not is None and its error says why.

    Attributes:
        folder: Holds everything but, for a Hub repository, the weights.
        weights: What the headers say, as on disk.
        values: `config.json`; empty for a PEFT adapter.
        kind: "original", "adapters" (LoRA stored in the weights), "native" (transformers' own), "encoder", "peft" or
            "other".
        config: `InternVLChatConfig`, or `InternVisionConfig` of an encoder.
        tensors: `LazyTensor`s under original names, adapters merged.
        releases: The released models of the same architecture.
    """

    folder: Path
    weights: Weights
    values: dict[str, Any]
    kind: str
    config: Any = None
    config_error: str = ""
    tensors: Any = None
    tensors_error: str = ""
    tokenizer: Any = None
    tokenizer_error: str = ""
    releases: tuple[Release, ...] = field(default=())

    @classmethod
    def open(cls, folder: Path, weights: Weights) -> Subject:
        """Opens a folder.

        Raises:
            CheckpointError: it holds no configuration at all, or one that is not JSON.
        """
        if (folder / ADAPTER).is_file() and not weights.tensors:
            return cls(folder, weights, {}, "peft")
        if not (folder / CONFIG).is_file():
            inner = next((path for path in sorted(folder.glob("*/config.json"))), None)
            hint = f"look at {inner.parent}" if inner else "give the folder or the Hub name of a checkpoint"
            raise CheckpointError(f"{folder} has no {CONFIG}: {hint}.")
        values = read_json(folder / CONFIG)
        subject = cls(folder, weights, values, _kind(values, weights))
        if subject.kind != "other":
            subject._open_config()
            subject._open_tensors()
        if subject.chat:
            subject._open_tokenizer()
        return subject

    @property
    def chat(self) -> bool:
        """Whether this is a whole model, with language."""
        return self.kind in ("original", "adapters", "native")

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object in a file, {} if there is none; `CheckpointError` if it is damaged."""
        return read_json(self.folder / name) if self.has(name) else {}

    @property
    def template(self) -> ConversationTemplate | None:
        """The conversation template that the configuration names; None where there is none of that name."""
        try:
            return get_template(self.config.template)
        except (AttributeError, TemplateError):
            return None

    @property
    def rows(self) -> int | None:
        """Rows of the embedding table on disk, else as configured."""
        rows = embedding_rows(self.tensors or {})
        if rows is not None:
            return rows
        return self.config.llm_config.vocab_size if isinstance(self.config, InternVLChatConfig) else None

    # A file from anywhere can make the loaders raise anything; every error below becomes a finding.

    def _open_config(self) -> None:
        try:
            values = config_from_native(self.values) if is_native(self.values) else self.values
            self.config = (InternVLChatConfig if self.chat else InternVisionConfig).from_dict(values)
        except Exception as error:
            self.config_error = told(error)
            return
        try:
            self.releases = identify(self.config)
        except Exception:  # shapes that no class can be built of: the weights' check says what is wrong
            self.releases = ()

    def _open_tensors(self) -> None:
        if not self.chat:
            self.tensors = self.weights.tensors
        elif self.config is not None:
            try:
                foreign = foreign_tensors(self.weights.tensors, self.config)
                self.tensors = self.weights.tensors if foreign is None else foreign
            except Exception as error:
                self.tensors_error = told(error)

    def _open_tokenizer(self) -> None:
        try:
            if self.has(TOKENIZER_CONFIG):
                self.tokenizer = load_tokenizer(self.folder)
            else:
                self.tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)
        except Exception as error:
            self.tokenizer_error = told(error)
            try:
                self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.folder)
            except Exception:  # the first error says more
                return


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps transformers from warning of what is a finding here."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def split_fix(text: str, default: str = "fetch the checkpoint again") -> tuple[str, str]:
    """Cause and fix of an error of this package, which ends in `: <what to do>.`"""
    cause, _, fix = text.rstrip(".").rpartition(": ")
    verbs = ("fetch", "remove", "correct", "write", "merge", "copy", "look", "give")
    return (cause, fix) if cause and fix.split(" ")[0] in verbs else (text.rstrip("."), default)


def _kind(values: dict[str, Any], weights: Weights) -> str:
    model_type = values.get("model_type")
    if is_native(values):
        return "native"
    if model_type == InternVLChatConfig.model_type:
        return "adapters" if holds_lora(weights.tensors) else "original"
    return "encoder" if model_type == InternVisionConfig.model_type else "other"


# -------------------------------------------------------------------------------------------------------------- format


def check_format(subject: Subject) -> Iterator[Finding]:
    """Which kind of checkpoint this is, and what in its configuration other programs stumble over."""
    if not (subject.chat or subject.kind == "encoder"):
        yield _foreign_format(subject)
        return
    if subject.config is None:
        yield problem("format", f"{CONFIG} cannot be read: {subject.config_error}", f"correct {CONFIG}")
    else:
        yield _known_format(subject)
        wrong = dict(impossible(subject.config, subject.kind == "native"))
        for name, sentence in wrong.items():
            yield problem("format", f"{CONFIG}: {sentence}", f"set {name} to what the model was trained with")
        yield from _layers(subject)
        if subject.chat and subject.config.force_image_size == 0:
            message = (
                f"{CONFIG}: force_image_size is 0, which counts as unset: tiles have {subject.config.image_size} px"
            )
            yield note("format", message, "set it to null")
    native_names = holds_native(subject.weights.tensors)
    if subject.weights.tensors and subject.kind != "encoder" and native_names != (subject.kind == "native"):
        wanted, found = ("transformers' own", "original") if not native_names else ("original", "transformers' own")
        yield problem(
            "format",
            f"{CONFIG} is of the {wanted} layout, but the tensors have names of the {found} one: other loaders leave "
            "them out without an error",
            "--fix OUT writes one layout",
        )
    yield from _stumbling_blocks(subject)


def _foreign_format(subject: Subject) -> Finding:
    if subject.kind == "peft":
        base = subject.read(ADAPTER).get("base_model_name_or_path") or "its base model"
        message = f"{ADAPTER}: a PEFT adapter alone, not a model"
        return problem("format", message, f"merge it into {base} (internvl_hub.conversion.merge)")
    message = f"{CONFIG}: model_type {subject.values.get('model_type')!r} is not InternVL's"
    return problem("format", message, "check the path; InternVL says 'internvl_chat', 'internvl' or 'intern_vit_6b'")


def _known_format(subject: Subject) -> Finding:
    if subject.kind == "encoder":
        message = f"{CONFIG}: an InternViT encoder alone (intern_vit_6b), without a language model"
        return note("format", message, "load it with InternVisionModel; prompts are not checked")
    llm = subject.config.llm_config.architectures[0]
    if subject.kind == "adapters":
        message = f"{CONFIG}: original layout around {llm}, LoRA adapters stored in the weights, merged on loading"
        return note("format", message, "--fix OUT writes merged weights, which other programs can read")
    layout = "transformers' own layout (internvl)" if subject.kind == "native" else "original layout (internvl_chat)"
    return Finding("format", "ok", f"{CONFIG}: {layout} around {llm}")


def _layers(subject: Subject) -> Iterator[Finding]:
    if not subject.chat:
        return
    layer, layers = subject.config.select_layer, subject.config.vision_config.num_hidden_layers
    if not -layers - 1 <= layer <= layers:
        yield problem(
            "format",
            f"{CONFIG}: select_layer {layer}, but the encoder has {layers} layers (hidden states 0 to {layers})",
            f"set select_layer to -1 or to a number from {-layers - 1} to {layers}",
        )


def _stumbling_blocks(subject: Subject) -> Iterator[Finding]:
    """Fields that this package understands and others do not."""
    fix = "--fix OUT writes a clean config.json"
    parts: dict[str, dict[str, Any]] = {
        name: subject.values[name]
        for name in ("vision_config", "llm_config", "text_config")
        if isinstance(subject.values.get(name), dict)
    }
    pins = {f"{name}.{key}={part[key]!r}" for name, part in parts.items() for key in _PINS if part.get(key)}
    if pins:
        message = f"{CONFIG}: {', '.join(sorted(pins))}; ignored here, elsewhere a load fails without it"
        yield note("format", message, fix)
    for where, part in {"": subject.values, "llm_config.": parts.get("llm_config", {})}.items():
        if "architectures" in part and not any(part["architectures"] or ()) and subject.config is not None:
            message = f"{CONFIG}: {where}architectures names no class; the original code cannot choose one"
            yield note("format", message, fix)
    for name, part in parts.items():
        for key in ("rope_scaling", "rope_parameters"):
            rope = part.get(key)
            if isinstance(rope, dict) and "su" in (rope.get("type"), rope.get("rope_type")):
                message = f"{CONFIG}: {name}.{key} has type 'su', which transformers 5 itself refuses (it is longrope)"
                yield note("format", message, fix)
        rope = part.get("rope_parameters")
        if isinstance(rope, dict) and "rope_theta" in rope and "rope_theta" not in part:
            message = (
                f"{CONFIG}: {name}.rope_theta is only in rope_parameters; transformers 4 then uses 10000 silently"
            )
            yield note("format", message, fix)
