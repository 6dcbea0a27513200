"""One question on its way through a model: conversation, prompt, generation, answer; and many of them at once.

`chat_internvl.py` has what people call. Nothing that a caller passes is changed here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteriaList

from .conversation import IMAGE_PLACEHOLDER, Conversation, Segment, TemplateError
from .generation_internvl import cacheable, generation_options, option
from .prompting_internvl import (
    IGNORE_INDEX,
    IMG_CONTEXT_TOKEN,
    IMG_END_TOKEN,
    IMG_START_TOKEN,
    USER_MARKUP,
    EncodedPrompt,
    ImageCountError,
    check_image_count,
    prompt_encoder,
)
from .reasoning_internvl import NO_THINKING_PREFIX, THINK_END, THINK_START, thinking_system
from .session_internvl import ChatSession
from .tools_internvl import CALL_END, CALL_START, Tool

History = Sequence[tuple[str, str]]
IMAGE_TOKENS = (IMG_START_TOKEN, IMG_CONTEXT_TOKEN, IMG_END_TOKEN)


@dataclass(frozen=True)
class ChatAnswer:
    """One of several answers.

    Attributes:
        text: What the model wrote after the prefix, if it was given one; not stripped.
        ids: Its new tokens, up to a stop token.
        complete: Whether it ended with a stop token, not at the limit.
        log_probs: Of each of `ids`, under the model itself: before temperature, `top_k` and penalties. None where they
            were not asked for.
    """

    text: str
    ids: tuple[int, ...]
    complete: bool
    log_probs: tuple[float, ...] | None = None


class Turn:
    """One question on its way through a model: conversation, prompt, generation, answer.

    Args:
        model: The `InternVLChatModel`.
        tokenizer: The checkpoint's.
        image_tokens: Texts of the start, context and end tokens of an image.
        keep_markup: Keep grounding markup in the answer.
        system: System text; None for the model's.
        prefix: How the answer begins.
        thinking: True asks for thinking in the system text, False begins the answer with an empty thought.
        tools: Functions or JSON schemas described in the system text.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_tokens: tuple[str, str, str],
        keep_markup: bool,
        system: str | None = None,
        prefix: str = "",
        *,
        thinking: bool | None = None,
        tools: Sequence[Tool] | None = None,
    ) -> None:
        if thinking not in (True, False, None):
            raise TypeError(f"thinking must be True, False or None, got {thinking!r}.")
        self.model, self.tokenizer, self.keep_markup = model, tokenizer, keep_markup
        self.system, self.prefix = system, prefix
        self.thinking, self.tools = thinking, tools
        if thinking is False and not model.conv_template.template.answer_prefix.strip():
            self.prefix = NO_THINKING_PREFIX + prefix  # gpt-oss has a channel for its thoughts instead
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
        history = _checked_history(history)
        if not history and IMAGE_PLACEHOLDER not in question:
            question = f"{IMAGE_PLACEHOLDER}\n" * len(self.num_patches) + question
        conversation = self._empty_conversation()
        for asked, answered in history:
            conversation.append_message(conversation.roles[0], asked)
            conversation.append_message(conversation.roles[1], answered)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        marks = question.count(IMAGE_PLACEHOLDER) + sum(q.count(IMAGE_PLACEHOLDER) for q, _ in history)
        check_image_count(marks, len(self.num_patches), "The question" + (" with its history" if history else ""))
        self.conversation = conversation
        lengths = [sum(self.model.config.tokens_per_tile(n)) for n in self.num_patches]
        self.prompt: EncodedPrompt = self.encoder.encode([*conversation.segments(), *self._prefix_segments()], lengths)
        self.image_lengths = lengths
        if self.num_patches:
            self.model.img_context_token_id = self.encoder.context_id
        return question

    def _empty_conversation(self) -> Conversation:
        """The model's template with the system text of this turn."""
        conversation = self.model.conv_template
        system = thinking_system(self.system) if self.thinking else self.system
        if system is not None:
            conversation.set_system_message(system)
        kind = self.model.config.get_text_config().model_type
        if self.tools and conversation.template.tools and not kind.startswith("qwen"):
            raise TemplateError(
                f"The language model ({kind}) was not trained on tool calls; of the models on template "
                f"{conversation.name!r} those on Qwen were. Describe the tools in `system` in your own words instead."
            )
        conversation.describe_tools(self.tools)
        return conversation

    def _prefix_segments(self) -> list[Segment]:
        """The beginning of the answer, with what the template has before any answer."""
        if not self.prefix:
            return []
        start = [Segment(self.conversation.template.answer_prefix), Segment(self.prefix, "text")]
        return [segment for segment in start if segment.text]

    def answered(self, answer: str) -> tuple[list[int], list[int]]:
        """Ids of the prepared conversation with an answer to it, and their labels.

        The ids are those of training: the prompt, what the template has before an answer, the answer and its end of
        turn, which are labelled; everything before is -100.
        """
        conversation = self.conversation.copy()
        conversation.messages[-1][1] = self.prefix + answer
        encoded = self.encoder.encode_supervised(conversation.segments(), self.image_lengths)
        start = len(self.prompt.input_ids)
        return encoded.input_ids, [IGNORE_INDEX] * start + encoded.labels[start:]

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
        pixel_values = to_model(self.model, self.pixel_values)
        ids = torch.tensor([self.prompt.input_ids], device=input_device(self.model))
        extra["attention_mask"] = torch.ones_like(ids)
        if option(self.model, options, "assistant_model") is not None:  # which reads and looks for itself
            output = self.model.generate(input_ids=ids, pixel_values=pixel_values, **options, **extra)
            return _sequences(output)[0, ids.shape[1] :].tolist()
        session.follow(self.model)
        digests = session.encode_images(pixel_values, self.num_patches)
        embeds = self.model.embed_prompt(ids, visual_features=session.features(digests))
        keys, cache = session.prompt_keys(self.prompt, digests), None
        if cacheable(self.model, options):
            cache = extra["past_key_values"] = session.cache_for(keys)
        output = self.model.generate(inputs_embeds=embeds, **options, **extra)
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
        return special - {self.encoder.token_id(token) for token in self._kept_marks()}

    def _kept_marks(self) -> set[str]:
        """Texts that stay in an answer even where the tokenizer has them as special tokens."""
        marks = set(USER_MARKUP) if self.keep_markup else set()
        if self.thinking is not None:
            marks |= {THINK_START, THINK_END}
        return marks | {CALL_START, CALL_END} if self.tools else marks

    def decode(self, ids: Sequence[int]) -> str:
        """The answer's text, cut at the end of the turn."""
        return self._text(ids).strip()

    def answer(self, ids: Sequence[int], stops: set[int], log_probs: Sequence[float] | None = None) -> ChatAnswer:
        """What a row of a batch holds: ids that end with the first of `stops`, if there is one, and then padding."""
        ids = list(ids)
        end = next((i + 1 for i, index in enumerate(ids) if index in stops), None)
        ids, kept = ids[:end], None if log_probs is None else tuple(log_probs[:end])
        if not self.prefix:
            return ChatAnswer(self._text(ids), tuple(ids), end is not None, kept)
        # Together, since some tokenizers drop the space of a first word.
        start = self.encoder.encode([Segment(self.prefix, "text")], []).input_ids
        before, whole = self._text(start), self._text([*start, *ids])
        text = whole[len(before) :] if whole.startswith(before) else self._text(ids)
        return ChatAnswer(text, tuple(ids), end is not None, kept)

    def _text(self, ids: Sequence[int]) -> str:
        header, ids = self.header_ids(), list(ids)
        ids = ids[len(header) :] if ids[: len(header)] == header else ids
        if self._kept_marks():
            hidden = self.hidden_ids()
            text = self.tokenizer.decode([i for i in ids if i not in hidden], skip_special_tokens=False)
        else:
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text.split(self.conversation.template.end_of_turn)[0]


def _checked_history(history: History | None) -> list[tuple[str, str]]:
    pairs = [] if history is None else list(history)
    for i, pair in enumerate(pairs):
        whole = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        if not whole:
            raise TypeError(
                f"history[{i}] must be a pair (question, answer) of strings, got {pair!r:.80}. Messages with roles go "
                "through processor.apply_chat_template and generate."
            )
    return pairs


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


def input_device(model: Any) -> torch.device:
    """Where a model's token ids must lie."""
    device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device  # offloaded: accelerate's hooks move inputs


def to_model(model: Any, pixel_values: torch.Tensor | None) -> torch.Tensor | None:
    """Tiles on the vision tower's device; hooks move them where a device map has placed its parts."""
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


def histories_of(questions: Sequence[str], history: Sequence[History | None] | None) -> list[History | None]:
    """A history, or None, for each question.

    Raises:
        ValueError: `questions` is no list, or the histories are not as many.
        TypeError: an entry of a history is no pair of strings.
    """
    if isinstance(questions, str) or not questions:
        raise ValueError("questions must be a non-empty list of strings; for a single question use chat().")
    given = [None] * len(questions) if history is None else list(history)
    histories = [None if past is None else _checked_history(past) for past in given]
    if len(histories) != len(questions):
        raise ValueError(f"history has {len(histories)} entries for {len(questions)} questions.")
    return histories


def prepare_batch(
    turns: Sequence[Turn],
    pixel_values: torch.Tensor | None,
    questions: Sequence[str],
    histories: Sequence[History | None],
    num_patches_list: Any,
) -> list[str]:
    """Gives every turn its tiles and question; returns the questions as they stand in the history."""
    rows = _deal_images(pixel_values, questions, histories, num_patches_list)
    tiles_used, asked = 0, []
    for turn, question, past, row in zip(turns, questions, histories, rows, strict=True):
        tiles = None if not row else pixel_values[tiles_used : tiles_used + sum(row)]
        tiles_used += sum(row)
        asked.append(turn.prepare(tiles, question, past, row))
    return asked


def run_batch(model: Any, turns: Sequence[Turn], options: dict[str, Any]) -> list[list[list[int]]]:
    """New ids of each turn's answers, `num_return_sequences` of them."""
    return _per_turn(_sequences(_generate_batch(model, turns, options)).tolist(), turns)


def run_batch_with_log_probs(
    model: Any, turns: Sequence[Turn], options: dict[str, Any]
) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """As `run_batch`, with the log-probability of each id.

    Raises:
        ValueError: beams are asked for, whose logits transformers keeps in another order.
    """
    if (option(model, options, "num_beams") or 1) != 1:
        raise ValueError("return_log_probs works without beams: set num_beams=1, or score() what was answered.")
    wanted = {"return_dict_in_generate": True, "output_logits": True}
    if options.get("generation_config") is not None:  # the caller's copy: see generation_options
        for name, value in wanted.items():
            setattr(options["generation_config"], name, value)
        wanted = {}
    output = _generate_batch(model, turns, {**options, **wanted})
    ids = _sequences(output)
    # One step at a time: a vocabulary's worth of numbers per token is large enough once.
    steps = [step.float().log_softmax(-1).gather(-1, ids[:, [i]]) for i, step in enumerate(output.logits)]
    return _per_turn(ids.tolist(), turns), _per_turn(torch.cat(steps, dim=1).tolist(), turns)


def _per_turn(rows: list[Any], turns: Sequence[Turn]) -> list[list[Any]]:
    count = len(rows) // len(turns)
    return [rows[i * count : (i + 1) * count] for i in range(len(turns))]


def _generate_batch(model: Any, turns: Sequence[Turn], options: dict[str, Any]) -> Any:
    if option(model, options, "assistant_model") is not None:
        raise ValueError("assistant_model helps with one question at a time: use chat().")
    length = max(len(turn.prompt.input_ids) for turn in turns)
    pad = option(model, options, "pad_token_id")
    ids = torch.full((len(turns), length), pad, device=input_device(model))
    mask = torch.zeros_like(ids)
    for row, turn in enumerate(turns):
        prompt = torch.tensor(turn.prompt.input_ids, device=ids.device)
        ids[row, length - len(prompt) :] = prompt
        mask[row, length - len(prompt) :] = 1
    tiles = [turn.pixel_values for turn in turns if turn.pixel_values is not None]
    embeds = model.embed_prompt(ids, pixel_values=to_model(model, torch.cat(tiles)) if tiles else None)
    return model.generate(inputs_embeds=embeds, attention_mask=mask, **options)
