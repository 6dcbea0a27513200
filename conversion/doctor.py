"""`internvl doctor`: what is wrong with a checkpoint, found from its small files and the headers of its weights.

It finds and explains; `conversion/convert.py` repairs (`--fix`), `conversion/golden.py` writes reference prompts and
pixels (`--golden`). The checks themselves are in the files `checks*.py`.
"""

from __future__ import annotations

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError
from transformers.modeling_utils import str_to_torch_dtype

from ..checkpoint_internvl import CheckpointError, LazyTensor, Weights, scan_weights
from .checks import Finding, Subject, check_format, one_line, quiet, split_fix
from .checks_code import check_code
from .checks_processor import check_generation, check_processor
from .checks_template import check_template
from .checks_tokenizer import check_tokenizer
from .checks_weights import check_family, check_weights
from .folders import resolve
from .serving import known_engines, serving_findings

__all__ = ["Diagnosis", "Finding", "inspect", "run"]

HEALTHY, PROBLEMS, NOT_INSPECTED = 0, 1, 2
_WIDTH = 119
_CHECKS = {
    "format": check_format,
    "family": check_family,
    "weights": check_weights,
    "tokenizer": check_tokenizer,
    "template": check_template,
    "processor": check_processor,
    "generation": check_generation,
    "code": check_code,
}


@dataclass
class Diagnosis:
    """What was found, in the order of the areas.

    Attributes:
        path: The folder or Hub name, as given.
        findings: All of them, also those that are in order.
    """

    path: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """No problem; notes do not count."""
        return not any(finding.level == "problem" for finding in self.findings)

    def table(self) -> str:
        """Plain text for a terminal: one entry per finding, wrapped at 119 columns."""
        count = Counter(finding.level for finding in self.findings)
        parts = [f"{count[level]} {level}{'s' * (count[level] != 1)}" for level in ("problem", "note") if count[level]]
        verdict = ", ".join(["healthy"] * self.healthy + parts)
        return "\n".join([f"{self.path}: {verdict}", "", *map(_entry, self.findings)])

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `path`, `healthy` and `findings`, each with `area`, `level`, `message` and `fix`."""
        return {
            "path": self.path,
            "healthy": self.healthy,
            "findings": [asdict(finding) for finding in self.findings],
        }


def _entry(finding: Finding) -> str:
    label = f"{finding.level:<9}{finding.area:<12}"
    indent = " " * len(label)
    lines = _wrapped(finding.message, label, indent)
    if finding.fix:
        lines += _wrapped(finding.fix, f"{indent}-> ", f"{indent}   ")
    return "\n".join(lines)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest, break_long_words=False, break_on_hyphens=False
    )


def inspect(name_or_path: str | Path, serving: Sequence[str] = (), **hub_options: Any) -> Diagnosis:
    """Looks a checkpoint over without reading weights or running any code of it.

    Args:
        name_or_path: A folder, or a Hub repository, of which only the small files and the weights' headers are
            fetched.
        serving: Inference engines (`serving.ENGINES`) that it is also held against, in an area "serving".
        **hub_options: `revision`, `cache_dir`, `token`, `local_files_only`.

    Raises:
        CheckpointError: there is no such folder or repository, or no readable configuration in it.
        ValueError: unknown engine.
    """
    engines = known_engines(serving)
    folder = resolve(name_or_path, weights=False, **hub_options)
    weights = scan_weights(folder)
    if weights.problems and not Path(name_or_path).is_dir():
        weights = _hub_weights(str(name_or_path), hub_options)
    with quiet():
        subject = Subject.open(folder, weights)
        findings = [finding for area in _CHECKS for finding in _checked(area, subject)]
        findings += serving_findings(subject, engines) if engines else []
    return Diagnosis(str(name_or_path), findings)


def _checked(area: str, subject: Subject) -> list[Finding]:
    """The findings of one area; a file so odd that its check fails is a finding, and no reason to stop."""
    findings: list[Finding] = []
    try:
        for finding in _CHECKS[area](subject):
            findings.append(finding)
    except Exception as error:  # files from anywhere can make a check raise anything
        cause, fix = split_fix(one_line(error), "look at the files of this area by hand")
        findings.append(Finding(area, "problem", f"cannot be checked: {type(error).__name__}: {cause}", fix))
    return findings


def _hub_weights(repository: str, options: dict[str, Any]) -> Weights:
    """What the headers of a repository's safetensors files say, without downloading the files."""
    weights = Weights()
    try:
        metadata = get_safetensors_metadata(repository, revision=options.get("revision"), token=options.get("token"))
    except NotASafetensorsRepoError:
        weights.problems.append(f"{repository} has no safetensors weights: fetch it and inspect the folder.")
        return weights
    except (SafetensorsParsingError, HfHubHTTPError, OSError, ValueError) as error:
        weights.problems.append(f"the weights' headers of {repository} cannot be read ({one_line(error)}).")
        return weights
    for file, header in metadata.files_metadata.items():
        for name, tensor in header.tensors.items():
            dtype = str_to_torch_dtype.get(tensor.dtype)
            if dtype is None:
                weights.problems.append(f"{file}: {name} has dtype {tensor.dtype}, which is not supported here.")
                continue
            weights.tensors[name] = LazyTensor(tuple(tensor.shape), dtype, _refuse, (name,))
            weights.files[name] = file
    lost = sorted(name for name, file in metadata.weight_map.items() if weights.files.get(name) != file)
    if lost:
        weights.problems.append(f"the index of {repository} places {len(lost)} tensors wrongly, such as {lost[0]}.")
    return weights


def _refuse() -> Any:
    raise CheckpointError("only the headers of these weights were fetched: fetch the checkpoint to read tensors.")


# -------------------------------------------------------------------------------------------------------- command line


def run(
    path: str | Path,
    fix: Path | None = None,
    golden: Path | None = None,
    json: bool = False,
    serving: Sequence[str] = (),
) -> int:
    """Inspects a checkpoint, prints what was found, and on request repairs it or writes reference data.

    Args:
        path: A folder or a Hub repository.
        fix: Where to write a repaired copy (`convert.upgrade`), which is then inspected too.
        golden: Where to write reference prompts and pixels (`golden.golden`), of the repaired copy if there is one.
        json: Print one JSON object instead of tables; repairs and reference data are listed in it.
        serving: Inference engines to hold it against, as of `inspect`.

    Returns:
        0: healthy (after `fix`: the copy is); 1: there are problems, or something could not be written; 2: cannot be
        inspected.
    """
    report: dict[str, Any] = {}
    try:
        diagnosis = inspect(path, serving)
    except (ValueError, RecursionError) as error:  # the second: JSON nested without end
        return _fail(str(error), NOT_INSPECTED, {"path": str(path), "healthy": False}, json)
    report |= diagnosis.to_dict()
    _say(diagnosis.table(), json)
    try:
        if fix is not None:
            diagnosis = _fixed(path, fix, report, json, serving)
        if golden is not None:
            from .golden import golden as write_golden

            report["golden"] = str(write_golden(fix if fix is not None else path, golden))
            _say(f"\nReference prompts and pixels are in {report['golden']}.", json)
    except (ValueError, OSError, ImportError, RecursionError) as error:
        return _fail(str(error), PROBLEMS, report, json)
    if json:
        _print_json(report)
    return HEALTHY if diagnosis.healthy else PROBLEMS


def _fixed(path: str | Path, fix: Path, report: dict[str, Any], json: bool, serving: Sequence[str]) -> Diagnosis:
    from .convert import upgrade

    done = upgrade(path, fix, progress=not json)
    diagnosis = inspect(fix, serving)
    report["fixed"] = diagnosis.to_dict()
    _say(f"\n{done}\n\n{diagnosis.table()}", json)
    return diagnosis


def _say(text: str, json: bool) -> None:
    if not json:
        print(text)


def _fail(message: str, code: int, report: dict[str, Any], json: bool) -> int:
    if json:
        _print_json({**report, "error": message})
    print(f"internvl doctor: {message}", file=sys.stderr)
    return code


def _print_json(report: dict[str, Any]) -> None:
    print(json.dumps(report, indent=2, ensure_ascii=False))
