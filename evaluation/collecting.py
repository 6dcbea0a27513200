"""Asks an engine what an answer store lacks, batch by batch.

The batches are fixed by the whole list of requests: not by what is missing, nor by how the list is shared out. So a
collection that was interrupted, or split into shards, gives the samples of one that ran through in one process, as far
as the engine itself is deterministic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from .answer_store import AnswerStore, Entry
from .engines import Answer, Engine, Failure, Request, Sampling

Requests = Sequence[tuple[str, Request]]


def collection_settings(
    requests: Requests, engine: Engine, sampling: Sampling, batch_size: int, **more: Any
) -> dict[str, Any]:
    """The settings of an `AnswerStore`: all that the answers of a collection depend on.

    Args:
        requests: All of them, as for `collect`.
        engine: Gives its name.
        sampling: How answers are drawn.
        batch_size: As for `collect`; samples are drawn batch by batch.
        **more: Other things worth refusing to mix, as json values.
    """
    return {
        "model": engine.name,
        "sampling": asdict(sampling),
        "batch_size": batch_size,
        "requests": len(requests),
        "requests_digest": requests_digest(requests),
        **more,
    }


def requests_digest(requests: Requests) -> str:
    """Hash of keys, texts and names of media, 32 hexadecimal digits.

    Files are known by their names, so that they may be moved to another folder, and their contents are not read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, request in requests:
        images = [_name(image) for image in request.images]
        videos = [(_name(video.path), video.clip, video.frames) for video in request.videos]
        parts = (key, request.text, request.system, request.prefix, request.max_tiles, images, videos)
        digest.update(repr(parts).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _name(medium: Any) -> Any:
    if isinstance(medium, Image.Image):
        return hashlib.blake2b(medium.tobytes(), digest_size=16).hexdigest()
    if isinstance(medium, tuple):
        return [_name(part) for part in medium]
    return medium.name if isinstance(medium, Path) else str(medium)


def collect(
    requests: Requests,
    engine: Engine,
    sampling: Sampling,
    store: AnswerStore,
    batch_size: int,
    progress: bool = True,
    retry_failures: bool = False,
) -> None:
    """Runs the requests of the store's shard that it has no entry for, and appends their entries.

    Batches are cut from the whole list, and shard i of n has every n-th of them from the i-th. A batch of which an
    entry is missing is asked again as a whole, and only what was missing is kept.

    Args:
        requests: (key, request) of all shards, keys unique.
        engine: Answers them.
        sampling: How; each batch has a seed of its own, from `sampling.seed` and its first key.
        store: Gets `{"key", "answers": [{"text", "complete"}, ...]}` or `{"key", "error"}`.
        batch_size: Requests that are handed to the engine at once.
        progress: Show a bar.
        retry_failures: Also ask again what the store has as failed.

    Raises:
        ValueError: two requests have the same key, or `batch_size` is below 1.
        RuntimeError: the engine gave another number of results than requests.
    """
    batches = _batches(requests, batch_size)[store.shard :: store.shards]
    done = store.keys() - store.failed_keys() if retry_failures else store.keys()
    total = sum(map(len, batches))
    store.append([])
    with tqdm(total=total, desc="Asking", unit=" questions", disable=not progress) as bar:
        for batch in batches:
            missing = {key for key, _ in batch} - done
            if missing:
                entries = _ask(batch, engine, sampling)
                store.append([entry for entry in entries if entry["key"] in missing])
            bar.update(len(batch))
            if failed := len(store.failed_keys()):
                bar.set_postfix(failed=failed)


def batch_seed(seed: int, first_key: str) -> int:
    """The seed of a batch, from 0 to 2**31 - 1, which every engine takes."""
    digest = hashlib.blake2b(f"{seed} {first_key}".encode("utf-8", "backslashreplace"), digest_size=4)
    return int.from_bytes(digest.digest(), "big") >> 1


def _batches(requests: Requests, batch_size: int) -> list[Requests]:
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    seen: set[str] = set()
    for key, _ in requests:
        if key in seen:
            raise ValueError(f"two requests have the key {key!r}; keys must be unique")
        seen.add(key)
    return [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]


def _ask(batch: Requests, engine: Engine, sampling: Sampling) -> list[Entry]:
    seeded = replace(sampling, seed=batch_seed(sampling.seed, batch[0][0]))
    results = engine.sample([request for _, request in batch], seeded)
    if len(results) != len(batch):
        raise RuntimeError(f"engine {engine.name!r} gave {len(results)} results for {len(batch)} requests")
    return [_entry(key, result) for (key, _), result in zip(batch, results, strict=True)]


def _entry(key: str, result: list[Answer] | Failure) -> Entry:
    if isinstance(result, Failure):
        return {"key": key, "error": result.reason}
    return {"key": key, "answers": [{"text": answer.text, "complete": answer.complete} for answer in result]}


def result_of(entry: Mapping[str, Any]) -> list[Answer] | Failure:
    """An entry of a store as the engine gave it."""
    if "error" in entry:
        return Failure(entry["error"])
    return [Answer(answer["text"], answer["complete"]) for answer in entry["answers"]]


def read_answers(entries: Sequence[Mapping[str, Any]]) -> dict[str, list[Answer] | Failure]:
    """Entries of a store as the engine gave them, by key."""
    return {entry["key"]: result_of(entry) for entry in entries}
