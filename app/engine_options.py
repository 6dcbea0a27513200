"""Where a command's questions are answered: options of the model in this process or of a server, and the engine."""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.engines import Engine

# Modules that load torch are imported where they are needed, so that help and errors come at once.

_KINDS = ("vllm", "sglang", "lmdeploy", "internvl", "other")
_ANY_MODEL = "auto"
_SAMPLE = 1 << 16


def add_engine_options(group: argparse._ArgumentGroup) -> None:
    """Options that `make_engine` reads; the command itself has `model` and `batch_size`."""
    group.add_argument("--server", metavar="URL", help="an OpenAI-compatible server instead of this process")
    group.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    group.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    group.add_argument("--server-kind", choices=_KINDS, help="(default: what the server says that it is)")
    group.add_argument("--device", metavar="NAME", help="of the model (default: cuda if there is one)")
    group.add_argument("--dtype", metavar="NAME", help="of the weights (default: bfloat16 on cuda, else as stored)")


def parse_shard(text: str) -> tuple[int, int]:
    """`1/4` as (1, 4).

    Raises:
        argparse.ArgumentTypeError: something else, or a shard that there is not.
    """
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N-1, such as 0/4, got {text!r}")
    return int(match[1]), int(match[2])


def make_engine(options: argparse.Namespace, num_frames: int, exif: bool) -> tuple[Engine, dict[str, Any]]:
    """The engine that the options describe, and what else its answers depend on.

    Raises:
        ValueError, OSError: the checkpoint or the server cannot be used.
    """
    media = {"num_frames": num_frames, "exif": exif}
    if options.server is None:
        engine, details = _local_engine(options, media)
        return engine, {**details, **media}
    from ..evaluation.server_engine import ServerEngine

    name = None if options.model == _ANY_MODEL else options.model
    more = {"concurrency": options.concurrency, "kind": options.server_kind, **media}
    server = ServerEngine(options.server, name, _key(options.api_key_env), **more)
    return server, {"backend": server.kind, **media}


def _key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise ValueError(f"--api-key-env: the environment has no {variable}")
    return os.environ[variable] if variable is not None else None


def _local_engine(options: argparse.Namespace, media: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    import torch

    from ..conversion.folders import resolve
    from ..evaluation.local_engine import LocalEngine
    from ..modeling_internvl_chat import InternVLChatModel
    from ..processing_internvl import InternVLProcessor

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("bfloat16" if device.startswith("cuda") else "auto")
    folder = resolve(options.model)
    model: Any = InternVLChatModel.from_pretrained(folder, dtype=dtype)
    model.to(device)
    engine = LocalEngine(model, InternVLProcessor.from_pretrained(folder), options.batch_size, **media)
    engine.name = str(options.model).rstrip("/")
    dtype = str(model.dtype).removeprefix("torch.")
    return engine, {"backend": "local", "dtype": dtype, "weights": weights_digest(folder)}


def weights_digest(folder: Path) -> str:
    """Hash of the weight files of a checkpoint, 16 hexadecimal digits: of their sizes, middles and ends.

    Enough to tell a checkpoint that was trained on from the one before it, without reading it all.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in (size // 2, max(0, size - _SAMPLE)):
                file.seek(place)
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()
