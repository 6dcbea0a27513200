"""Talking to InternVL: `chat`, `batch_chat` and `stream_chat`, with the signatures that existing scripts use.

Nothing that a caller passes (dictionary, list, tokenizer) is changed. Prompts come from `conversation.py`, ids from
`prompting_internvl.py`, reuse across turns from `session_internvl.py`, generation arguments from
`generation_internvl.py`, streams from `streaming_internvl.py`; this file connects them to `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from .conversation import IMAGE_PLACEHOLDER, Conversation, get_conv_template, template_names
from .generation_internvl import cacheable, generation_options, option
from .prompting_internvl import (
    IMG_CONTEXT_TOKEN,
    IMG_END_TOKEN,
    IMG_START_TOKEN,
    USER_MARKUP,
    EncodedPrompt,
    ImageCountError,
    check_image_count,
    prompt_encoder,
)
from .session_internvl import ChatSession
from .streaming_internvl import AnswerStreamer, stream_text

History = Sequence[tuple[str, str]]


class InternVLChatMixin:
    """Conversation methods of `InternVLChatModel`."""

    def _init_chat(self) -> None:
        self.system_message = self.config.system_message
        if self.system_message is None and self.config.template in template_names():
            self.system_message = get_conv_template(self.config.template).system_message

    @property
    def conv_template(self) -> Conversation:
        """An empty conversation on the model's template and system message."""
        conversation = get_conv_template(self.template)
        if self.system_message is not None:
            conversation.set_system_message(self.system_message)
        return conversation

    def new_session(self) -> ChatSession:
        """A session to pass to every `chat` call of one conversation, so that no turn is computed twice."""
        return ChatSession(self)

    # ------------------------------------------------------------------------------------------------------------ chat

    @torch.no_grad()
    def chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: History | None = None,
        return_history: bool = False,
        num_patches_list: Sequence[int] | None = None,
        IMG_START_TOKEN: str = IMG_START_TOKEN,
        IMG_END_TOKEN: str = IMG_END_TOKEN,
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT_TOKEN,
        verbose: bool = False,
        *,
        keep_markup: bool = False,
        session: ChatSession | None = None,
    ) -> str | tuple[str, list[tuple[str, str]]]:
        """Answers a question, with any number of images and earlier turns.

        Args:
            tokenizer: The checkpoint's tokenizer.
            pixel_values: (tiles, 3, S, S) of all images of the whole conversation, in order; None without images.
            question: `<image>` marks where an image goes. Where neither the question nor an earlier one has a mark,
                one is put in front for each image.
            generation_config: Generation arguments as a dictionary, or a `GenerationConfig`.
            history: Earlier (question, answer) pairs as a previous call returned them.
            return_history: Also return the history with this turn added (a new list).
            num_patches_list: Tiles of each image; None takes all tiles as one image.
            IMG_START_TOKEN, IMG_END_TOKEN, IMG_CONTEXT_TOKEN: Texts of the image tokens.
            verbose: Print prompt and answer.
            keep_markup: Keep `<ref>`, `<box>` and `<quad>` in the answer, which by default loses all special tokens.
            session: From `new_session`; reuses visual features and cache across the turns of a conversation.

        Returns:
            The answer, or (answer, history).

        Raises:
            ImageCountError: placeholders and images differ in number, or `num_patches_list` does not add up.
            TokenizerError: the tokenizer lacks the image tokens.
            TemplateError: `model.template` is unknown.
        """
        turn = _Turn(self, tokenizer, (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN), keep_markup)
        question = turn.prepare(pixel_values, question, history, num_patches_list)
        answer = turn.decode(turn.run(generation_config, session or ChatSession(self, reuse=False)))
        if verbose:
            print(turn.prompt_text(), answer, sep="")  # noqa: T201
        return (answer, [*(history or []), (question, answer)]) if return_history else answer

    @torch.no_grad()
    def batch_chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        num_patches_list: Sequence[int] | Sequence[Sequence[int]] | None = None,
        history: Sequence[History | None] | None = None,
        return_history: bool = False,
        IMG_START_TOKEN: str = IMG_START_TOKEN,
        IMG_END_TOKEN: str = IMG_END_TOKEN,
        IMG_CONTEXT_TOKEN: str = IMG_CONTEXT_TOKEN,
        verbose: bool = False,
        image_counts: Sequence[int] | None = None,
        *,
        keep_markup: bool = False,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Answers many questions at once; each row may have its own images and history, or none.

        Args:
            tokenizer, generation_config, verbose, keep_markup, IMG_*: As in `chat`.
            pixel_values: (tiles, 3, S, S) of all rows' images, row by row.
            questions: One per row.
            num_patches_list: Tiles of each image. A list of lists assigns images to rows; a flat list is dealt out by
                the `<image>` marks of the rows, or, where marks are missing, one image to each row.
            history: Per row, earlier (question, answer) pairs or None.
            return_history: Also return every row's new history.
            image_counts: Old name of `num_patches_list`.

        Returns:
            Answers in the order of `questions`, or (answers, histories).

        Raises:
            ImageCountError, TokenizerError, TemplateError: as in `chat`.
            ValueError: `history` has another length than `questions`, or there are no questions.
        """
        if isinstance(questions, str) or not questions:
            raise ValueError("questions must be a non-empty list of strings; for a single question use chat().")
        histories = list(history) if history is not None else [None] * len(questions)
        if len(histories) != len(questions):
            raise ValueError(f"history has {len(histories)} entries for {len(questions)} questions.")
        patches = num_patches_list if num_patches_list is not None else image_counts
        rows = _deal_images(pixel_values, questions, histories, patches)
        turns, tiles_used, asked = [], 0, []
        for question, past, row in zip(questions, histories, rows, strict=True):
            turn = _Turn(self, tokenizer, (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN), keep_markup)
            tiles = None if not row else pixel_values[tiles_used : tiles_used + sum(row)]
            tiles_used += sum(row)
            asked.append(turn.prepare(tiles, question, past, row))
            turns.append(turn)
        answers = _run_batch(self, turns, pixel_values, generation_config)
        if verbose:
            for turn, answer in zip(turns, answers, strict=True):
                print(turn.prompt_text(), answer, sep="")  # noqa: T201
        if not return_history:
            return answers
        return answers, [[*(h or []), (q, a)] for h, q, a in zip(histories, asked, answers, strict=True)]

    def stream_chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: History | None = None,
        num_patches_list: Sequence[int] | None = None,
        *,
        keep_markup: bool = False,
        session: ChatSession | None = None,
    ) -> Iterator[str]:
        """As `chat`, but yields the answer piece by piece; the pieces join to what `chat` would return.

        Bad arguments raise at the call, not at the first piece. Closing the iterator stops the generation.

        Raises:
            ValueError: beams or several sequences are asked for, which cannot be streamed.
            ImageCountError, TokenizerError, TemplateError: as in `chat`.
        """
        turn = _Turn(self, tokenizer, (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN), keep_markup)
        turn.prepare(pixel_values, question, history, num_patches_list)
        options = turn.options(generation_config)
        for name in ("num_beams", "num_return_sequences"):
            if (option(self, options, name) or 1) != 1:
                raise ValueError(f"An answer with {name} > 1 cannot be streamed; use chat().")
        run = partial(turn.run, generation_config, session or ChatSession(self, reuse=False))
        streamer = AnswerStreamer(tokenizer, turn.hidden_ids(), turn.header_ids())
        return stream_text(run, streamer, turn.conversation.template.end_of_turn)


# ------------------------------------------------------------------------------------------------------------ one turn


class _Turn:
    """One question on its way through a model: conversation, prompt, generation, answer."""

    def __init__(self, model: Any, tokenizer: Any, image_tokens: tuple[str, str, str], keep_markup: bool) -> None:
        self.model, self.tokenizer, self.keep_markup = model, tokenizer, keep_markup
        self.encoder = prompt_encoder(tokenizer, image_tokens)
        self.pixel_values: torch.Tensor | None = None
        self.num_patches: list[int] = []

    def prepare(
        self,
        pixel_values: torch.Tensor | None,
        question: str,
        history: History | None,
        num_patches_list: Sequence[int] | None,
    ) -> str:
        """Builds the prompt; returns the question as it stands in the history (image marks included)."""
        if not isinstance(question, str):
            raise TypeError(f"question must be a string, got {type(question).__name__}.")
        self.num_patches = _num_patches(pixel_values, num_patches_list)
        self.pixel_values = pixel_values if self.num_patches else None
        history = list(history or [])
        if not history and IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n" * len(self.num_patches) + question
        conversation = self.model.conv_template
        for asked, answered in history:
            conversation.append_message(conversation.roles[0], asked)
            conversation.append_message(conversation.roles[1], answered)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        marks = question.count(IMAGE_PLACEHOLDER) + sum(q.count(IMAGE_PLACEHOLDER) for q, _ in history)
        check_image_count(marks, len(self.num_patches), "The question" + (" with its history" if history else ""))
        self.conversation = conversation
        lengths = [sum(self.model.config.tokens_per_tile(n)) for n in self.num_patches]
        self.prompt: EncodedPrompt = self.encoder.encode(conversation.segments(), lengths)
        if self.num_patches:
            self.model.img_context_token_id = self.encoder.context_id
        return question

    def prompt_text(self) -> str:
        """The prompt for people to read: image slots stay `<image>`."""
        return self.conversation.get_prompt()

    def options(self, generation_config: dict[str, Any] | GenerationConfig | None) -> dict[str, Any]:
        """Arguments for `generate`."""
        end_of_turn = self.encoder.token_id(self.conversation.template.end_of_turn)
        return generation_options(self.model, self.tokenizer, end_of_turn, generation_config)

    def run(
        self,
        generation_config: dict[str, Any] | GenerationConfig | None,
        session: ChatSession,
        **extra: Any,
    ) -> list[int]:
        """Generates; returns the new ids."""
        options = self.options(generation_config)
        stopping = [*(options.pop("stopping_criteria", None) or []), *extra.pop("stopping_criteria", [])]
        extra["stopping_criteria"] = StoppingCriteriaList(stopping)
        pixel_values = _to_model(self.model, self.pixel_values)
        digests = session.encode_images(pixel_values, self.num_patches)
        ids = torch.tensor([self.prompt.input_ids], device=_input_device(self.model))
        embeds = self.model.embed_prompt(ids, visual_features=session.features(digests))
        keys, cache = session.prompt_keys(self.prompt, digests), None
        if cacheable(self.model, options):
            cache = extra["past_key_values"] = session.cache_for(keys)
        output = self.model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids), **options, **extra)
        new_ids = _sequences(output)[0].tolist()
        if cache is not None:
            session.commit(cache, keys, new_ids)
        return new_ids

    def header_ids(self) -> list[int]:
        """Ids that the model itself writes before an answer and that are no part of it (gpt-oss: its channel)."""
        header = self.conversation.template.answer_prefix.strip()
        return self.tokenizer(header, add_special_tokens=False)["input_ids"] if header else []

    def hidden_ids(self) -> set[int]:
        """Special ids that an answer does not show."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {i for i, token in added.items() if token.special} | set(self.tokenizer.all_special_ids)
        if self.keep_markup:
            special -= {self.encoder.token_id(token) for token in USER_MARKUP}
        return special

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text, cut at the end of the turn."""
        header, ids = self.header_ids(), list(ids)
        ids = ids[len(header) :] if ids[: len(header)] == header else ids
        if self.keep_markup:
            hidden = self.hidden_ids()
            text = self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
        else:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.split(self.conversation.template.end_of_turn)[0].strip()


def _num_patches(pixel_values: torch.Tensor | None, num_patches_list: Sequence[int] | None) -> list[int]:
    if pixel_values is not None and not isinstance(pixel_values, torch.Tensor):
        raise TypeError(f"pixel_values must be a torch tensor or None, got {type(pixel_values).__name__}.")
    tiles = 0 if pixel_values is None else pixel_values.shape[0]
    if num_patches_list is None:
        return [tiles] if tiles else []
    patches = [int(n) for n in num_patches_list]
    if any(n < 1 for n in patches) or sum(patches) != tiles:
        raise ImageCountError(
            f"num_patches_list {patches} adds up to {sum(patches)} tile(s), but pixel_values has {tiles}. Give one "
            "entry per image, each the number of its tiles (at least 1)."
        )
    return patches


def _input_device(model: Any) -> torch.device:
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate's hooks move inputs


def _to_model(model: Any, pixel_values: torch.Tensor | None) -> torch.Tensor | None:
    if pixel_values is None or getattr(model, "hf_device_map", None):
        return pixel_values
    return pixel_values.to(model.vision_model.device)


def _sequences(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sequences


# --------------------------------------------------------------------------------------------------------------- batch


def _deal_images(
    pixel_values: torch.Tensor | None,
    questions: Sequence[str],
    histories: Sequence[History | None],
    num_patches_list: Any,
) -> list[list[int]]:
    """Tiles of each image of each row."""
    if num_patches_list is not None and any(isinstance(row, (list, tuple)) for row in num_patches_list):
        rows = [[int(n) for n in row or []] for row in num_patches_list]
        if len(rows) != len(questions):
            raise ImageCountError(f"num_patches_list has {len(rows)} rows for {len(questions)} questions.")
        _num_patches(pixel_values, [n for row in rows for n in row])
        return rows
    if num_patches_list is None and pixel_values is not None and len(questions) > 1:
        raise ImageCountError(
            "batch_chat needs num_patches_list with several questions: tiles of each image, or a list of such per row."
        )
    patches = _num_patches(pixel_values, num_patches_list)
    marks = [
        q.count(IMAGE_PLACEHOLDER) + sum(asked.count(IMAGE_PLACEHOLDER) for asked, _ in past or [])
        for q, past in zip(questions, histories, strict=True)
    ]
    if sum(marks) != len(patches) and len(patches) == len(questions) and max(marks) <= 1:
        marks = [1] * len(questions)  # as the original: a missing mark is put in front of its question
    check_image_count(sum(marks), len(patches), "The batch")
    images = iter(patches)
    return [[next(images) for _ in range(count)] for count in marks]


def _run_batch(
    model: Any,
    turns: Sequence[_Turn],
    pixel_values: torch.Tensor | None,
    generation_config: dict[str, Any] | GenerationConfig | None,
) -> list[str]:
    options = turns[0].options(generation_config)
    if (option(model, options, "num_return_sequences") or 1) != 1:
        raise ValueError("batch_chat returns one answer per question; use generate() for num_return_sequences > 1.")
    length = max(len(turn.prompt.input_ids) for turn in turns)
    pad = option(model, options, "pad_token_id")
    ids = torch.full((len(turns), length), pad, device=_input_device(model))
    mask = torch.zeros_like(ids)
    for row, turn in enumerate(turns):
        prompt = torch.tensor(turn.prompt.input_ids, device=ids.device)
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    used = pixel_values if any(turn.num_patches for turn in turns) else None
    embeds = model.embed_prompt(ids, pixel_values=_to_model(model, used))
    output = _sequences(model.generate(inputs_embeds=embeds, attention_mask=mask, **options))
    return [turn.decode(new_ids) for turn, new_ids in zip(turns, output.tolist(), strict=True)]
