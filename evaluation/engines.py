"""What answers questions: the interface that the model in this process and a server elsewhere share.

An engine turns requests into sampled answers. It knows nothing of prompts, gold answers or files; a request that
cannot be answered (a picture that cannot be read, a server that refuses) gives a `Failure` in its place, and the
others go on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from ..data.records import Video


@dataclass(frozen=True)
class Request:
    """One question to a model.

    Attributes:
        text: The user's turn; `<image>` and `<video>` mark where media go, a missing mark of the only medium is put in
            front.
        images: Paths, URLs or pictures in memory, one per `<image>`.
        videos: One per `<video>`.
        system: System text; None for the model's own, "" for none.
        prefix: Beginning of the answer, which the model continues.
        max_tiles: Most tiles of an image; None for what the checkpoint says.
    """

    text: str
    images: tuple[str | Path | Image.Image, ...] = ()
    videos: tuple[Video, ...] = ()
    system: str | None = None
    prefix: str = ""
    max_tiles: int | None = None


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        n: Answers per request.
        temperature: 0 for greedy decoding, which gives one answer.
        top_p: Share of the probability that is kept, 1 for all.
        top_k: Tokens that are kept, 0 for all.
        max_new_tokens: Of one answer.
        seed: Equal seeds give equal answers from the same engine with the same batches.

    Raises:
        ValueError: a value out of its range, or several greedy answers, which would all be the same.
    """

    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n < 1 or self.max_new_tokens < 1:
            raise ValueError(f"n and max_new_tokens must be at least 1, got {self.n} and {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                "need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got "
                f"{self.temperature}, {self.top_k} and {self.top_p}"
            )
        if self.n > 1 and not self.temperature:
            raise ValueError(f"n={self.n} greedy answers would be the same; set a temperature, such as 0.7")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: What the model wrote after the prefix; not stripped.
        complete: Whether it ended by itself, not at `max_new_tokens`.
    """

    text: str
    complete: bool = True


@dataclass(frozen=True)
class Failure:
    """A request that got no answer, and why."""

    reason: str


class Engine(Protocol):
    """Answers requests.

    Attributes:
        name: Of the model, for reports.
    """

    name: str

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        """`sampling.n` answers to each request, in order, or its failure."""
        ...
