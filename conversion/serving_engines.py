"""Engines, verdicts and what the serving rules share; the rules are in the other files `checks_serving*.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .checks import Subject

CLEAN = "--fix OUT writes a clean folder"


@dataclass(frozen=True)
class Engine:
    """Name and the version whose source was read."""

    title: str
    version: str


@dataclass(frozen=True)
class Verdict:
    """What a rule says of some engines; level, message and fix as of `checks.Finding`."""

    engines: tuple[str, ...]
    level: str
    message: str
    fix: str


ENGINES = {
    "vllm": Engine("vLLM", "0.33.0"),
    "lmdeploy": Engine("LMDeploy", "0.18.0"),
    "sglang": Engine("SGLang", "0.5.23"),
}
ALL = tuple(ENGINES)
VLLM, LMDEPLOY, SGLANG = (("vllm",), ("lmdeploy",), ("sglang",))


def is_original(subject: Subject) -> bool:
    """Whether the original layout is on disk, adapters included."""
    return subject.kind in ("original", "adapters")


def refuses(engines: tuple[str, ...], message: str, fix: str) -> Verdict:
    """A verdict of the level problem."""
    return Verdict(engines, "problem", message, fix)


def needs(engines: tuple[str, ...], message: str, fix: str) -> Verdict:
    """A verdict of the level note."""
    return Verdict(engines, "note", message, fix)


def language_part(subject: Subject) -> tuple[str, dict[str, Any]]:
    """The name of the language model's part of `config.json`, and the part."""
    name = "text_config" if subject.kind == "native" else "llm_config"
    part = subject.values.get(name)
    return name, part if isinstance(part, dict) else {}
