"""GGUF files opened for comparison: what they hold under which name, read through the `gguf` package.

The files of one model (shards too) are one `GgufModel`; values are read one tensor at a time. Nothing is written and
nothing is known of checkpoints here; what the names mean is in `tensors.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...checkpoint_internvl import CheckpointError
from ..source import one_line

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
MMPROJ, TEXT = "mmproj", "text"
_INSTALL = "GGUF files are read with the package gguf: pip install gguf"


def gguf_package() -> Any:
    """The module `gguf`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        if "gguf" not in str(error):
            raise
        raise ImportError(_INSTALL) from error
    return gguf


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file.

    Attributes:
        shape: As in torch, the slowest axis first (GGUF stores them the other way round).
        kind: GGUF's type, such as "F16" or "Q4_K".
        entry: Of `gguf.GGUFReader`; its data lie in the mapped file.
    """

    shape: tuple[int, ...]
    kind: str
    entry: Any = field(repr=False)

    @property
    def bits(self) -> int:
        """Whole bits of an element, scales of its block included."""
        block, size = gguf_package().GGML_QUANT_SIZES[self.entry.tensor_type]
        return 8 * size // block

    def read(self) -> torch.Tensor:
        """The values as float32, dequantised.

        Raises:
            NotImplementedError: the gguf package cannot dequantise this type.
        """
        package = gguf_package()
        values = package.quants.dequantize(self.entry.data, self.entry.tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32)).reshape(self.shape)  # a copy: the file is mapped


@dataclass
class GgufModel:
    """The files of one model.

    Attributes:
        kind: "mmproj" (encoder and projector) or "text".
        paths: Its files.
        values: Metadata by key; of shards, the first that has the key.
        tensors: By name.
        doubled: Names that are in two of the files.
    """

    kind: str
    paths: list[Path] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, GgufTensor] = field(default_factory=dict)
    doubled: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For messages."""
        return self.paths[0].name if len(self.paths) == 1 else f"{self.paths[0].name} and {len(self.paths) - 1} more"

    @property
    def shards(self) -> int:
        """How many files there should be."""
        return int(self.values.get("split.count") or 1)

    def add(self, path: Path, reader: Any) -> None:
        """Adds what a file holds."""
        self.paths.append(path)
        for key, value in reader.fields.items():
            self.values.setdefault(key, value.contents())
        for entry in reader.tensors:
            if entry.name in self.tensors:
                self.doubled.append(entry.name)
            shape = tuple(int(size) for size in reversed(entry.shape))
            self.tensors[entry.name] = GgufTensor(shape, entry.tensor_type.name, entry)


def open_gguf(paths: Iterable[str | Path]) -> dict[str, GgufModel]:
    """Opens files; each belongs to the encoder with its projector, or to the language model.

    Args:
        paths: GGUF files, all shards of a model that is split.

    Returns:
        "mmproj" and "text", those that there are.

    Raises:
        CheckpointError: a file is missing or is no readable GGUF.
        ImportError: the package `gguf` is not installed.
    """
    package = gguf_package()
    found: dict[str, GgufModel] = {}
    for path in map(Path, paths):
        if not path.is_file():
            raise CheckpointError(f"{path} is no file: give the GGUF files that the converter wrote.")
        try:
            reader = package.GGUFReader(path)
        except Exception as error:  # noqa: BLE001 (numpy, struct and gguf each raise their own for a damaged file)
            raise CheckpointError(f"{path} is no readable GGUF file ({one_line(error)}): convert again.") from None
        kind = _kind(reader)
        found.setdefault(kind, GgufModel(kind)).add(path, reader)
    return found


def _kind(reader: Any) -> str:
    """Shards after the first have no architecture, so the names of the tensors decide there."""
    architecture = reader.fields.get("general.architecture")
    if architecture is not None:
        return MMPROJ if architecture.contents() == "clip" else TEXT
    names = [entry.name for entry in reader.tensors]
    return MMPROJ if names and all(name.startswith(("v.", "mm.")) for name in names) else TEXT
