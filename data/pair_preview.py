"""A preference row as the model will see it: the prompt once, both answers with their learned parts marked, counts.

The row goes through the very functions of training, as in `preview`, which has what both kinds of rows share.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

from PIL import Image

from .augmentation import Take
from .features import FeatureMaker, Features
from .media import RowSettings
from .pairs import PairRecord
from .preview import Span, count_tiles, find_spans, legend, read_media, render_text


@dataclass(frozen=True)
class PairPreview:
    """A preference row and what became of it.

    Attributes:
        pair: The row.
        features: Model inputs, see `FeatureMaker.pair_features`.
        prompt: Tokens before the answers, the same in both sequences.
        chosen, rejected: Tokens from the first one of the answer on.
        pictures, owners: As in `preview.Preview`.
    """

    pair: PairRecord
    features: Features
    prompt: tuple[Span, ...]
    chosen: tuple[Span, ...]
    rejected: tuple[Span, ...]
    pictures: tuple[Image.Image, ...]
    owners: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens of the longer sequence, visual ones included."""
        return max(len(self.features["chosen_input_ids"]), len(self.features["rejected_input_ids"]))

    @property
    def tiles(self) -> list[int]:
        """Tiles of each picture and frame."""
        return self.features["num_patches"]


def make_pair_preview(
    maker: FeatureMaker, pair: PairRecord, settings: RowSettings | None = None, take: Take | None = None
) -> PairPreview:
    """Reads and encodes a preference row; arguments and errors as of `preview.make_preview`."""
    settings, take = settings or RowSettings(), take or Take()
    features = maker.pair_features(pair, settings, take)
    chosen, rejected = (
        tuple(find_spans({key: features[f"{name}_{key}"] for key in ("input_ids", "labels")}, maker))
        for name in ("chosen", "rejected")
    )
    prompt = tuple(takewhile(lambda span: not span.learned, chosen))
    pictures, owners = read_media(pair.chosen, settings, take)
    return PairPreview(pair, features, prompt, chosen[len(prompt) :], rejected[len(prompt) :], pictures, owners)


def render_pair(preview: PairPreview, color: bool = False) -> str:
    """Prompt, answers and counts of a preference row.

    Args:
        preview: The row.
        color: Use ANSI colours.
    """
    lines = [legend(color), render_text(preview.prompt, color).rstrip("\n")]
    for name, spans in (("chosen", preview.chosen), ("rejected", preview.rejected)):
        lines += ["", f"{name}:", render_text(spans, color).rstrip("\n")]
    prompt = sum(span.tokens for span in preview.prompt)
    visual = sum(span.tokens for span in preview.prompt if span.visual)
    learned = ", ".join(
        f"{sum(span.tokens for span in spans if span.learned)} learned of the {name} answer"
        for name, spans in (("chosen", preview.chosen), ("rejected", preview.rejected))
    )
    counts = f"tokens   {prompt} of the prompt ({visual} visual), {learned}"
    return "\n".join([*lines, "", counts, count_tiles(preview.tiles, preview.owners)])
