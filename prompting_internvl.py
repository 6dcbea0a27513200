"""Tokenising conversations safely: segments in, ids with media spans and labels out.

Template markup is trusted, typed text is not: the special tokens that steer a conversation, when typed, are encoded as
plain characters. Everything else gives the very ids of the original's one-pass tokenisation. Chat, the processor and
training share this file, so a training row is always the inference prompt plus its answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary, proxy

from .conversation import IMAGE_PLACEHOLDER, Segment

IMG_START_TOKEN = "<img>"
IMG_END_TOKEN = "</img>"
IMG_CONTEXT_TOKEN = "<IMG_CONTEXT>"
# Grounding markup that users are meant to type; these are special tokens too, but steer nothing.
USER_MARKUP = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
IGNORE_INDEX = -100


class ImageCountError(ValueError):
    """The number of `<image>` placeholders differs from the number of images."""


class TokenizerError(ValueError):
    """The tokenizer lacks what InternVL needs."""


@dataclass(frozen=True)
class MediaSpan:
    """Where a medium's tokens lie in a prompt: `ids[start : start + length]`."""

    kind: str
    start: int
    length: int


@dataclass
class EncodedPrompt:
    """Ids of a conversation with the spans of its media and, for training, which ids are supervised."""

    input_ids: list[int]
    spans: list[MediaSpan] = field(default_factory=list)
    supervised: list[bool] = field(default_factory=list)

    @property
    def labels(self) -> list[int]:
        """Ids where supervised, -100 elsewhere."""
        return [i if on else IGNORE_INDEX for i, on in zip(self.input_ids, self.supervised, strict=True)]


def check_image_count(placeholders: int, images: int, where: str = "the conversation") -> None:
    """Raises `ImageCountError`, naming both numbers, unless they agree."""
    if placeholders != images:
        raise ImageCountError(
            f"{where} has {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) but {images} image(s) were given. Write "
            f"one {IMAGE_PLACEHOLDER} per image, and one num_patches_list entry per image (its number of tiles)."
        )


@dataclass(frozen=True)
class _Run:
    """Text to tokenise in one go; `plain` means that special tokens in it are characters."""

    text: str
    plain: bool = False


class PromptEncoder:
    """Encodes conversations with one tokenizer. Get it from `prompt_encoder`, which caches it.

    Args:
        tokenizer: Any transformers tokenizer; it is not changed.
        image_tokens: Texts of the start, context and end tokens of an image.
    """

    def __init__(
        self,
        tokenizer: Any,
        image_tokens: tuple[str, str, str] = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN),
    ) -> None:
        self.tokenizer = tokenizer
        self.image_tokens = image_tokens
        self.context_id = self.token_id(image_tokens[1])
        special = {str(t) for t in tokenizer.all_special_tokens}
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special |= {token.content for token in added.values() if token.special}
        # The image tokens are forbidden even where a tokenizer has added them as ordinary ones.
        forbidden = (special | set(image_tokens)) - USER_MARKUP
        self._forbidden_ids = {self.token_id(token) for token in forbidden} - {None}
        texts = sorted(forbidden | _former_names(tokenizer, self._forbidden_ids), key=len, reverse=True)
        self._forbidden = re.compile("(" + "|".join(map(re.escape, texts)) + ")")
        ids = self._ids("", add_special_tokens=True)
        self.bos = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        self._anchor = self._find_anchor(added)
        self._adds_space = self._after("\n", "a") != self._ids("a", add_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Id of a token of the vocabulary, or None."""
        index = self.tokenizer.convert_tokens_to_ids(token)
        return None if index is None or index == self.tokenizer.unk_token_id else index

    def _find_anchor(self, added: dict[int, Any]) -> str | None:
        for token in added.values():
            if token.special and not (token.lstrip or token.rstrip or token.single_word):
                return token.content
        return None

    def _ids(self, text: str, **kwargs: Any) -> list[int]:
        return list(self.tokenizer(text, verbose=False, **kwargs)["input_ids"])

    # SentencePiece-like tokenizers put a space before the first text of a call, some also before any text after a
    # special token. Text in the middle of a prompt is therefore tokenised behind something, which is then cut off.

    def _after(self, before: str, text: str, **kwargs: Any) -> list[int] | None:
        """Ids of `text` right after `before`; None where the tokenizer merges across the border."""
        head = self._ids(before, add_special_tokens=False, **kwargs)
        ids = self._ids(before + text, add_special_tokens=False, **kwargs)
        return ids[len(head) :] if ids[: len(head)] == head else None

    def _continued(self, text: str, **kwargs: Any) -> list[int]:
        """Ids of text that goes on where other text ended."""
        for before in ("\n", "=", "0") if self._adds_space else ():
            ids = self._after(before, text, **kwargs)
            if ids is not None:
                return ids
        return self._ids(text, add_special_tokens=False, **kwargs)

    def _plain(self, text: str) -> list[int]:
        """Ids of text whose special tokens are characters."""
        ids = self._continued(text, split_special_tokens=True)
        if len(text) > 1 and not self._forbidden_ids.isdisjoint(ids):  # an ordinary piece too
            return self._plain(text[:1]) + self._plain(text[1:])
        return ids

    def _tokenize(self, run: _Run, first: bool) -> list[int]:
        """Ids of a run that starts a prompt, or the part of one after a special token."""
        if run.plain:
            return self._plain(run.text)
        ids = None if first or self._anchor is None else self._after(self._anchor, run.text)
        return self._ids(run.text, add_special_tokens=False) if ids is None else ids

    def _runs(self, segments: Sequence[Segment]) -> list[_Run]:
        """Joins segments to as few runs as safety allows: a run ends only around forbidden text."""
        runs: list[_Run] = []
        start, context, end = self.image_tokens
        for kind, group in groupby(segments, key=lambda segment: segment.kind):
            text = "".join(segment.text for segment in group)  # joined: two parts may make up a special token
            if kind == "image":
                pieces = [_Run(text.replace(IMAGE_PLACEHOLDER, start + context + end))]
            elif kind == "text":
                pieces = [_Run(p, bool(i % 2)) for i, p in enumerate(self._forbidden.split(text)) if p]
            else:
                pieces = [_Run(text)]
            for piece in pieces:
                if runs and not (piece.plain or runs[-1].plain):
                    runs[-1] = _Run(runs[-1].text + piece.text)
                else:
                    runs.append(piece)
        return runs

    def _encode(self, segments: Sequence[Segment], first: bool) -> list[int]:
        ids: list[int] = list(self.bos) if first else []
        for i, run in enumerate(self._runs(segments)):
            ids += self._tokenize(run, first) if i == 0 or run.plain else self._continued(run.text)
        return ids

    def encode(self, segments: Sequence[Segment], image_lengths: Sequence[int]) -> EncodedPrompt:
        """Encodes a prompt in one pass.

        Args:
            segments: From `Conversation.segments()`.
            image_lengths: Visual tokens of each image, in order.

        Raises:
            ImageCountError: image slots and `image_lengths` differ in number.
            TokenizerError: there are images but the tokenizer has no image tokens.
        """
        self._check(segments, image_lengths)
        ids = self._encode(segments, first=True)
        return self._expand(ids, [False] * len(ids), image_lengths)

    def encode_supervised(self, segments: Sequence[Segment], image_lengths: Sequence[int]) -> EncodedPrompt:
        """Encodes a training conversation; the ids up to an answer are those of the inference prompt before it.

        Arguments and errors as for `encode`. Only what a conversation marks as supervised is.
        """
        self._check(segments, image_lengths)
        ids: list[int] = []
        supervised: list[bool] = []
        # A block ends with an answer's stop token. That is a special token, hence a hard border for any tokenizer.
        for block in _blocks(segments):
            first = not ids
            split = next((i for i, segment in enumerate(block) if segment.supervised), len(block))
            prompt = self._encode(block[:split], first)
            whole = self._encode(block, first)
            if whole[: len(prompt)] != prompt:  # the tokenizer merged across the border: keep the inference prompt
                whole = prompt + self._encode(block[split:], first=False)
            ids += whole
            supervised += [False] * len(prompt) + [True] * (len(whole) - len(prompt))
        return self._expand(ids, supervised, image_lengths)

    def _check(self, segments: Sequence[Segment], image_lengths: Sequence[int]) -> None:
        check_image_count(sum(segment.kind == "image" for segment in segments), len(image_lengths))
        if image_lengths and any(self.token_id(token) is None for token in self.image_tokens):
            missing = [token for token in self.image_tokens if self.token_id(token) is None]
            raise TokenizerError(
                f"The tokenizer has no {', '.join(missing)}. Use the tokenizer saved with the checkpoint, or add "
                f"them: tokenizer.add_special_tokens({{'extra_special_tokens': {missing}}}) and resize the embeddings."
            )

    def _expand(self, ids: list[int], supervised: list[bool], image_lengths: Sequence[int]) -> EncodedPrompt:
        """Repeats each context id to its image's number of tokens."""
        output = EncodedPrompt([])
        if image_lengths:  # trusted text may hold context tokens of its own
            check_image_count(ids.count(self.context_id), len(image_lengths), "The prompt with its image tokens")
        lengths = iter(image_lengths)
        for index, on in zip(ids, supervised, strict=True):
            repeat = 1
            if image_lengths and index == self.context_id:
                repeat = next(lengths)
                output.spans.append(MediaSpan("image", len(output.input_ids), repeat))
            output.input_ids += [index] * repeat
            output.supervised += [on] * repeat
        return output


def _former_names(tokenizer: Any, ids: set[int]) -> set[str]:
    """Texts that SentencePiece itself reads as these ids: InternLM2's control tokens are renamed spare pieces."""
    model = getattr(tokenizer, "sp_model", None)
    return set() if model is None else {model.id_to_piece(index) for index in ids if index < model.get_piece_size()}


def _blocks(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Groups segments into blocks that end where supervision ends."""
    blocks: list[list[Segment]] = [[]]
    for segment in segments:
        if blocks[-1] and blocks[-1][-1].supervised and not segment.supervised:
            blocks.append([])
        blocks[-1].append(segment)
    return blocks


_ENCODERS: WeakKeyDictionary = WeakKeyDictionary()


def prompt_encoder(
    tokenizer: Any, image_tokens: tuple[str, str, str] = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)
) -> PromptEncoder:
    """The encoder of a tokenizer, made once per tokenizer and set of tokens."""
    key, cached = (len(tokenizer), *tokenizer.all_special_tokens, image_tokens), _ENCODERS.get(tokenizer)
    if cached is None or cached[0] != key:
        # A proxy, because an entry that held its own key would keep every tokenizer alive.
        cached = (key, PromptEncoder(proxy(tokenizer), image_tokens))
        _ENCODERS[tokenizer] = cached
    return cached[1]
