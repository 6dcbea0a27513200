"""How a model is served, and what a request may be."""

from __future__ import annotations

from dataclasses import dataclass, field

PUBLIC = "public"


class Refused(ValueError):
    """A request that is refused; the message is for the client.

    Args:
        message: What is wrong and what would be right.
        status: Of the HTTP response.
    """

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ServeLimits:
    """What one request may be.

    Attributes:
        body_bytes: Size of its JSON text, images in it included.
        images: Number of images.
        image_bytes: Size of an image file.
        image_pixels: Width times height of an image, told by the header before anything is decoded.
        pixels: Of all its images together; decoded ones take 3 bytes each.
        side: Longest side of an image, pixels: a strip of few pixels needs much memory to be resized.
        fetch_seconds: For fetching one image by its address.
        stops: Texts in `stop`, and characters of each.
    """

    body_bytes: int = 64 * 2**20
    images: int = 64
    image_bytes: int = 20 * 2**20
    image_pixels: int = 40_000_000
    pixels: int = 120_000_000
    side: int = 16_384
    fetch_seconds: float = 20.0
    stops: tuple[int, int] = (16, 100)


@dataclass(frozen=True)
class ServeSettings:
    """How a model is served.

    Attributes:
        name: Of the model, in requests and replies.
        max_tiles: Most tiles of an image, thumbnail not counted; None for the checkpoint's own. Requests may lower it.
        keep_markup: Keep `<ref>`, `<box>` and `<quad>` in answers.
        split_reasoning: Give thoughts apart, as `reasoning_content`, where transformers knows the language model.
        url_hosts: Hosts whose images are fetched for a request, or "public" for every public address; none fetches
            nothing.
        api_key: That requests must bring; None for none.
        limits: Of a request.
    """

    name: str
    max_tiles: int | None = None
    keep_markup: bool = False
    split_reasoning: bool = False
    url_hosts: tuple[str, ...] = ()
    api_key: str | None = None
    limits: ServeLimits = field(default_factory=ServeLimits)
