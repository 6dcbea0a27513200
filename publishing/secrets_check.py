"""What must never be published: credentials, wherever they hide in the files of a checkpoint.

Only common forms are known. This catches accidents (a token in a model card, a configuration, a log in the header of a
weight file); it is no proof that there is none.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable
from pathlib import Path

SECRETS = {
    "a Hugging Face token": rb"\bhf_[A-Za-z0-9]{30,}\b",
    "an AWS access key": rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY",
    "a GitHub token": rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b",
    "an API key": rb"\b(?:sk-(?:[a-z0-9]+-)?[A-Za-z0-9_-]{32,}|AIza[0-9A-Za-z_-]{35})\b",
    "a Slack token": rb"\bxox[abeoprs]-[A-Za-z0-9-]{10,}",
    "a password in an address": rb"\bhttps?://[^\s/:@\"'<>{}]+:[^\s/:@\"'<>{}]+@[\w.-]+",
    "a GitLab token": rb"\bglpat-[A-Za-z0-9_-]{20,}",
    "a credential": rb"(?i)(?<![a-z0-9])NAME[\"']?\s*[:=]\s*[\"'][^\"'\s]{12,}[\"']",
    # Without quotes, as in shell, YAML and INI files; what follows tells a value from an expression of a program.
    "a credential without quotes": rb"(?i)(?<![a-z0-9])NAME[\"']?[^\S\n]*[:=][^\S\n]*([\w+/=~-]{12,})(?![\w.(\[])",
}
_NAME = rb"(?:api[_-]?key|secret(?:[_-]access)?[_-]key|password|passwd|(?:access|auth|hub|hf)[_-]token)"
_PATTERNS = {kind: re.compile(pattern.replace(b"NAME", _NAME)) for kind, pattern in SECRETS.items()}
_BOMS = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


class SecretError(ValueError):
    """A file that would be published holds what looks like a credential."""


def refuse_secrets(files: Iterable[Path]) -> None:
    """Raise `SecretError` if a file holds what looks like a credential; of weights only the header is read.

    The message names file, line and kind, never the secret. Placeholders of few different characters may pass.
    """
    for file in files:
        content = _header(file) if file.suffix == ".safetensors" else _text(file.read_bytes())
        for kind, pattern in _PATTERNS.items():
            for match in pattern.finditer(content):
                if _is_random(match[1]) if match.lastindex else len(set(match[0])) > 8:
                    line = content.count(b"\n", 0, match.start()) + 1
                    raise SecretError(
                        f"{file.name}, line {line}, holds {kind}: remove it, and revoke it if it is real"
                    )


def card_sources(checkpoint: Path) -> list[Path]:
    """The files of a run that its model card is made of: what they hold would be published under another name."""
    made = not (checkpoint / "README.md").is_file()
    return [path for name in ("recipe.yaml", "report.md") if made and (path := checkpoint / name).is_file()]


def _is_random(value: bytes) -> bool:
    """Whether a value without quotes is no word, number or name of a variable."""
    kinds = [re.search(kind, value) for kind in (rb"[0-9]", rb"[a-z]", rb"[A-Z]")]
    mixed = all(kinds) if b"_" in value else kinds[0] and (kinds[1] or kinds[2])
    return bool(mixed) and len(set(value)) > 8


def _text(content: bytes) -> bytes:
    """Content in UTF-8 where a mark at its beginning says that it is UTF-16 or UTF-32."""
    encoding = next((name for mark, name in _BOMS.items() if content.startswith(mark)), None)
    return content.decode(encoding, "replace").encode("utf-8", "replace") if encoding else content


def _header(weights: Path) -> bytes:
    with weights.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000))
