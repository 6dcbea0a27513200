"""Thinking before answering: how it is asked for, switched off, and told apart from the answer.

A model that thinks writes `<think>...</think>` before its answer. Models leave tags out, double them or run out of
tokens inside; whatever stands in a text, taking it apart is no error. What an answer is worth is not judged here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

THINK_START = "<think>"
THINK_END = "</think>"

# The "R1" system prompt of the InternVL 3.5 model card, to the letter: models were trained and measured with it.
THINKING_SYSTEM_PROMPT = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential solutions, and "
    "reason through the problem step-by-step. Enclose this entire thinking process within <think> and </think> "
    "tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's question. Separate the "
    "answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final answer should be "
    "standalone and not reference the thinking section."
)

NO_THINKING_PREFIX = f"{THINK_START}\n{THINK_END}\n"
"""What an answer begins with so that the model does not think: the way its authors advise for InternVL 3.5."""

_BEFORE = re.compile(rf"(?:\s|{THINK_START}|{THINK_END})*")
# Of reversed text: a search for the end from the front would look at every position.
_AFTER_REVERSED = re.compile(rf"(?:\s|{THINK_START[::-1]}|{THINK_END[::-1]})*")


@dataclass(frozen=True)
class Reasoning:
    """A response taken apart.

    Attributes:
        reasoning: What stands in the thinking, stripped, without the tags around it; "" where there is none.
        answer: What follows it, stripped; "" where the response ends while thinking.
        complete: False where a `<think>` was never closed, mostly because the limit of tokens cut it off.
    """

    reasoning: str
    answer: str
    complete: bool


def thinking_system(system: str | None) -> str:
    """The system text that asks for thinking; a text of the caller's stands before it, on lines of its own."""
    return f"{system}\n{THINKING_SYSTEM_PROMPT}" if system else THINKING_SYSTEM_PROMPT


def split_reasoning(text: str) -> Reasoning:
    """Tells the reasoning of a response from its answer.

    The answer follows the last `</think>`, so that tags which the reasoning nests or talks about stay in it. The
    opening tag may be missing, as some prompts end with it; doubled tags count once. A `<think>` that is opened after
    an answer and never closed is reasoning too.

    Args:
        text: What the model wrote, from the beginning of its answer.
    """
    before, _, rest = text.rpartition(THINK_END)
    answer, opened, unfinished = rest.partition(THINK_START)
    reasoning = [part for part in (_inside(before), _inside(unfinished)) if part]
    return Reasoning("\n".join(reasoning), answer.strip(), not opened)


def _inside(text: str) -> str:
    """Text between tags, stripped of white space and of doubled tags at its ends."""
    text = text[_BEFORE.match(text).end() :]
    return text[: len(text) - _AFTER_REVERSED.match(text[::-1]).end()]


def without_reasoning(history: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A history whose answers have lost their reasoning, as later turns should see them; a new list.

    An answer that was cut off while thinking becomes "".
    """
    return [(question, split_reasoning(answer).answer) for question, answer in history]


def split_reasoning_stream(pieces: Iterable[str], opened: bool = False) -> Iterator[tuple[str, str]]:
    """Tells reasoning from answer while a response is still being written.

    A stream cannot know which `</think>` is the last: the first one ends the reasoning, so that an answer is never
    held back. For a response that begins with its only block the pieces join to the fields of `split_reasoning`, but
    for white space at their ends.

    Args:
        pieces: Of `stream_chat`, cut anywhere.
        opened: Whether the prompt already ended with `<think>`.

    Yields:
        ("reasoning" or "answer", text), without tags; no text is empty.
    """
    held, kind, begun = "", "reasoning" if opened else "answer", False
    for piece in pieces:
        held += piece
        while held:
            ready, tag, held = _next_tag(held)
            ready = ready if begun else ready.lstrip()
            if ready:
                yield kind, ready
                begun = True
            if tag is None:
                break
            kind, begun = ("reasoning" if tag == THINK_START else "answer"), False
    if held.strip():
        yield kind, held if begun else held.lstrip()


def _next_tag(text: str) -> tuple[str, str | None, str]:
    """Text up to the next tag, the tag, and the rest; without a tag, what may still become one is the rest."""
    found = [(text.find(tag), tag) for tag in (THINK_START, THINK_END) if tag in text]
    if found:
        place, tag = min(found)
        return text[:place], tag, text[place + len(tag) :]
    start = text.rfind("<", max(0, len(text) - len(THINK_END) + 1))
    partial = start >= 0 and any(tag.startswith(text[start:]) for tag in (THINK_START, THINK_END))
    return (text[:start], None, text[start:]) if partial else (text, None, "")
