"""The visitors of the demo page: each one's conversation by a key of theirs, so many at once, forgotten when idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .page_chat import Conversation, Host
from .page_limits import PageError


class Conversations:
    """Conversations by visitor; the one idle for longest gives way to a new one where there are too many.

    Args:
        host: Who answers.
        clock: Seconds; for tests.
    """

    def __init__(self, host: Host, clock: Callable[[], float] = time.monotonic) -> None:
        self.host, self._clock = host, clock
        self._open: dict[str, Conversation] = {}
        self._used: dict[str, float] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, key: str | None) -> Conversation:
        """The visitor's conversation, a new one if there is none.

        Raises:
            PageError: there is no key, or everybody's answer is still being written.
        """
        if not key:
            raise PageError("This request belongs to no visitor of the page.")
        with self._lock:
            self._sweep()
            if key not in self._open:
                self._make_room()
                self._open[key] = Conversation(self.host)
            self._used[key] = self._clock()
            return self._open[key]

    def find(self, key: str | None) -> Conversation | None:
        """The visitor's conversation, if there is one."""
        return self._open.get(key or "")

    def close(self, key: str | None) -> None:
        """Forgets a visitor."""
        with self._lock:
            self._close(key or "")

    def _close(self, key: str) -> None:
        conversation = self._open.pop(key, None)
        self._used.pop(key, None)
        if conversation is not None:
            conversation.close()

    def _idle(self) -> list[str]:
        """Keys of those who wait for nothing, the one idle for longest first."""
        return sorted((key for key, talk in self._open.items() if not talk.is_busy), key=self._used.__getitem__)

    def _sweep(self) -> None:
        oldest = self._clock() - self.host.limits.idle_seconds
        for key in self._idle():
            if self._used[key] < oldest:
                self._close(key)

    def _make_room(self) -> None:
        if len(self._open) < self.host.limits.conversations:
            return
        idle = self._idle()
        if not idle:
            raise PageError("Too many visitors are waiting for answers. Try again in a minute.")
        self._close(idle[0])
