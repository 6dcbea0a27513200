"""What the demo page's server takes, and how much of it: an ASGI middleware between the web server and Gradio.

Gradio stores uploads of anybody without end, and has more addresses to post to than the page uses. Here the others are
closed, uploads are counted before they are written, and files that nobody has asked about are deleted. What a
single upload may be is `page_media.py`. No web framework is known here.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# What the page's own browser code posts to. Events that wait in no queue go to `run`.
_USED = re.compile(r"/(?:login|gradio_api/(?:upload|queue/join|cancel|reset|run/\w+))/?$")
_MEGABYTE = 2**20
_BODY = _MEGABYTE  # most bytes of a question, its settings and the names of its files
_LEAST = _MEGABYTE  # what an upload counts at least: many tiny files fill a disk too
_SWEEP_SECONDS = 60.0


@dataclass(frozen=True)
class UploadLimits:
    """How much may lie in the upload folder.

    Attributes:
        total_bytes: Of everybody.
        visitor_bytes: Of one address; visitors behind a common proxy have one.
        seconds: For which an upload is kept, and counts; as long as a conversation may rest.
    """

    total_bytes: int = 2 * 2**30
    visitor_bytes: int = 2**30
    seconds: float = 1800.0


class UploadBudget:
    """Bytes that were uploaded lately, by visitor.

    Args:
        limits: How many there may be.
        clock: Seconds; for tests.
    """

    def __init__(self, limits: UploadLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self._clock = limits, clock
        self._held: Counter[str] = Counter()
        self._ended: deque[tuple[float, str, int]] = deque()

    def has_room(self, visitor: str, size: int) -> bool:
        """Whether a visitor may send so many bytes more."""
        while self._ended and self._ended[0][0] <= self._clock():
            _, owner, freed = self._ended.popleft()
            self._held[owner] -= freed
        self._held = +self._held  # without those who hold nothing
        limits = self.limits
        return self._held.total() + size <= limits.total_bytes and self._held[visitor] + size <= limits.visitor_bytes

    def take(self, visitor: str, size: int) -> bool:
        """Counts bytes that have come; False, and nothing is counted, where there is no room for them."""
        if not self.has_room(visitor, size):
            return False
        self._held[visitor] += size
        return True

    def end(self, visitor: str, size: int) -> None:
        """An upload has ended; what it took counts until its files are surely deleted."""
        if size:
            self._ended.append((self._clock() + self.limits.seconds + _SWEEP_SECONDS, visitor, size))


class Gate:
    """ASGI middleware: closes what the page does not use, counts uploads and deletes old ones.

    Args:
        app: What it stands before.
        folder: Of the uploads. Files that are there already are kept.
        budget: Of the uploads.
        kept: Folders below `folder` whose files have another owner.
    """

    def __init__(self, app: Any, folder: str | Path, budget: UploadBudget, kept: tuple[Path, ...] = ()) -> None:
        self._app, self._folder, self._budget, self._kept = app, Path(folder), budget, kept
        self._first = frozenset(self._folder.rglob("*"))
        self._swept = time.monotonic()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        self._sweep()
        if scope["method"] != "POST":
            return await self._app(scope, receive, send)
        path, size = scope["path"].rstrip("/"), _length(scope)
        if not _USED.search(path):
            return await _refuse(send, 404, "The page does not use this address.")
        if size is None:
            return await _refuse(send, 411, "The request must say how long it is.")
        if path.endswith("/upload"):
            return await self._upload(scope, receive, send, size)
        if size > _BODY:
            return await _refuse(send, 413, f"The request is too long; at most {_BODY} bytes are taken.")
        return await self._app(scope, receive, send)

    async def _upload(self, scope: MutableMapping[str, Any], receive: Receive, send: Send, size: int) -> None:
        visitor, received, taken = (scope.get("client") or ("",))[0], 0, 0
        if not self._budget.has_room(visitor, max(size, _LEAST)):
            minutes = self._budget.limits.seconds / 60
            return await _refuse(
                send, 413, f"The page has no room for this upload. Try again in {minutes:.0f} minutes."
            )

        async def counted() -> Message:
            # By what comes, not by what was announced: who only announces takes nobody's room.
            nonlocal received, taken
            message = await receive()
            received += len(message.get("body", b""))
            more = max(received, _LEAST if received else 0) - taken
            if not self._budget.take(visitor, more):  # others have filled it meanwhile
                return {"type": "http.disconnect"}
            taken += more
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._budget.end(visitor, taken)

    def _sweep(self) -> None:
        """Deletes files that were last written too long ago, what is left of broken uploads included."""
        now = time.monotonic()
        if now - self._swept < _SWEEP_SECONDS:
            return
        self._swept = now
        oldest = time.time() - self._budget.limits.seconds
        for path in list(self._folder.rglob("*")):
            if path in self._first or any(path.is_relative_to(folder) for folder in self._kept):
                continue
            if path.is_file() and path.stat().st_mtime < oldest:
                path.unlink(missing_ok=True)
                if path.parent != self._folder:
                    with contextlib.suppress(OSError):  # other files are in it
                        path.parent.rmdir()


def _length(scope: MutableMapping[str, Any]) -> int | None:
    """Bytes of the body as its header says, which the web server holds the sender to; None where nothing does."""
    headers = dict(scope["headers"])
    said = headers.get(b"content-length", b"")
    return int(said) if said.isdigit() and b"transfer-encoding" not in headers else None


async def _refuse(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
