"""What must never be published: credentials, wherever they hide in the files of a checkpoint.

Only common forms are known. This catches accidents (a token in a model card, a configuration, a log in the header of a
weight file); it is no proof that there is none.
"""

from __future__ import annotations

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
    "a credential": (
        rb"(?i)\b(?:api_?key|secret(?:_access)?_key|password|access_token)[\"']?\s*[:=]\s*[\"'][^\"'\s]{12,}[\"']"
    ),
}


class SecretError(ValueError):
    """A file that would be published holds what looks like a credential."""


def refuse_secrets(files: Iterable[Path]) -> None:
    """Raise `SecretError` if a file holds what looks like a credential; of weights only the header is read.

    The message names file, line and kind, never the secret. Placeholders of few different characters may pass.
    """
    for file in files:
        content = _header(file) if file.suffix == ".safetensors" else file.read_bytes()
        for kind, pattern in SECRETS.items():
            for match in re.finditer(pattern, content):
                if len(set(match[0])) > 8:
                    line = content.count(b"\n", 0, match.start()) + 1
                    raise SecretError(
                        f"{file.name}, line {line}, holds {kind}: remove it, and revoke it if it is real"
                    )


def _header(weights: Path) -> bytes:
    with weights.open("rb") as file:
        return file.read(min(int.from_bytes(file.read(8), "little"), 100_000_000))
