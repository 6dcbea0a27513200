"""A conversation of the demo page: what a visitor has sent, one generation at a time, limits, stopping, its end.

A `Host` has the model and its lock, a `Conversation` what belongs to one visitor and to nobody else. Visitors are kept
apart in `page_visitors.py`. No web framework is known here; `page.py` wires this to Gradio.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
from transformers import StoppingCriteria

from ..conversation import IMAGE_PLACEHOLDER
from ..reasoning_internvl import without_reasoning
from ..turns_internvl import IMAGE_TOKENS, Turn
from .page_limits import ChatLimits, PageError, Settings
from .page_media import Upload
from .page_medium import Medium, make_medium

_DONE = object()


class _Stop(StoppingCriteria):
    """Ends a generation that was stopped or has taken too long."""

    def __init__(self, event: threading.Event, deadline: float) -> None:
        self._event, self._deadline = event, deadline

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = self._event.is_set() or time.monotonic() > self._deadline
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)


class Host:
    """A model that answers many visitors, one at a time.

    Args:
        model: An `InternVLChatModel`.
        processor: Its processor.
        limits: Of every conversation.
    """

    def __init__(self, model: Any, processor: Any, limits: ChatLimits | None = None) -> None:
        self.model, self.processor = model.eval(), processor
        self.limits = limits or ChatLimits()
        self._lock = threading.Lock()

    @contextmanager
    def turn(self, stop: threading.Event) -> Iterator[bool]:
        """The model for oneself; waits for it. False where `stop` was set before it was free."""
        while not (held := self._lock.acquire(timeout=0.1)) and not stop.is_set():
            pass
        try:
            yield held and not stop.is_set()
        finally:
            if held:
                self._lock.release()

    @property
    def default_tiles(self) -> int:
        """Most tiles of an image as the checkpoint was made for."""
        return min(self.processor.image_processor.max_dynamic_patch, self.limits.tiles)

    @property
    def tokens_per_tile(self) -> int:
        """Visual tokens of one tile."""
        return self.processor.tokens_per_tile(1)[0]

    @property
    def description(self) -> str:
        """Size and place of the model, in words."""
        count = sum(parameter.numel() for parameter in self.model.parameters())
        size = f"{count / 1e9:.1f} billion" if count >= 1e9 else f"{count / 1e6:.1f} million"
        kind = str(self.model.dtype).removeprefix("torch.")
        return f"InternVL, {size} parameters in {kind} on {self.model.device.type}; it can be wrong."

    def spare_tokens(self, prompt_tokens: int) -> int:
        """Tokens that an answer to a prompt of this length may have."""
        return self.model.config.get_text_config().max_position_embeddings - prompt_tokens


@dataclass(eq=False)
class Exchange:
    """One question with its answer.

    Attributes:
        question: What the visitor typed.
        asked: What the model was asked, image marks included.
        media: What came with it.
        answer: What the model wrote, markup included.
        stopped: Why the answer may be incomplete: "stopped" by the visitor, or at the "limit"; "" for a whole one.
    """

    question: str
    asked: str
    media: list[Medium] = field(default_factory=list)
    answer: str = ""
    stopped: str = ""


class Conversation:
    """What one visitor has sent and got.

    Attributes:
        exchanges: Questions and answers so far, the one being answered not among them.
        closed: Whether its visitor has gone; it then holds nothing.
    """

    def __init__(self, host: Host) -> None:
        self.host = host
        self.exchanges: list[Exchange] = []
        self.closed = False
        self._session = host.model.new_session()
        self._stop = threading.Event()
        self._busy = threading.Lock()

    @property
    def is_busy(self) -> bool:
        """Whether an answer is waited for or written."""
        return self._busy.locked()

    @property
    def media(self) -> list[Medium]:
        """All media in order."""
        return [medium for exchange in self.exchanges for medium in exchange.media]

    def ask(self, question: str, uploads: Sequence[Upload], settings: Settings) -> Iterator[Exchange]:
        """Answers a question; yields the exchange when it is accepted, when its answer has grown, and at the end.

        The last time it is among `exchanges`. Nothing of a question that fails, or that is stopped before its first
        word, stays in the conversation. Closing the iterator stops the answer.

        Args:
            question: May say with `<image>` where each of its images goes.
            uploads: Images and videos that come with it.
            settings: Checked ones.

        Raises:
            PageError: a limit is exceeded, another answer is being written, or the conversation is closed.
        """
        if not self._busy.acquire(blocking=False):
            raise PageError("An answer is still being written. Wait for it, or stop it.")
        try:
            self._stop.clear()
            yield from self._answered(self._prepared(question, uploads, settings), settings)
        finally:
            if self.closed or not self.exchanges:
                self._free()
            self._busy.release()

    def stop(self) -> None:
        """Ends the answer that is being written, if there is one."""
        self._stop.set()

    def clear(self) -> None:
        """Forgets everything, and stops what is being written."""
        self.stop()
        self.exchanges = []
        self._free_when_idle()

    def close(self) -> None:
        """Ends the conversation for good and lets go of its pictures, tensors and cache."""
        self.closed = True
        self.clear()

    def _free_when_idle(self) -> None:
        if self._busy.acquire(blocking=False):  # else the running answer frees everything at its end
            self._free()
            self._busy.release()

    def _free(self) -> None:
        self.exchanges = []
        self._session.reset()

    # ------------------------------------------------------------------------------------------------------ one answer

    def _prepared(self, question: str, uploads: Sequence[Upload], settings: Settings) -> Exchange:
        limits = self.host.limits
        if self.closed:
            raise PageError("This conversation has ended. Reload the page to begin a new one.")
        question = limits.checked_question(question, bool(uploads))
        limits.check_turns(len(self.exchanges))
        limits.check_media(len(self.media) + len(uploads))
        media = [make_medium(upload, self.host.processor, settings.max_tiles) for upload in uploads]
        limits.check_tiles(sum(medium.tile_count for medium in (*self.media, *media)))
        return Exchange(question, with_marks(question, media), media)

    def _answered(self, exchange: Exchange, settings: Settings) -> Iterator[Exchange]:
        pieces: SimpleQueue[Any] = SimpleQueue()
        history, media = self._history(), [*self.media, *exchange.media]
        before, stop = self.exchanges, self._stop
        worker = threading.Thread(
            target=self._generate, args=(exchange, history, media, settings, pieces.put), daemon=True
        )
        worker.start()
        try:
            while (piece := pieces.get()) is not _DONE:
                if isinstance(piece, BaseException):
                    raise piece
                exchange.answer += piece
                if self.exchanges is before:  # else it was cleared, and nobody wants this answer
                    yield exchange
        except GeneratorExit:
            stop.set()
            raise
        finally:
            worker.join()
        if self.exchanges is not before or self.closed or not exchange.answer:
            return
        exchange.stopped = "stopped" if stop.is_set() else exchange.stopped
        self.exchanges = [*before, exchange]
        yield exchange

    def _history(self) -> list[tuple[str, str]]:
        return without_reasoning([(exchange.asked, exchange.answer) for exchange in self.exchanges])

    def _generate(
        self,
        exchange: Exchange,
        history: list[tuple[str, str]],
        media: Sequence[Medium],
        settings: Settings,
        put: Callable[[Any], None],
    ) -> None:
        """Runs in a thread of its own, so that a reader who goes away cannot keep the model's lock."""
        try:
            with self.host.turn(self._stop) as has_turn:
                if has_turn:
                    for piece in self._stream(exchange, history, media, settings):
                        put(piece)
        except BaseException as error:  # the reader's thread raises it
            self._session.reset()
            put(error)
        put(_DONE)

    def _stream(
        self,
        exchange: Exchange,
        history: list[tuple[str, str]],
        media: Sequence[Medium],
        settings: Settings,
    ) -> Iterator[str]:
        model, tokenizer = self.host.model, self.host.processor.tokenizer
        patches = [count for medium in media for count in medium.num_patches]
        pixels = torch.cat([medium.tiles for medium in media]).to(model.dtype) if media else None
        options = settings.generation()
        room = self._room(exchange, history, pixels, patches, settings)
        options["max_new_tokens"] = min(room, options["max_new_tokens"])
        deadline = time.monotonic() + self.host.limits.seconds
        options["stopping_criteria"] = [_Stop(self._stop, deadline)]
        yield ""  # the question is accepted
        yield from model.stream_chat(
            tokenizer, pixels, exchange.asked, options, history, patches or None,
            system=settings.system_text(), keep_markup=True, session=self._session, **settings.extras(model),
        )  # fmt: skip
        if time.monotonic() > deadline:
            exchange.stopped = "limit"

    def _room(
        self,
        exchange: Exchange,
        history: list[tuple[str, str]],
        pixels: torch.Tensor | None,
        patches: list[int],
        settings: Settings,
    ) -> int:
        """Tokens that the answer may have.

        Raises:
            PageError: the model has no positions left for it.
        """
        model, tokenizer, extras = self.host.model, self.host.processor.tokenizer, settings.extras(self.host.model)
        turn = Turn(model, tokenizer, IMAGE_TOKENS, True, settings.system_text(), **extras)
        turn.prepare(pixels, exchange.asked, history, patches or None)
        room = self.host.spare_tokens(len(turn.prompt.input_ids))
        if room < 1:
            raise PageError(
                f"The conversation has {len(turn.prompt.input_ids)} tokens, more than the model can read. Begin a new "
                "one, or allow fewer tiles for each image."
            )
        return room


def with_marks(question: str, media: Sequence[Medium]) -> str:
    """The question as the model gets it: with an `<image>` for every new image and lines for the frames of videos.

    Raises:
        PageError: the question has marks of its own, and not one for each new image.
    """
    written = question.count(IMAGE_PLACEHOLDER)
    if written:
        wanted = sum(not medium.is_video for medium in media)
        if written != wanted or wanted != len(media):
            raise PageError(
                f"The text has {written} {IMAGE_PLACEHOLDER} mark(s) for {len(media)} new upload(s). Leave the marks "
                "out, or write one for each image."
            )
        return question
    return "".join(medium.prompt for medium in media) + question
