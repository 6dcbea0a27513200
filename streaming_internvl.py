"""Streaming an answer: pieces of text while `generate` runs in another thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, TextIteratorStreamer


class AnswerStreamer(TextIteratorStreamer):
    """Queues an answer's text token by token, without what `decode` would drop.

    transformers' own streamer starts decoding anew at every newline, where SentencePiece-like tokenizers then lose a
    space. Here a piece is what a token adds to the decoded text of a window that begins with the piece before.

    Args:
        tokenizer: The tokenizer.
        hidden: Special ids that an answer does not show.
        header: Ids that the model writes before an answer and that are no part of it.
    """

    def __init__(self, tokenizer: Any, hidden: set[int], header: list[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=False)
        self._hidden, self._header = hidden, header
        self._begun: list[int] = []  # ids that may still turn out to be the header
        self._ids: list[int] = []
        self._window = self._shown = 0  # where the window begins, and up to where its text is out

    def put(self, value: torch.Tensor) -> None:
        if self.next_tokens_are_prompt:  # empty where the prompt is embeddings
            self.next_tokens_are_prompt = False
            return
        for index in value.reshape(-1).tolist():
            if self._header:
                self._begun.append(index)
                if self._begun == self._header:
                    self._header, self._begun = [], []
                elif self._begun != self._header[: len(self._begun)]:
                    self._release()
            elif index not in self._hidden:
                self._ids.append(index)
        self._show()

    def end(self) -> None:
        self._release()
        self._show(final=True)
        self.on_finalized_text("", stream_end=True)

    def _release(self) -> None:
        self._ids += [index for index in self._begun if index not in self._hidden]
        self._header, self._begun = [], []

    def _show(self, final: bool = False) -> None:
        before = self.tokenizer.decode(self._ids[self._window : self._shown], **self.decode_kwargs)
        text = self.tokenizer.decode(self._ids[self._window :], **self.decode_kwargs)
        if len(text) > len(before) and (final or not text.endswith("\ufffd")):  # a character may still be incomplete
            self._window, self._shown = self._shown, len(self._ids)
            self.on_finalized_text(text[len(before) :])


class _StopWhen(StoppingCriteria):
    """Ends a generation whose reader has gone."""

    def __init__(self, event: Event) -> None:
        self._event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._event.is_set(), device=input_ids.device)


def stream_text(generate: Callable[..., Any], streamer: AnswerStreamer, end_of_turn: str) -> Iterator[str]:
    """Runs `generate(streamer=..., stopping_criteria=[...])` in a thread and yields the answer's text as it comes.

    The pieces join to the answer, cut at `end_of_turn` and stripped. What `generate` raises is raised here; closing
    the iterator ends the generation.
    """
    return _stripped(_pieces(generate, streamer), end_of_turn)


def _pieces(generate: Callable[..., Any], streamer: AnswerStreamer) -> Iterator[str]:
    gone, errors = Event(), []

    def work() -> None:
        try:
            with torch.no_grad():
                generate(streamer=streamer, stopping_criteria=[_StopWhen(gone)])
        except BaseException as error:  # the reader's thread raises it
            errors.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        gone.set()
        thread.join()
    if errors:
        raise errors[0]


def _stripped(pieces: Iterator[str], end_of_turn: str) -> Iterator[str]:
    """Cuts a stream at the end of the turn and strips it, as `decode` does with a whole answer."""
    held, started = "", False
    for piece in pieces:
        held += piece
        if not started:
            held = held.lstrip()
        head, stop, _ = held.partition(end_of_turn)
        # Trailing space, or the beginning of an end mark, may still turn out not to belong to the answer.
        ready = head if stop else head[: _safe_length(head, end_of_turn)]
        ready = ready.rstrip()
        if ready:
            yield ready
            held, started = held[len(ready) :], True
        if stop:
            return
    if held.rstrip():
        yield held.rstrip()


def _safe_length(text: str, mark: str) -> int:
    for size in range(min(len(mark) - 1, len(text)), 0, -1):
        if text.endswith(mark[:size]):
            return len(text) - size
    return len(text)
