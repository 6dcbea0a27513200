"""Talking to InternVL: `chat`, `batch_chat` and `stream_chat`, with the signatures that existing scripts use.

Nothing that a caller passes (dictionary, list, tokenizer) is changed. A question's way from prompt to answer is
`turns_internvl.py`, reuse across turns `session_internvl.py`, streams `streaming_internvl.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from .conversation import Conversation, get_conv_template, template_names
from .generation_internvl import id_list, option
from .prompting_internvl import IMG_CONTEXT_TOKEN, IMG_END_TOKEN, IMG_START_TOKEN
from .reasoning_internvl import split_reasoning, split_reasoning_stream, without_reasoning
from .session_internvl import ChatSession
from .streaming_internvl import AnswerStreamer, stream_text
from .tools_internvl import Tool, parse_tool_calls, tool_results
from .turns_internvl import (
    IMAGE_TOKENS,
    ChatAnswer,
    History,
    Turn,
    histories_of,
    prepare_batch,
    run_batch,
    run_batch_with_log_probs,
)


class InternVLChatMixin:
    """Conversation methods of `InternVLChatModel`."""

    # What reads answers is at hand as methods too, for those who loaded the code from a Hub repository.
    split_reasoning = staticmethod(split_reasoning)
    split_reasoning_stream = staticmethod(split_reasoning_stream)
    without_reasoning = staticmethod(without_reasoning)
    parse_tool_calls = staticmethod(parse_tool_calls)
    tool_results = staticmethod(tool_results)

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
        system: str | None = None,
        keep_markup: bool = False,
        session: ChatSession | None = None,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
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
            system: System text instead of `model.system_message`; "" for none.
            keep_markup: Keep `<ref>`, `<box>` and `<quad>` in the answer, which by default loses all special tokens.
            session: From `new_session`; reuses visual features and cache across the turns of a conversation.
            thinking: True asks for thinking before the answer, by the system text of the InternVL 3.5 card (behind
                `system`, if that is given, else instead of the model's own); `split_reasoning` tells the two apart.
                False keeps a model from thinking by beginning its answer with an empty thought. None does nothing.
            tools: Python functions or JSON schemas that the model may call, described behind the system text;
                `parse_tool_calls` reads the calls, `tool_results` makes the next question of their results.

        Returns:
            The answer, or (answer, history).

        Raises:
            ImageCountError: placeholders and images differ in number, or `num_patches_list` does not add up.
            TokenizerError: the tokenizer lacks the image tokens.
            TemplateError: `model.template` is unknown, or tools are given to a model that was not trained on any.
            TypeError: a tool is neither a function nor a JSON schema, an entry of `history` no pair of strings, or
                `generation_config` or `thinking` something else than what is named above.
            ValueError: `session` is that of another model.
        """
        image_tokens = IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN
        turn = Turn(self, tokenizer, image_tokens, keep_markup, system, thinking=thinking, tools=tools)
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
        system: str | None = None,
        keep_markup: bool = False,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> list[str] | tuple[list[str], list[list[tuple[str, str]]]]:
        """Answers many questions at once; each row may have its own images and history, or none.

        Args:
            tokenizer, generation_config, verbose, system, keep_markup, thinking, tools, IMG_*: As in `chat`.
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
        image_tokens = IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN
        histories = histories_of(questions, history)
        extra = {"thinking": thinking, "tools": tools}
        turns = [Turn(self, tokenizer, image_tokens, keep_markup, system, **extra) for _ in questions]
        patches = num_patches_list if num_patches_list is not None else image_counts
        asked = prepare_batch(turns, pixel_values, questions, histories, patches)
        options = turns[0].options(generation_config)
        if (option(self, options, "num_return_sequences") or 1) != 1:
            raise ValueError("batch_chat returns one answer; for num_return_sequences > 1 use batch_answers().")
        answers = [turn.decode(ids) for turn, (ids,) in zip(turns, run_batch(self, turns, options), strict=True)]
        if verbose:
            for turn, answer in zip(turns, answers, strict=True):
                print(turn.prompt_text(), answer, sep="")  # noqa: T201
        if not return_history:
            return answers
        return answers, [[*(h or []), (q, a)] for h, q, a in zip(histories, asked, answers, strict=True)]

    @torch.no_grad()
    def batch_answers(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        questions: Sequence[str],
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        num_patches_list: Sequence[int] | Sequence[Sequence[int]] | None = None,
        history: Sequence[History | None] | None = None,
        *,
        system: str | None = None,
        answer_prefixes: Sequence[str] | None = None,
        keep_markup: bool = False,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
        return_log_probs: bool = False,
    ) -> list[list[ChatAnswer]]:
        """Several answers to each of many questions; images and prompts are computed once per question.

        Args:
            tokenizer, pixel_values, questions, num_patches_list, history, system, keep_markup, thinking, tools: As in
                `batch_chat`.
            generation_config: Its `num_return_sequences` says how many answers, `do_sample` makes them differ.
            answer_prefixes: Per question, how its answers begin; the model goes on from there. "" for nothing.
            return_log_probs: Fill `ChatAnswer.log_probs`. While generating, the logits of every step are kept: new
                tokens x answers x vocabulary x 4 bytes.

        Returns:
            Per question its answers.

        Raises:
            ImageCountError, TokenizerError, TemplateError, ValueError: as in `batch_chat`.
            ValueError: `return_log_probs` with beams.
        """
        histories = histories_of(questions, history)
        prefixes = [""] * len(questions) if answer_prefixes is None else list(answer_prefixes)
        if len(prefixes) != len(questions):
            raise ValueError(f"answer_prefixes has {len(prefixes)} entries for {len(questions)} questions.")
        extra = {"thinking": thinking, "tools": tools}
        turns = [Turn(self, tokenizer, IMAGE_TOKENS, keep_markup, system, prefix, **extra) for prefix in prefixes]
        prepare_batch(turns, pixel_values, questions, histories, num_patches_list)
        options = turns[0].options(generation_config)
        stops = set(id_list(option(self, options, "eos_token_id")))
        if not return_log_probs:
            answers = run_batch(self, turns, options)
            return [[turn.answer(ids, stops) for ids in rows] for turn, rows in zip(turns, answers, strict=True)]
        answers, log_probs = run_batch_with_log_probs(self, turns, options)
        return [
            [turn.answer(ids, stops, values) for ids, values in zip(rows, row_values, strict=True)]
            for turn, rows, row_values in zip(turns, answers, log_probs, strict=True)
        ]

    def stream_chat(
        self,
        tokenizer: Any,
        pixel_values: torch.Tensor | None,
        question: str,
        generation_config: dict[str, Any] | GenerationConfig | None = None,
        history: History | None = None,
        num_patches_list: Sequence[int] | None = None,
        *,
        system: str | None = None,
        keep_markup: bool = False,
        session: ChatSession | None = None,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> Iterator[str]:
        """As `chat`, but yields the answer piece by piece; the pieces join to what `chat` would return.

        With `thinking=True`, `split_reasoning_stream(pieces)` tells thoughts from answer.

        Bad arguments raise at the call, not at the first piece. Closing the iterator stops the generation.

        Raises:
            ValueError: beams or several sequences are asked for, which cannot be streamed.
            ImageCountError, TokenizerError, TemplateError: as in `chat`.
        """
        turn = Turn(self, tokenizer, IMAGE_TOKENS, keep_markup, system, thinking=thinking, tools=tools)
        turn.prepare(pixel_values, question, history, num_patches_list)
        options = turn.options(generation_config)
        for name in ("num_beams", "num_return_sequences"):
            if (option(self, options, name) or 1) != 1:
                raise ValueError(f"An answer with {name} > 1 cannot be streamed; use chat().")
        run = partial(turn.run, generation_config, session or ChatSession(self, reuse=False))
        streamer = AnswerStreamer(tokenizer, turn.hidden_ids(), turn.header_ids())
        return stream_text(run, streamer, turn.conversation.template.end_of_turn)
