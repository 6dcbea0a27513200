"""Changes to the files of a checkpoint for tests of what reads them; no tests here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def edit(folder: Path, file: str, /, **changes: Any) -> None:
    """Changes fields of a JSON file, which need not exist; `a__b` is field b of a, None removes it."""
    path = folder / file
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for key, value in changes.items():
        *outer, last = key.split("__")
        part = values
        for step in outer:
            part = part[step]
        part[last] = value
        if value is None:
            del part[last]
    path.write_text(json.dumps(values), encoding="utf-8")
