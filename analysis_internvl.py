"""Looking into a model: boxes of what it is asked for, probabilities of answers, attention, pooled features.

Everything here is a method of the model, so that those who loaded the code from a Hub repository have it at hand.
Reading and drawing boxes is `grounding_internvl.py`, attention `attention_internvl.py`, films
`video_chat_internvl.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .attention_internvl import AttentionMap, Tiling, attention_map_of, attention_rows
from .grounding_internvl import Grounding, box_text, draw_boxes, grounding_question, parse_grounding
from .prompting_internvl import IGNORE_INDEX
from .tiling_internvl import load_image, to_rgb
from .turns_internvl import IMAGE_TOKENS, History, Turn, input_device, to_model
from .video_chat_internvl import InternVLVideoMixin, tiling_processor

NORMALIZATIONS = ("sum", "mean")
SOURCES = ("vision", "projector")
POOLINGS = ("mean", "max", "cls")


@dataclass(frozen=True)
class ChoiceScores:
    """How probable answers are.

    Attributes:
        choices: The answers.
        log_probs: Of each as a whole answer, its end of turn included; divided by its number of tokens with "mean".
        probabilities: The softmax of `log_probs`: shares among the choices.
        token_log_probs: Of each token of each answer.
    """

    choices: tuple[str, ...]
    log_probs: tuple[float, ...]
    probabilities: tuple[float, ...]
    token_log_probs: tuple[tuple[float, ...], ...]

    @property
    def best(self) -> str:
        """The most probable choice, of equals the first."""
        return self.choices[self.log_probs.index(max(self.log_probs))]


class InternVLAnalysisMixin(InternVLVideoMixin):
    """Methods of `InternVLChatModel` that say more than an answer, or ask about more than pictures."""

    parse_grounding = staticmethod(parse_grounding)
    draw_boxes = staticmethod(draw_boxes)
    box_text = staticmethod(box_text)

    # ------------------------------------------------------------------------------------------------------- grounding

    def ground(
        self,
        tokenizer: Any,
        image: Any,
        phrase: str,
        generation_config: Any = None,
        *,
        image_processor: Any = None,
        system: str | None = None,
    ) -> Grounding:
        """Asks where something is in an image.

        Args:
            tokenizer: The checkpoint's tokenizer.
            image: PIL image, path, URL or bytes.
            phrase: What to look for, asked about in the words of the RefCOCO evaluation; or a whole question with
                `<ref>...</ref>` in it, which is asked as it is.
            generation_config: As in `chat`; None for a greedy answer of at most 256 tokens.
            image_processor: The checkpoint's, if it has settings of its own, or its whole processor; None makes one
                from the configuration.
            system: As in `chat`.

        Returns:
            Boxes with labels in pixels of `image`, and the answer.

        Raises:
            ImageLoadError: the image cannot be read.
            TokenizerError, TemplateError: as in `chat`.
        """
        picture, pixel_values, _ = self._tiles_of(image, image_processor)
        options = {"max_new_tokens": 256, "do_sample": False} if generation_config is None else generation_config
        question = grounding_question(phrase)
        answer = self.chat(tokenizer, pixel_values, question, options, system=system, keep_markup=True)
        return parse_grounding(answer, *picture.size)

    def _tiles_of(self, image: Any, image_processor: Any) -> tuple[Any, torch.Tensor, Tiling]:
        processor = tiling_processor(self.config, image_processor)
        picture = to_rgb(load_image(image))
        return picture, processor([picture])["pixel_values"], Tiling.of(processor, picture.size)

    # --------------------------------------------------------------------------------------------------------- scoring

    @torch.no_grad()
    def score(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        choices: Sequence[str],
        num_patches_list: Sequence[int] | None = None,
        history: History | None = None,
        *,
        normalize: str = "sum",
        system: str | None = None,
        batch_size: int = 8,
    ) -> ChoiceScores:
        """Log-probability of each of several answers to a question; the images are encoded once.

        The end of turn counts as part of an answer, so "4" and "42" exclude each other, and a choice's `sum` is the
        probability that the model would write exactly it. Long answers are improbable for their length alone: "mean"
        divides by the number of tokens, which is no probability any more but fairer to choices of unlike length.

        Args:
            tokenizer, pixel_values, question, num_patches_list, history, system: As in `chat`.
            choices: Answers, tokenised as in training.
            normalize: "sum" or "mean".
            batch_size: Choices that run through the language model together.

        Raises:
            ImageCountError, TokenizerError, TemplateError: as in `chat`.
            ValueError: no choices, an unknown `normalize`, or a `batch_size` below 1.
        """
        choices = () if isinstance(choices, str) else tuple(choices)
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise ValueError("choices must be a non-empty list of strings.")
        if normalize not in NORMALIZATIONS:
            raise ValueError(f"normalize must be one of {', '.join(NORMALIZATIONS)}, got {normalize!r}.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        turn = Turn(self, tokenizer, IMAGE_TOKENS, True, system)
        turn.prepare(pixel_values, question, history, num_patches_list)
        rows = [turn.answered(choice) for choice in choices]
        tiles = to_model(self, turn.pixel_values)
        features = None if tiles is None else self.extract_feature(tiles)
        tokens: list[tuple[float, ...]] = []
        for start in range(0, len(rows), batch_size):
            tokens += self._answer_log_probs(rows[start : start + batch_size], features)
        totals = [sum(row) / (len(row) if normalize == "mean" else 1) for row in tokens]
        probabilities = torch.tensor(totals, dtype=torch.float64).softmax(0).tolist()
        return ChoiceScores(choices, tuple(totals), tuple(probabilities), tuple(tokens))

    def _answer_log_probs(
        self, rows: Sequence[tuple[list[int], list[int]]], features: torch.Tensor | None
    ) -> list[tuple[float, ...]]:
        """Log-probabilities of the labelled tokens of rows about the same images."""
        length, device = max(len(ids) for ids, _ in rows), input_device(self)
        shape = len(rows), length
        ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORE_INDEX)
        for i, (row_ids, row_labels) in enumerate(rows):
            ids[i, : len(row_ids)], labels[i, : len(row_ids)] = torch.tensor(row_ids), torch.tensor(row_labels)
            mask[i, : len(row_ids)] = 1
        visual = {}
        if features is not None:
            visual = {
                "visual_features": features,
                "tile_index": torch.arange(len(features), device=features.device).repeat(len(rows)),
            }
        scored = self(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            labels=labels.to(device),
            output_log_probs=True,
            use_cache=False,
            **visual,
        ).log_probs
        counts = (labels != IGNORE_INDEX).sum(1).tolist()
        return [tuple(part.tolist()) for part in scored.float().cpu().split(counts)]

    # ------------------------------------------------------------------------------------------------------- attention

    @torch.no_grad()
    def attention_map(
        self,
        tokenizer: Any,
        image: Any,
        question: str,
        answer: str | None = None,
        *,
        layers: Sequence[int] | None = None,
        image_processor: Any = None,
        pixel_values: torch.Tensor | None = None,
        tiling: Tiling | None = None,
        system: str | None = None,
    ) -> AttentionMap:
        """Where in an image the language model looks while it writes an answer.

        For every token of the answer, the attention of the position that predicts it. The vision tower has mixed the
        patches before, so a visual token stands for its place only mostly; and tokens that gather attention without
        meaning are common. Read a map against that of another question.

        Args:
            tokenizer: The checkpoint's tokenizer.
            image: As in `ground`; None with `pixel_values` and `tiling`.
            question: About this one image.
            answer: What is written; None for the position that predicts an answer's first token.
            layers: Numbers of the layers of the language model to average, negative ones from the end; None for all.
            image_processor, system: As in `ground`.
            pixel_values: (tiles, 3, S, S) of the image, with its `tiling`, instead of `image`.
            tiling: How `pixel_values` was cut: `Tiling.of(image_processor, (width, height))`.

        Raises:
            ValueError: both or neither of `image` and (`pixel_values`, `tiling`), a tiling of another number of tiles,
                an empty answer, or a layer that does not exist.
            ImageLoadError, TokenizerError, TemplateError: as in `ground`.
        """
        if (image is None) == (pixel_values is None) or (pixel_values is None) != (tiling is None):
            raise ValueError("Give either image, or pixel_values with its tiling.")
        if answer == "":
            raise ValueError("answer is empty; None asks for the position before an answer.")
        if image is not None:
            _, pixel_values, tiling = self._tiles_of(image, image_processor)
        if len(pixel_values) != tiling.tiles:
            raise ValueError(
                f"pixel_values has {len(pixel_values)} tiles, the tiling {tiling.tiles}; give the tiling with which "
                "pixel_values was made."
            )
        turn = Turn(self, tokenizer, IMAGE_TOKENS, True, system)
        turn.prepare(pixel_values, question, None, None)
        first = last = len(turn.prompt.input_ids) - 1
        ids, written = turn.prompt.input_ids, [""]
        if answer is not None:
            ids, labels = turn.answered(answer)
            last = max(i for i, label in enumerate(labels) if label != IGNORE_INDEX) - 2  # the end of turn aside
            written = [tokenizer.decode([index]) for index in ids[first + 1 : last + 2]]
        embeds = self.embed_prompt(torch.tensor([ids], device=input_device(self)), to_model(self, turn.pixel_values))
        (span,) = turn.prompt.spans
        keys = slice(span.start, span.start + span.length)
        weights = attention_rows(self.language_model, embeds, first, last, keys, layers)
        return attention_map_of(weights, written, tiling, self.ps_version == "v1")

    # ------------------------------------------------------------------------------------------------------ embeddings

    @torch.no_grad()
    def image_embeddings(
        self,
        pixel_values: torch.Tensor,
        num_patches_list: Sequence[int] | None = None,
        pooling: str = "mean",
        source: str = "vision",
        *,
        normalize: bool = True,
        thumbnail_only: bool = False,
    ) -> torch.Tensor:
        """One vector per image, for finding similar images.

        InternVL-Chat's towers are not trained to match text: compare images with images only. The vectors say how
        alike images look and, from the projector, what the language model would be told; a contrastive model is
        better at both. Compare only vectors made with equal settings.

        Args:
            pixel_values: (tiles, 3, S, S) of all images.
            num_patches_list: Tiles of each image; None takes every tile as an image.
            pooling: "mean" or "max" over the tokens of all tiles of an image, or "cls" for the mean of the tower's
                class tokens (source "vision" only).
            source: "vision" for the layer of the tower that the projector reads, "projector" for the visual tokens.
            normalize: Scale to length 1, so that a dot product is the cosine.
            thumbnail_only: Use the last tile of each image alone: the whole view, where there are thumbnails.

        Returns:
            (images, width) float32.

        Raises:
            ValueError: an unknown pooling or source, "cls" of the projector, or numbers that do not add up.
        """
        if pooling not in POOLINGS or source not in SOURCES or (pooling == "cls" and source != "vision"):
            raise ValueError(
                f"pooling={pooling!r} of source={source!r}: pooling must be one of {', '.join(POOLINGS)}, source "
                f"one of {', '.join(SOURCES)}; only the vision tower has a class token."
            )
        counts = [1] * len(pixel_values) if num_patches_list is None else [int(n) for n in num_patches_list]
        if any(n < 1 for n in counts) or sum(counts) != len(pixel_values):
            raise ValueError(f"num_patches_list {counts} does not add up to the {len(pixel_values)} tiles given.")
        if thumbnail_only:
            pixel_values = torch.stack([tiles[-1] for tiles in pixel_values.split(counts)])
            counts = [1] * len(counts)
        tokens = self._embedding_tokens(to_model(self, pixel_values), pooling, source)
        images = [part.flatten(0, 1) for part in tokens.float().split(counts)]
        pooled = torch.stack([image.amax(0) if pooling == "max" else image.mean(0) for image in images])
        return torch.nn.functional.normalize(pooled, dim=-1) if normalize else pooled

    def _embedding_tokens(self, pixel_values: torch.Tensor, pooling: str, source: str) -> torch.Tensor:
        """(tiles, tokens, width) to pool over."""
        if source == "projector":
            return self.extract_feature(pixel_values)
        _, states = self._tower_states(pixel_values)
        return states[:, :1] if pooling == "cls" else states[:, 1:]
