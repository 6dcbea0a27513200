"""The model in this process as an `Engine`.

Pictures and videos are read once per request, pictures are encoded and prompts computed once for all its answers
(`batch_answers`). How requests are spread over processes is `collecting`; nothing is tried again, and running out of
memory ends the run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..tiling_internvl import load_image
from ..turns_internvl import IMAGE_TOKENS, Turn
from .engines import Answer, Failure, Request, Sampling
from .request_media import DEFAULT_FRAMES, Picture, question_text, spell_request


@dataclass(frozen=True)
class _Prepared:
    """A request whose media are read: text with `<image>` marks, (tiles, 3, S, S), tiles of each picture, tokens."""

    request: Request
    question: str
    pixel_values: torch.Tensor | None
    num_patches: list[int]
    tokens: int = 0


class LocalEngine:
    """Answers with a model in this process, on the device and in the precision that it has.

    Args:
        model: An `InternVLChatModel`; it is put into evaluation mode.
        processor: Its `InternVLProcessor`.
        batch_size: Requests whose answers are computed together; each has `sampling.n` rows.
        num_frames: Frames of a video that does not say itself how many.
        exif: Turn pictures upright; boxes of published data sets refer to files as they are stored.
        keep_markup: Keep `<ref>`, `<box>` and `<quad>` in answers.
        workers: Threads that read media.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 8,
        *,
        num_frames: int = DEFAULT_FRAMES,
        exif: bool = True,
        keep_markup: bool = False,
        workers: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size
        self.num_frames, self.exif, self.keep_markup = num_frames, exif, keep_markup
        self.workers = workers or min(4, os.cpu_count() or 1)
        self.name: str = getattr(model.config, "_name_or_path", "") or type(model).__name__

    def sample(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Answer] | Failure]:
        """As `Engine.sample`; requests of about the same length and the same system text share batches.

        The random state of the process is left as it was.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            read = list(pool.map(self._read, requests))
        results: list[Any] = [self._fitting(item) for item in read]
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        with torch.random.fork_rng(devices):
            torch.manual_seed(sampling.seed)
            for batch in self._batches(results):
                answers = self._answers([results[place] for place in batch], sampling)
                for place, given in zip(batch, answers, strict=True):
                    results[place] = given
        return results

    # ------------------------------------------------------------------------------------------------------- one batch

    def _batches(self, prepared: Sequence[Any]) -> list[list[int]]:
        """Places of requests that are answered together."""
        groups: dict[str | None, list[int]] = {}
        for place, item in enumerate(prepared):
            if isinstance(item, _Prepared):
                groups.setdefault(item.request.system, []).append(place)
        batches = []
        for places in groups.values():
            places.sort(key=lambda place: prepared[place].tokens)
            batches += [places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size)]
        return batches

    def _answers(self, batch: Sequence[_Prepared], sampling: Sampling) -> list[list[Answer]]:
        tiles = [item.pixel_values for item in batch if item.pixel_values is not None]
        rows = self.model.batch_answers(
            self.processor.tokenizer,
            torch.cat(tiles) if tiles else None,
            [item.question for item in batch],
            generation_options(sampling),
            [item.num_patches for item in batch],
            system=batch[0].request.system,
            answer_prefixes=[item.request.prefix for item in batch],
            keep_markup=self.keep_markup,
        )
        return [[Answer(answer.text, answer.complete) for answer in row] for row in rows]

    # ----------------------------------------------------------------------------------------------------- one request

    def _read(self, request: Request) -> _Prepared | Failure:
        try:
            parts = spell_request(request, self.num_frames, self.exif)
            pixel_values, num_patches = self._tiles(parts, request.max_tiles)
        except (ValueError, OSError) as error:  # among them ImageLoadError and VideoLoadError
            return Failure(str(error))
        return _Prepared(request, question_text(parts), pixel_values, num_patches)

    def _fitting(self, item: _Prepared | Failure) -> _Prepared | Failure:
        """The request with its length, unless it is longer than the model's positions."""
        if isinstance(item, Failure):
            return item
        request, tokenizer = item.request, self.processor.tokenizer
        turn = Turn(self.model, tokenizer, IMAGE_TOKENS, self.keep_markup, request.system, request.prefix)
        turn.prepare(item.pixel_values, item.question, None, item.num_patches)
        tokens, limit = len(turn.prompt.input_ids), self.model.config.get_text_config().max_position_embeddings
        if tokens < limit:
            return replace(item, tokens=tokens)
        return Failure(
            f"the prompt has {tokens} tokens ({sum(item.num_patches)} tiles among them) and the model {limit} "
            "positions; lower max_tiles or the number of frames, or shorten the text"
        )

    def _tiles(self, parts: Sequence[str | Picture], max_tiles: int | None) -> tuple[torch.Tensor | None, list[int]]:
        """Tiles of all pictures in order; stills share the budget, as in training, and a frame is one tile."""
        pictures = [part for part in parts if isinstance(part, Picture)]
        stills = [load_image(picture.source, exif=self.exif) for picture in pictures if not picture.is_frame]
        budget = {} if max_tiles is None else {"max_dynamic_patch": max_tiles}
        groups = (
            (stills, {**budget, "divide_patches_by_images": True}),
            ([picture.source for picture in pictures if picture.is_frame], {"dynamic_image_size": False}),
        )
        tiles = [iter(self._process(images, options)) for images, options in groups]
        ordered = [next(tiles[picture.is_frame]) for picture in pictures]
        return (torch.cat(ordered) if ordered else None), [len(part) for part in ordered]

    def _process(self, images: list[Any], options: dict[str, Any]) -> Sequence[torch.Tensor]:
        if not images:
            return ()
        output = self.processor.image_processor(images, **options)
        return output["pixel_values"].split(output["num_patches"].tolist())


def generation_options(sampling: Sampling) -> dict[str, Any]:
    """Arguments of `generate` for a sampling."""
    options = {"max_new_tokens": sampling.max_new_tokens, "num_return_sequences": sampling.n, "num_beams": 1}
    if not sampling.temperature:
        return {**options, "do_sample": False}
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return {**options, **drawn, "do_sample": True}
