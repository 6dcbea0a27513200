"""Tensors of a checkpoint folder: shapes from the headers first, values one at a time and only when asked for.

Reads safetensors (one file or shards with an index) and, where a folder has nothing else, pickled `.bin` weights. It
knows nothing of models: names and layouts belong to `weights_internvl.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint cannot be read; the message names the file and what to do, in one line."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values are read from disk, or computed from other tensors, each time they are asked for.

    transformers' loader takes it in a state dict: like a safetensors slice it is materialised by indexing.

    Args:
        shape: Of the tensor.
        dtype: Of the tensor.
        read: Returns the values, as a tensor of its own.
        sources: Names on disk of all tensors that go into it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor] = field(repr=False)
    sources: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.read()[index]

    def get_shape(self) -> list[int]:
        """As a safetensors slice."""
        return list(self.shape)

    def is_floating_point(self) -> bool:
        """As a tensor."""
        return self.dtype.is_floating_point

    @classmethod
    def of(cls, tensor: torch.Tensor, name: str = "") -> LazyTensor:
        """A tensor that is in memory already."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor, (name,) if name else ())


def derive(sources: Iterable[LazyTensor], compute: Callable[..., torch.Tensor]) -> LazyTensor:
    """The lazy result of `compute(*sources)`; its shape is found on the meta device, without reading anything.

    Args:
        sources: Read when the result is.
        compute: A pure function of tensors.
    """
    sources = tuple(sources)
    with torch.device("meta"):
        result = compute(*(torch.empty(source.shape, dtype=source.dtype) for source in sources))
    return LazyTensor(
        tuple(result.shape),
        result.dtype,
        lambda: compute(*(source.read() for source in sources)),
        tuple(name for source in sources for name in source.sources),
    )


@dataclass
class Weights:
    """What the headers of a folder say.

    Attributes:
        tensors: By name, as on disk.
        files: Name of the file of each tensor.
        paths: The weight files, in order; the index is not among them.
        problems: One line each: why parts of it cannot be read, or contradict each other. Empty for a sound folder.
    """

    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def checked(self) -> Weights:
        """Itself.

        Raises:
            CheckpointError: the first of its problems.
        """
        if self.problems:
            raise CheckpointError(self.problems[0])
        return self


def scan_weights(folder: str | Path) -> Weights:
    """Reads the headers of all weight files of `folder`; never raises for what it finds there (see `problems`)."""
    folder, weights = Path(folder), Weights()
    single, index = folder / SINGLE, folder / INDEX
    if single.is_file() and index.is_file():
        weights.problems.append(f"{folder} has both {SINGLE} and {INDEX}: remove the stale one.")
    if index.is_file():
        _scan_shards(folder, index, weights)
    elif single.is_file():
        _scan_file(single, weights)
    elif not _scan_pickled(folder, weights):
        weights.problems.append(_nothing_found(folder))
    return weights


def scan_files(paths: Iterable[str | Path]) -> Weights:
    """`scan_weights` for known files instead of a folder."""
    weights = Weights()
    for path in map(Path, paths):
        (_scan_file if path.suffix == ".safetensors" else _scan_pickle)(path, weights)
    return weights


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    if not path.is_file():
        raise CheckpointError(f"{path.parent} has no {path.name}.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}): fetch it again.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not an object: fetch it again.")
    return value


def _nothing_found(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder."
    if (folder / "adapter_model.safetensors").is_file():
        return f"{folder} holds a PEFT adapter, not a model: merge it into its base model first."
    return f"{folder} has no weights: looked for {SINGLE}, {INDEX} and {PICKLED}."


def _scan_shards(folder: Path, index: Path, weights: Weights) -> None:
    try:
        weight_map = read_json(index).get("weight_map")
    except CheckpointError as error:
        weights.problems.append(str(error))
        return
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        weights.problems.append(f"{index} has no weight_map of tensor names to files: fetch it again.")
        return
    for name in sorted(set(weight_map.values())):
        if Path(name).name != name:
            weights.problems.append(f"{index} names {name}, outside its folder: correct the index.")
        elif not (folder / name).is_file():
            weights.problems.append(f"{folder} lacks the shard {name} that {INDEX} names: fetch it.")
        else:
            _scan_file(folder / name, weights)
    if any(problem for problem in weights.problems if INDEX in problem or "damaged" in problem):
        return
    for wrong, verb in (
        ([k for k, name in weight_map.items() if weights.files.get(k) != name], "places wrongly"),
        ([k for k in weights.files if k not in weight_map], "does not name"),
    ):
        if wrong:
            examples = ", ".join(sorted(wrong)[:3])
            weights.problems.append(
                f"{index} {verb} {len(wrong)} tensor(s) of its shards, such as {examples}: write the index anew."
            )


def _scan_file(path: Path, weights: Weights) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dictionary)
                header = file.get_slice(name)
                shape, kind = tuple(header.get_shape()), header.get_dtype()
                if kind not in _DTYPES:
                    weights.problems.append(f"{path}: {name} has dtype {kind}, which is not supported here.")
                    continue
                if name in weights.files:
                    weights.problems.append(
                        f"{name} is in {weights.files[name]} and in {path.name}: remove one of them."
                    )
                weights.tensors[name] = LazyTensor(shape, _DTYPES[kind], _reader(path, name), (name,))
                weights.files[name] = path.name
    except (SafetensorError, OSError) as error:
        weights.problems.append(f"{path} is damaged or incomplete ({error}): fetch it again.")
        return
    except RuntimeError as error:  # the system refuses to map a very large file
        weights.problems.append(f"{path} cannot be mapped into memory ({error}).")
        return
    weights.paths.append(path)


def _reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


def _scan_pickled(folder: Path, weights: Weights) -> bool:
    """Maps `.bin` files, code in them refused; True where there were any."""
    index = folder / PICKLED_INDEX
    try:
        shards = set(read_json(index)["weight_map"].values()) if index.is_file() else {PICKLED}
    except (CheckpointError, KeyError, AttributeError):
        weights.problems.append(f"{index} is not an index of weights: fetch it again.")
        return True
    if not index.is_file() and not (folder / PICKLED).is_file():
        return False
    for name in sorted(shards):
        path = folder / name
        if not path.is_file():
            weights.problems.append(f"{folder} lacks the shard {name} that {PICKLED_INDEX} names: fetch it.")
            continue
        _scan_pickle(path, weights)
    return True


def _scan_pickle(path: Path, weights: Weights) -> None:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # noqa: BLE001 (pickle, zip and torch each raise their own)
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        weights.problems.append(f"{path} is damaged or not a plain state dict ({line}): fetch it again.")
        return
    weights.paths.append(path)
    for key, tensor in state.items():
        weights.tensors[key] = LazyTensor.of(tensor, key)
        weights.files[key] = path.name
