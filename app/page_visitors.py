"""The visitors of the demo page: each one's conversation by a key of theirs, so many at once, forgotten when idle."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .page_chat import Conversation, Host
from .page_limits import PageError


class Conversations:
    """Conversations by visitor; the one idle for longest gives way to a new one where there are too many.

    A newcomer has a place only from the moment that a question of theirs is accepted (`admit`), so that refused ones
    drive nobody out.

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
        """The visitor's conversation, a new one if there is none; to be followed by `admit` or `release`.

        Raises:
            PageError: there is no key, or everybody's answer is still being written.
        """
        if not key:
            raise PageError("This request belongs to no visitor of the page.")
        with self._lock:
            self._sweep()
            if key not in self._open:
                if len(self) >= self.host.limits.conversations and not self._idle():
                    raise PageError("Too many visitors are waiting for answers. Try again in a minute.")
                self._open[key] = Conversation(self.host)
            self._used[key] = self._clock()
            return self._open[key]

    def admit(self) -> None:
        """Makes room for the visitor whose question is being answered."""
        with self._lock:
            while len(self) > self.host.limits.conversations and (idle := self._idle()):
                self._close(idle[0])

    def release(self, key: str | None) -> None:
        """Forgets a visitor of whom nothing has been kept."""
        with self._lock:
            conversation = self.find(key)
            if conversation is not None and not conversation.is_busy and not conversation.exchanges:
                self._close(key or "")

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
