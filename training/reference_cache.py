"""Precomputed log-probabilities of the reference: which they are, and where they lie on the disk.

Parts are written complete or not at all, by every rank its own, so that an interrupted pass goes on where it stopped.
The pass itself is `reference_pass`.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from torch import nn

from ..data.lengths import hash_of
from ..data.mixture import Mixture

REFERENCE_CACHE = Path(HF_HOME) / "internvl" / "references"
_MISSING = -np.inf  # no answer is impossible


# Parameters of adapters, and what peft adds to the names of the others.
_ADAPTERS = re.compile(r"\.(?:lora_\w+|modules_to_save)\.")
_ADDED = re.compile(r"^base_model\.model\.|base_layer\.|original_module\.")


def weights_identity(model: nn.Module, below_adapters: bool = False) -> str:
    """Hash of every parameter and saved buffer, by name, type and content.

    Args:
        model: The model.
        below_adapters: Leave out its adapters, which do nothing yet: the hash is that of the model without them.

    Raises:
        ValueError: the weights are not in this process.
    """
    digest, named = hashlib.blake2b(digest_size=16), model.state_dict()
    if below_adapters:
        named = {_ADDED.sub("", name): tensor for name, tensor in named.items() if not _ADAPTERS.search(name)}
    for name, tensor in sorted(named.items()):
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            raise ValueError(
                "precompute_reference recognises weights by their content, which is not in this process (ZeRO-3, or "
                "FSDP with cpu_ram_efficient_loading): set preference.reference_path instead"
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_random_rows(dataset: Any) -> None:
    """Values belong to one input: refuses rows whose pictures or frames are drawn anew each epoch.

    Raises:
        ValueError: a data set has JPEG augmentation, or videos with random frames.
    """
    for name, settings, rows in _settings(dataset):
        if settings.data_augment:
            raise ValueError(
                f"{name}: precompute_reference needs the same pictures in every epoch, but data_augment is on: turn "
                "it off, or precompute_reference"
            )
        videos = settings.frame_sampling == "rand" and next(
            (record for row in rows if (record := dataset.records[row].chosen).videos), None
        )
        if videos:
            raise ValueError(
                f"{name}: precompute_reference needs the same frames in every epoch, but {videos.where} has a video "
                "and frame_sampling is rand: set data.frame_sampling to middle or fpsX, or turn precompute_reference "
                "off"
            )


def _settings(dataset: Any) -> list[tuple[str, Any, range]]:
    """Name, settings and rows of each source."""
    if not isinstance(dataset.records, Mixture):
        return [(dataset.name, dataset.settings, range(len(dataset)))]
    first, found = 0, []
    for name, size in dataset.source_sizes().items():
        if size:
            found.append((name, dataset.settings_of(first), range(first, first + size)))
        first += size
    return found


def cache_key(dataset: Any, identity: str, settings: Any) -> str | None:
    """Name of the values of a data set; None for records that come from no file, which cannot be recognised.

    Args:
        dataset: A `PreferenceDataset`.
        identity: `weights_identity` of the reference.
        settings: Whatever else the values depend on.
    """
    fingerprint = dataset.fingerprint()
    return None if fingerprint is None else hash_of("reference", fingerprint, identity, settings)


class ReferenceValues:
    """Log-probabilities of both answers of every row of a data set under the reference.

    Args:
        size: Rows of the data set.
        folder: Of the parts; None to keep the values in memory alone.
    """

    def __init__(self, size: int, folder: Path | None = None) -> None:
        self.folder = folder
        self.values = np.full((size, 2), _MISSING)
        self._read()

    def _read(self) -> None:
        """Takes in the parts on the disk; damaged ones are made again."""
        for path in sorted(self.folder.glob("part-*.npz")) if self.folder is not None else ():
            try:
                with np.load(path) as part:
                    self.values[part["rows"]] = part["values"]
            except (OSError, ValueError, KeyError, IndexError, EOFError):
                path.unlink(missing_ok=True)

    def missing(self, rows: np.ndarray) -> np.ndarray:
        """Those of `rows` that have no values, in order."""
        return rows[~np.isfinite(self.values[rows]).all(axis=1)]

    def add(self, rows: list[int], values: np.ndarray) -> None:
        """Keeps values, (rows, 2), and writes them as a part."""
        self.values[rows] = values
        if self.folder is None or not rows:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        name = uuid.uuid4().hex
        temporary = self.folder / f".{name}.tmp"
        with temporary.open("wb") as file:
            np.savez(file, rows=np.array(rows), values=values)
        os.replace(temporary, self.folder / f"part-{name}.npz")

    def share(self, device: torch.device) -> None:
        """Gives every rank the values of all."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            values = torch.from_numpy(self.values).to(device)
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
            self.values = values.cpu().numpy()

    def of(self, rows: list[int], device: torch.device) -> torch.Tensor:
        """(2P,) float32, chosen, rejected, chosen, ...

        Raises:
            ValueError: a row has none.
        """
        if len(missing := self.missing(np.array(rows, dtype=np.int64))):
            raise ValueError(
                f"row {missing[0]} has no precomputed reference value: it could not be read when they were made, or "
                "the data set is another one. Resume the run from its beginning, or turn precompute_reference off"
            )
        return torch.from_numpy(self.values[rows].reshape(-1)).to(device, torch.float32)
