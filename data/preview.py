"""A row as the model will see it: its text with the learned parts marked, and its counts. `preview_picture` draws it.

`pair_preview` shows preference rows.

The row goes through the very functions of training (`features`), so what is shown here is what is trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from PIL import Image

from ..losses_internvl import IGNORE_INDEX, LOSS_REDUCTIONS, length_to_weight
from ..prompting_internvl import IMG_CONTEXT_TOKEN
from .augmentation import Take
from .features import FeatureMaker, Features
from .media import RowSettings, read_pictures, read_videos, spell_out
from .records import Record

_GREEN, _GREY, _RESET = "\x1b[1;32m", "\x1b[90m", "\x1b[0m"


class Span(NamedTuple):
    """A run of tokens.

    Attributes:
        text: Decoded, special tokens included; visual tokens as `<IMG_CONTEXT> x 256`.
        learned: Whether a loss is taken on them.
        tokens: How many they are.
        visual: Whether they stand for a picture.
    """

    text: str
    learned: bool
    tokens: int
    visual: bool = False


@dataclass(frozen=True)
class Preview:
    """A row and what became of it.

    Attributes:
        record: The row.
        features: Model inputs, see `FeatureMaker.features`.
        spans: All tokens in order.
        pictures: Pictures and frames of videos in reading order, as they were read.
        owners: For each of them, the number of its video, from 1; 0 for a picture.
    """

    record: Record
    features: Features
    spans: tuple[Span, ...]
    pictures: tuple[Image.Image, ...]
    owners: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the row, visual ones included."""
        return len(self.features["input_ids"])

    @property
    def learned(self) -> int:
        """Tokens that a loss is taken on."""
        return int((self.features["labels"] != IGNORE_INDEX).sum())

    @property
    def tiles(self) -> list[int]:
        """Tiles of each picture and frame."""
        return self.features["num_patches"]

    @property
    def answers(self) -> list[str]:
        """What is learned, one text per answer."""
        return [span.text for span in self.spans if span.learned]


def make_preview(
    maker: FeatureMaker, record: Record, settings: RowSettings | None = None, take: Take | None = None
) -> Preview:
    """Reads and encodes a row.

    Args:
        maker: Of the checkpoint.
        record: The row.
        settings: How it is read.
        take: The occurrence to show: its frames and its augmentation.

    Raises:
        RecordError: the row cannot be used.
    """
    settings, take = settings or RowSettings(), take or Take()
    features = maker.features(record, settings, take)
    return Preview(record, features, tuple(find_spans(features, maker)), *read_media(record, settings, take))


def read_media(record: Record, settings: RowSettings, take: Take) -> tuple[tuple[Image.Image, ...], tuple[int, ...]]:
    """`pictures` and `owners` of a preview."""
    videos = read_videos(record, settings, take)
    stills = iter([(picture, 0) for picture in read_pictures(record, settings)])
    moving = ((frame, number) for number, frames in enumerate(videos, 1) for frame in frames)
    media = spell_out(record, [len(frames) for frames in videos])
    shown = [next(moving if is_frame else stills) for is_frame in media.frames]
    return tuple(picture for picture, _ in shown), tuple(owner for _, owner in shown)


def find_spans(features: Features, maker: FeatureMaker) -> Iterator[Span]:
    """Runs of tokens that are all learned, all masked, or all visual."""
    tokenizer, context = maker.tokenizer, maker.tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
    pairs = zip(features["input_ids"].tolist(), features["labels"].tolist(), strict=True)
    for (learned, visual), run in groupby(pairs, lambda pair: (pair[1] != IGNORE_INDEX, pair[0] == context)):
        ids = [index for index, _ in run]
        if visual:
            yield Span(f"{IMG_CONTEXT_TOKEN} x {len(ids)}", learned, len(ids), visual=True)
        else:
            yield Span(tokenizer.decode(ids, skip_special_tokens=False), learned, len(ids))


def render_text(spans: tuple[Span, ...], color: bool) -> str:
    """All tokens as text: learned ones green and the rest grey, or without colours learned ones in `[+ +]`."""
    texts = [(span.text.replace("\x1b", "\\x1b"), span.learned) for span in spans]  # nothing may steer the terminal
    if color:
        return "".join(f"{_GREEN if learned else _GREY}{text}{_RESET}" for text, learned in texts)
    return "".join(f"[+{text}+]" if learned else text for text, learned in texts)


def render(preview: Preview, reduction: str = "square", color: bool = False) -> str:
    """Text, counts and answers of a row.

    Args:
        preview: The row.
        reduction: `loss_reduction` of the run; its weight is shown first.
        color: Use ANSI colours.
    """
    text = render_text(preview.spans, color).rstrip("\n")
    return "\n".join([legend(color), text, "", *_counts(preview, reduction), "", *_answers(preview)])


def legend(color: bool) -> str:
    """How `render_text` marks what is learned."""
    return "(learned text is green)" if color else "(learned text stands in [+ +])"


def _counts(preview: Preview, reduction: str) -> Iterator[str]:
    visual = sum(span.tokens for span in preview.spans if span.visual)
    yield f"tokens   {preview.tokens} ({visual} visual, {preview.learned} learned)"
    yield count_tiles(preview.tiles, preview.owners)
    names = [reduction, *(name for name in LOSS_REDUCTIONS if name != reduction)]
    weights = {name: length_to_weight(preview.learned, name) for name in names}
    shown = (f"{name} {weight:.4g} (row: {weight * preview.learned:.4g})" for name, weight in weights.items())
    yield f"weight   of each learned token by loss_reduction: {', '.join(shown)}"


def count_tiles(tiles: Sequence[int], owners: Sequence[int]) -> str:
    """The line on tiles, those of pictures one by one."""
    stills = [count for count, owner in zip(tiles, owners, strict=True) if not owner]
    parts = [f"{' + '.join(map(str, stills))} of pictures"] if stills else []
    frames = len(tiles) - len(stills)
    parts += [f"{frames} of frames"] if frames else []
    return f"tiles    {sum(tiles)}" + (f" ({', '.join(parts)})" if parts else "")


def _answers(preview: Preview) -> Iterator[str]:
    if not preview.answers:
        yield "nothing is learned from this row"
    for number, answer in enumerate(preview.answers, 1):
        yield f"learned {number}: {answer!r}"
