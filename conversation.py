"""Conversation templates of InternVL as data, and the one function that turns a conversation into prompt text.

A template is a frozen record; a `Conversation` is a list of messages on top of it. Rendering yields segments (template
markup, user text, image slots) instead of one string, so that tokenisation can tell markup from what a user typed; the
plain string of the original `get_prompt()` is their concatenation. Tokenising lives in `prompting_internvl.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tools_internvl import (
    CALL_END,
    CALL_START,
    RESULT_END,
    RESULT_START,
    TOOLS_CONCLUSION,
    TOOLS_INTRODUCTION,
    answer_with_calls,
    tool_results,
    with_tools,
)

IMAGE_PLACEHOLDER = "<image>"

_S1 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_S2 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
_S3 = (
    "You are InternVL, a large language model trained by Shanghai AI Laboratory.\nKnowledge cutoff: 2024-06\n"
    "Current date: 2025-08-06\n\nReasoning: low\n\n"
    "# Valid channels: final. Channel must be included for every message."
)


class TemplateError(ValueError):
    """An unknown template, role or message structure."""


@dataclass(frozen=True)
class Segment:
    """A piece of a rendered conversation.

    Attributes:
        text: The characters; for an image slot the placeholder `<image>`.
        kind: `"markup"` (template text, trusted), `"text"` (typed by somebody) or `"image"`.
        supervised: Whether a training loss is taken on it (answer text and end of turn).
    """

    text: str
    kind: str = "markup"
    supervised: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """Stands for one image inside the content of a user message."""


Content = str | Sequence["str | ImageSlot"] | None


@dataclass(frozen=True)
class ConversationTemplate:
    """A conversation template (original `conversation.py`; field names kept where they exist there).

    Attributes:
        name: As written in `config.template`.
        system_template: Text around the system message, with `{system_message}`.
        system_message: Default system text.
        roles: Header of user and assistant turns.
        sep: Ends every turn (for `INTERNVL_ZH` every assistant turn).
        sep2: Ends user turns (`INTERNVL_ZH`), or the last assistant turn (`GPT_OSS`).
        sep_style: `"MPT"`, `"INTERNVL_ZH"` or `"GPT_OSS"`.
        stop_str, stop_token_ids: Kept as data for tools that read them.
        answer_prefix: What the model itself writes before an answer (gpt-oss: its channel header).
        tools: Whether tools may be described to its models, in the Hermes format (`tools_internvl.py`).
    """

    name: str
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("", "")
    sep: str = ""
    sep2: str | None = None
    sep_style: str = "MPT"
    stop_str: str | None = None
    stop_token_ids: tuple[int, ...] | None = None
    answer_prefix: str = ""
    tools: bool = False

    @property
    def user_header(self) -> str:
        return self.roles[0] + (": " if self.sep_style == "INTERNVL_ZH" else "")

    @property
    def assistant_header(self) -> str:
        """What a prompt ends with when the model is to answer."""
        return self.roles[1] + (":" if self.sep_style == "INTERNVL_ZH" else "")

    @property
    def system_end(self) -> str:
        return self.sep2 if self.sep_style == "INTERNVL_ZH" else self.sep

    @property
    def user_end(self) -> str:
        return self.sep2 if self.sep_style == "INTERNVL_ZH" else self.sep

    @property
    def last_answer_end(self) -> str:
        """Ends the last answer of a training conversation."""
        return self.sep2 if self.sep_style == "GPT_OSS" else self.sep

    @property
    def end_of_turn(self) -> str:
        """The stop token's text: generation ends and answers are cut there."""
        return self.last_answer_end.strip()


def _chatml(name: str, system_message: str, sep: str = "<|im_end|>", **extra: Any) -> ConversationTemplate:
    roles = ("<|im_start|>user\n", "<|im_start|>assistant\n")
    system = "<|im_start|>system\n{system_message}"
    return ConversationTemplate(name, system, system_message, roles, sep, **extra)


_TEMPLATES: dict[str, ConversationTemplate] = {}


def register_conv_template(template: ConversationTemplate, override: bool = False) -> None:
    """Adds a template under its name.

    Raises:
        TemplateError: the name is taken and `override` is false.
    """
    if template.name in _TEMPLATES and not override:
        raise TemplateError(f"Conversation template {template.name!r} exists; pass override=True to replace it.")
    _TEMPLATES[template.name] = template


for _template in (
    # InternVL 1.1 (LLaMA2-13B)
    ConversationTemplate(
        "internvl_zh", roles=("<human>", "<bot>"), sep="</s>", sep2=" ", sep_style="INTERNVL_ZH", answer_prefix=" "
    ),
    # Yi-34B (1.2, 2.0-40B) and Qwen2-0.5B (2.0-1B)
    _chatml("Hermes-2", _S1, stop_str="<|endoftext|>", tools=True),
    # InternLM2 (1.5, 2.0)
    _chatml("internlm2-chat", _S1),
    # Phi-3 (Mini-InternVL 4B, 2.0-4B)
    ConversationTemplate(
        "phi3-chat", "<|system|>\n{system_message}", _S1, ("<|user|>\n", "<|assistant|>\n"), "<|end|>"
    ),
    # InternVL 2.5, 3 and the Qwen3 sizes of 3.5
    _chatml("internvl2_5", _S2, sep="<|im_end|>\n", tools=True),
    # InternVL 3.5 20B-A4B
    ConversationTemplate(
        "internvl3_5_gpt_oss",
        "<|start|>system<|message|>{system_message}",
        _S3,
        ("<|start|>user<|message|>", "<|start|>assistant"),
        sep="<|end|>",
        sep2="<|return|>",
        sep_style="GPT_OSS",
        answer_prefix="<|channel|>final<|message|>",
    ),
):
    register_conv_template(_template)

# System texts under which the same templates shipped with the 1.2 and 1.5 repositories (branches v1.2, v1.5.x).
LEGACY_SYSTEM_MESSAGES = {
    "Hermes-2": "Answer the questions.",
    "internlm2-chat": "You are an AI assistant whose name is InternLM (书生·浦语).",
    "phi3-chat": "You are an AI assistant whose name is Phi-3.",
}


def template_names() -> list[str]:
    """Names of the registered templates."""
    return sorted(_TEMPLATES)


def split_image_placeholders(text: str) -> list[str | ImageSlot]:
    """Splits a question of the string API into text and image slots: `"<image>\\nHi"` -> `[ImageSlot(), "\\nHi"]`."""
    parts: list[str | ImageSlot] = []
    for i, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if i:
            parts.append(ImageSlot())
        if piece:
            parts.append(piece)
    return parts


@dataclass
class Conversation:
    """Messages on a template.

    `messages` holds `[role header, content]` pairs as in the original. Content is a string (in user turns `<image>`
    marks an image slot; in answers it is text), a list of strings and `ImageSlot`s (strings are plain text), or None
    for the assistant header that generation continues.
    """

    template: ConversationTemplate
    system_message: str
    messages: list[list[Any]] = field(default_factory=list)

    @property
    def roles(self) -> tuple[str, str]:
        return self.template.roles

    @property
    def sep(self) -> str:
        return self.template.sep

    @property
    def name(self) -> str:
        return self.template.name

    def set_system_message(self, system_message: str) -> None:
        """Replaces the system text."""
        self.system_message = system_message

    def describe_tools(self, tools: Sequence[Any] | None) -> None:
        """Puts the descriptions of tools behind the system text; nothing without tools.

        Raises:
            TemplateError: the template's models know no tools.
            TypeError: as for `tool_schemas`.
        """
        if not tools:
            return
        if not self.template.tools:
            known = ", ".join(name for name in template_names() if get_template(name).tools)
            raise TemplateError(
                f"Template {self.name!r} has no way to describe tools: its models were not trained on any. Those of "
                f"{known} on a Qwen language model were."
            )
        self.system_message = with_tools(self.system_message, tools)

    def append_message(self, role: str, message: Content) -> None:
        """Adds a turn; `role` is `roles[0]` or `roles[1]`.

        Raises:
            TemplateError: another role.
        """
        if role not in self.roles:
            raise TemplateError(f"Role {role!r} is not one of {self.roles} of template {self.name!r}.")
        self.messages.append([role, message])

    def copy(self) -> Conversation:
        """An independent copy."""
        return Conversation(self.template, self.system_message, [list(m) for m in self.messages])

    def segments(self) -> list[Segment]:
        """The conversation as segments, answers and their end of turn marked as supervised."""
        system = self.template.system_template.split("{system_message}")
        output = [Segment(system[0]), Segment(self.system_message or "", "text"), Segment(system[1])]
        output.append(Segment(self.template.system_end))
        last = len(self.messages) - 1
        for i, (role, content) in enumerate(self.messages):
            output += self._user(content) if role == self.roles[0] else self._assistant(content, i == last)
        return [segment for segment in output if segment.text]

    def _user(self, content: Content) -> Iterable[Segment]:
        parts = split_image_placeholders(content) if isinstance(content, str) else content or []
        yield Segment(self.template.user_header)
        for part in parts:
            image = isinstance(part, ImageSlot)
            yield Segment(IMAGE_PLACEHOLDER, "image") if image else Segment(part, "text")
        yield Segment(self.template.user_end)

    def _assistant(self, content: Content, last: bool) -> Iterable[Segment]:
        template = self.template
        yield Segment(template.assistant_header)
        if content is None:
            return
        text = content if isinstance(content, str) else "".join(part for part in content if isinstance(part, str))
        text = text.removeprefix(template.answer_prefix) if template.answer_prefix.strip() else text
        end = template.last_answer_end if last else template.sep
        stop = end.strip()
        yield Segment(template.answer_prefix, supervised=True)
        yield Segment(text, "text", supervised=True)
        yield Segment(stop, supervised=True)
        yield Segment(end[len(stop) :])

    def get_prompt(self) -> str:
        """The conversation as one string, image slots as `<image>`."""
        return "".join(segment.text for segment in self.segments())


def get_template(name: str) -> ConversationTemplate:
    """Returns the template called `name`.

    Raises:
        TemplateError: no such template; the message lists those there are.
    """
    if name not in _TEMPLATES:
        raise TemplateError(
            f"Unknown conversation template {name!r}. Known: {', '.join(template_names())}. Set config.template to "
            "one of them or add yours with register_conv_template()."
        )
    return _TEMPLATES[name]


def get_conv_template(name: str) -> Conversation:
    """Returns an empty conversation on the template called `name` (name and use as in the original)."""
    template = get_template(name)
    return Conversation(template, template.system_message)


def conversation_from_messages(
    template: ConversationTemplate,
    messages: Sequence[dict[str, Any]],
    system_message: str | None = None,
    add_generation_prompt: bool = False,
    tools: Sequence[Any] | None = None,
) -> Conversation:
    """Builds a conversation from OpenAI-style messages.

    Args:
        template: The template.
        messages: Dictionaries with `role` (`system` first if present, `user`, `assistant`) and `content`: a string, or
            a list of `{"type": "text", "text": ...}`, `{"type": "image", ...}` and
            `{"type": "video", "video": frames}` parts. An image becomes a slot followed by a newline, a video one
            `Frame-i: ` line per frame. Text is text: a literal `<image>` in it is no slot. Where the template knows
            tools, an assistant message may have `tool_calls`, and messages of the role `tool` in a row make up one
            user turn.
        system_message: Used where `messages` has no system turn; None for the template's own.
        add_generation_prompt: End with the assistant header.
        tools: Functions or JSON schemas that the model may call (`tools_internvl.tool_schemas`).

    Raises:
        TemplateError: an unknown role or part, a system turn that is not first, an image in an answer, or tools where
            the template knows none.
    """
    conversation = Conversation(template, template.system_message if system_message is None else system_message)
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        parts = _message_parts(content)
        if role == "system" and i == 0:
            conversation.set_system_message(_text_only(parts, role))
        elif role == "user":
            conversation.append_message(template.roles[0], parts)
        elif role == "assistant" and not message.get("tool_calls"):
            conversation.append_message(template.roles[1], _text_only(parts, role))
        elif role == "assistant" and template.tools:
            answer = answer_with_calls(_text_only(parts, role), message["tool_calls"])
            conversation.append_message(template.roles[1], answer)
        elif role == "tool" and i and template.tools:
            result = tool_results([_text_only(parts, role)])
            if messages[i - 1].get("role") == "tool":
                conversation.messages[-1][1].append(f"\n{result}")
            else:
                conversation.append_message(template.roles[0], [result])
        else:
            raise TemplateError(
                f"Message {i} has role {role!r}{' and tool calls' * bool(message.get('tool_calls'))}; expected 'user' "
                "or 'assistant', or 'system' as the first message"
                + ("." if not template.tools else ", or 'tool' for a result.")
            )
    conversation.describe_tools(tools)
    if add_generation_prompt:
        conversation.append_message(template.roles[1], None)
    return conversation


def _text_only(parts: list[str | ImageSlot], role: str) -> str:
    if any(isinstance(part, ImageSlot) for part in parts):
        raise TemplateError(f"A message of role {role!r} holds an image; only user messages may.")
    return "".join(part for part in parts if isinstance(part, str))


def _message_parts(content: Any) -> list[str | ImageSlot]:
    if isinstance(content, str):
        return [content]
    output: list[str | ImageSlot] = []
    for part in content or []:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind == "text":
            output.append(part["text"])
        elif kind in ("image", "image_url"):
            output += [ImageSlot(), "\n"]
        elif kind == "video":
            for i in range(len(video_frames(part))):
                output += [f"Frame-{i + 1}: ", ImageSlot(), "\n"]
        else:
            raise TemplateError(f"Content part of type {kind!r}; expected 'text', 'image' or 'video'.")
    return output


def video_frames(part: dict[str, Any]) -> list[Any]:
    """The frames of a video part, which is given as a list of images.

    Raises:
        TemplateError: the video is not a list of frames.
    """
    frames = part.get("video", part.get("frames"))
    if not isinstance(frames, (list, tuple)) or not frames:
        raise TemplateError(
            "A video part needs its frames as a non-empty list: {'type': 'video', 'video': [image, ...]}."
        )
    return list(frames)


def chat_template(template: ConversationTemplate, bos_token: str = "", system_message: str | None = None) -> str:
    """The Jinja chat template that renders `template` exactly as `conversation_from_messages` does.

    Image slots are rendered as `<image>`. Video frames take one line each. `tools` are described where the template
    knows them, else refused.

    Args:
        template: The template.
        bos_token: Put first, for tokenizers that start sequences with one.
        system_message: Default system text; None for the template's own.
    """
    system = template.system_message if system_message is None else system_message
    before, after = template.system_template.split("{system_message}")
    values = {
        "BOS": bos_token,
        "SYSTEM": system,
        "BEFORE": before,
        "AFTER": after + template.system_end,
        "USER": template.user_header,
        "USER_END": template.user_end,
        "ASSISTANT": template.assistant_header,
        "PREFIX": template.answer_prefix,
        "END": template.sep,
        "LAST_END": template.last_answer_end,
        "INTRODUCTION": TOOLS_INTRODUCTION,
        "CONCLUSION": TOOLS_CONCLUSION,
        "CALL": f"{CALL_START}\n",
        "CALL_END": f"\n{CALL_END}",
        "RESULT": f"{RESULT_START}\n",
        "RESULT_END": f"\n{RESULT_END}",
    }
    parts = _TOOL_PARTS if template.tools else _NO_TOOL_PARTS
    source = re.sub("#([A-Z_]+)#\n", lambda match: parts.get(match[1], ""), _JINJA)
    return re.sub("@([A-Z_]+)@", lambda match: _jinja_string(values[match[1]]), source)


def _jinja_string(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\r", "\\r")
    return f"'{escaped}'"


_JINJA = """\
{%- macro text_of(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type in ['image', 'image_url'] -%}
                {{- '<image>\\n' -}}
            {%- elif part.type == 'video' -%}
                {%- for frame in part.video or part.frames -%}
                    {{- 'Frame-' ~ loop.index ~ ': <image>\\n' -}}
                {%- endfor -%}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{- @BOS@ -}}
{%- set system = text_of(messages[0].content) if messages and messages[0].role == 'system' else @SYSTEM@ -%}
#TOOLS#
{{- @BEFORE@ ~ system ~ @AFTER@ -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}
        {{- @USER@ ~ text_of(message.content) ~ @USER_END@ -}}
    {%- elif message.role == 'assistant' -%}
        {%- set answer = text_of(message.content or '') -%}
        {%- if @PREFIX@ | trim and answer.startswith(@PREFIX@) -%}
            {%- set answer = answer[(@PREFIX@ | length):] -%}
        {%- endif -%}
        {{- @ASSISTANT@ ~ @PREFIX@ ~ answer -}}
#CALLS#
        {%- if loop.last and not add_generation_prompt -%}
            {{- @LAST_END@ -}}
        {%- else -%}
            {{- @END@ -}}
        {%- endif -%}
#RESULTS#
    {%- elif not (message.role == 'system' and loop.first) -%}
        {{- raise_exception('Unknown or misplaced role: ' ~ message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- @ASSISTANT@ -}}
{%- endif -%}
"""

_NO_TOOL_PARTS = {
    "TOOLS": """\
{%- if tools -%}
    {{- raise_exception('This model knows no tools.') -}}
{%- endif -%}
""",
    "CALLS": """\
        {%- if message.tool_calls -%}
            {{- raise_exception('This model knows no tools.') -}}
        {%- endif -%}
""",
}

_TOOL_PARTS = {
    "TOOLS": """\
{%- if tools -%}
    {%- set described -%}
        {{- system ~ ('\\n\\n' if system else '') ~ @INTRODUCTION@ -}}
        {%- for tool in tools -%}
            {{- '\\n' ~ (tool | tojson) -}}
        {%- endfor -%}
        {{- @CONCLUSION@ -}}
    {%- endset -%}
    {%- set system = described -%}
{%- endif -%}
""",
    "CALLS": """\
        {%- for call in message.tool_calls or [] -%}
            {%- set call = call.function or call -%}
            {%- set arguments = call.arguments if call.arguments is string else (call.arguments or {}) | tojson -%}
            {{- '\\n' if answer or not loop.first -}}
            {{- @CALL@ ~ '{"name": ' ~ (call.name | tojson) ~ ', "arguments": ' ~ arguments ~ '}' ~ @CALL_END@ -}}
        {%- endfor -%}
""",
    "RESULTS": """\
    {%- elif message.role == 'tool' and not loop.first -%}
        {{- @USER@ if loop.previtem.role != 'tool' else '\\n' -}}
        {{- @RESULT@ ~ text_of(message.content) ~ @RESULT_END@ -}}
        {%- if loop.last or loop.nextitem.role != 'tool' -%}
            {{- @USER_END@ -}}
        {%- endif -%}
""",
}
