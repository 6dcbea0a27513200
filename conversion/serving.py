"""Whether the files of a checkpoint are what vLLM, LMDeploy and SGLang read, field by field.

`check_serving` reads small files and the headers of the weights; no engine is imported and nothing of the checkpoint
runs. What each engine reads was looked up in the source of the versions in `ENGINES`; docs/serving.md has the table.
Speed, memory and the engine's kernels (head sizes, devices) are not judged. The rules are in `checks_serving*.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..checkpoint_internvl import scan_weights
from .checks import Finding, Subject, one_line, quiet
from .checks_serving import MODEL_RULES, architecture, readable
from .checks_serving_prompts import PROMPT_RULES
from .folders import resolve
from .serving_engines import ENGINES, Verdict

__all__ = ["AREA", "ENGINES", "check_serving", "serving_findings"]

AREA = "serving"


def check_serving(
    name_or_path: str | Path, engines: Sequence[str] = tuple(ENGINES), **hub_options: Any
) -> list[Finding]:
    """What would keep an inference engine from serving a checkpoint as it was trained.

    Args:
        name_or_path: A folder, or a Hub repository, which is fetched with its weights.
        engines: Any of `ENGINES`: `vllm`, `lmdeploy`, `sglang`.
        **hub_options: `revision`, `cache_dir`, `token`, `local_files_only`.

    Returns:
        Findings of the area `serving`. "problem": an engine refuses the folder or computes something else, whatever
        its options; "note": it needs an option, or cannot do something; "ok": one per engine without a problem.

    Raises:
        CheckpointError: there is no such folder or repository, or no readable configuration in it.
        ValueError: unknown engine.
    """
    engines = known_engines(engines)
    folder = resolve(name_or_path, **hub_options)
    with quiet():
        return serving_findings(Subject.open(folder, scan_weights(folder)), engines)


def known_engines(engines: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, in the order of `ENGINES`; ValueError for one that is not there."""
    names = (engines,) if isinstance(engines, str) else tuple(engines)
    if wrong := [name for name in names if name not in ENGINES]:
        raise ValueError(f"engines has {wrong[0]!r}; choose among {', '.join(ENGINES)}.")
    return tuple(name for name in ENGINES if name in names)


def serving_findings(subject: Subject, engines: Sequence[str] = tuple(ENGINES)) -> list[Finding]:
    """`check_serving` of a checkpoint that is open already."""
    rules = [architecture, readable]
    if subject.chat and subject.config is not None:
        rules += [*MODEL_RULES, *PROMPT_RULES]
    verdicts = [verdict for rule in rules for verdict in _applied(rule, subject)]
    found: list[Finding] = []
    refused: set[str] = set()
    for verdict in verdicts:
        concerned = [name for name in engines if name in verdict.engines]
        if concerned:
            refused |= set(concerned) if verdict.level == "problem" else set()
            message = f"{_listed(concerned)}: {verdict.message}"
            found.append(Finding(AREA, verdict.level, message, verdict.fix))
    accepted = [Finding(AREA, "ok", _accepted(name, subject)) for name in engines if name not in refused]
    return [*accepted, *found]


def _applied(rule: Any, subject: Subject) -> Iterable[Verdict]:
    """The verdicts of a rule; a file so odd that the rule fails is a problem for every engine."""
    try:
        return list(rule(subject))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, OSError, RuntimeError) as error:
        message = f"{rule.__doc__} cannot be checked: {type(error).__name__}: {one_line(error)}"
        return [Verdict(tuple(ENGINES), "problem", message, "look at the files of the folder by hand")]


def _listed(engines: Sequence[str]) -> str:
    names = [ENGINES[name].title for name in engines]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _accepted(name: str, subject: Subject) -> str:
    engine, layout = ENGINES[name], "transformers' own layout" if subject.kind == "native" else "the original layout"
    flag = "" if subject.kind == "native" else "; start it with --trust-remote-code"
    return f"{engine.title} {engine.version}: {layout} with every field that it reads{flag}"
