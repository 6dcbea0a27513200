"""What the doctor says of chat templates, compared by what they render and never by their source.

The reference is the conversation template that `config.json` names, in the words of this package.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..conversation import (
    LEGACY_SYSTEM_MESSAGES,
    ConversationTemplate,
    chat_template,
    get_template,
    template_names,
)
from ..prompting_internvl import prompt_encoder
from .checks import CONFIG, TOKENIZER_CONFIG, Finding, Subject, note, one_line, problem

_NEW_TEMPLATE = "--fix OUT writes the right one"


def _user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


_SYSTEM, _ANSWER = {"role": "system", "content": "Be brief."}, {"role": "assistant", "content": "Hello."}
_TEXT, _IMAGE = {"type": "text", "text": "What is it?"}, {"type": "image"}
_QUESTION = "a question"
# What it is called -> (messages, whether the model is to answer).
_PROBES: dict[str, tuple[list[dict[str, Any]], bool]] = {
    _QUESTION: ([_user("Hi")], True),
    "a system message": ([_SYSTEM, _user("Hi")], True),
    "several turns": ([_user("Hi"), _ANSWER, _user("And you?")], True),
    "an answer": ([_user("Hi"), _ANSWER], False),
    "content as a list": ([_user([_TEXT])], True),
    "an image": ([_user([_IMAGE, _TEXT])], True),
    "several images and turns": ([_user([_IMAGE, _IMAGE, _TEXT]), _ANSWER, _user([_TEXT])], True),
}
_WRITTEN_IMAGE = re.compile(r"<img>(<image>|<IMG_CONTEXT>)+</img>|<IMG_CONTEXT>")
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SYSTEM_TEXTS = {_QWEN: "Qwen2.5's", "You are a helpful assistant.": "Qwen2's"}


def check_template(subject: Subject) -> Iterator[Finding]:
    """The template's name, and every chat template in the folder against the one that the model was trained with."""
    if not subject.chat or subject.config is None:
        return
    if subject.values.get("system_message", "") is None:
        message = f"{CONFIG}: system_message is null, which the original code writes into prompts as 'None'"
        yield note("template", message, "--fix OUT removes it; here it counts as absent")
    template = subject.template
    if template is None:
        known = ", ".join(template_names())
        message = f"{CONFIG}: conversation template {subject.config.template!r} is unknown"
        yield problem("template", message, f"set template to the one of the release ({known})")
        return
    found = list(chat_templates(subject))
    if not found:
        message = (
            f"no chat template; here prompts follow {CONFIG} ({template.name}), other programs have none to apply"
        )
        yield note("template", message, "--fix OUT writes chat_template.jinja")
    for file, text in found:
        wrong = template_differences(text, template, subject.config.system_message, subject.tokenizer)
        for difference in wrong:
            yield problem("template", f"{file}: {difference}", _NEW_TEMPLATE)
        if not wrong:
            message = f"{file}: gives the prompts of {template.name} ({len(_PROBES)} conversations rendered)"
            yield Finding("template", "ok", message)


def chat_templates(subject: Subject) -> Iterator[tuple[str, str]]:
    """(file, template), each template once."""
    seen: dict[str, str] = {}
    path = subject.folder / "chat_template.jinja"
    if path.is_file():
        seen[path.read_text(encoding="utf-8")] = path.name
    for file in ("chat_template.json", "processor_config.json", TOKENIZER_CONFIG):
        saved = subject.read(file).get("chat_template")
        if isinstance(saved, list):  # several under names; the default is the one that is applied
            saved = {entry.get("name"): entry.get("template") for entry in saved if isinstance(entry, dict)}
        text = saved.get("default") if isinstance(saved, dict) else saved
        if isinstance(text, str):
            seen.setdefault(text, file)
    for text, file in seen.items():
        yield file, text


def template_differences(
    text: str, template: ConversationTemplate, system_message: str | None = None, tokenizer: Any = None
) -> list[str]:
    """How the prompts of a Jinja chat template differ from those of a conversation template, in words.

    Args:
        text: The Jinja template.
        template: What the model was trained with.
        system_message: Default system text; None for the template's own.
        tokenizer: Gives the text that starts a sequence, and the named tokens that templates may ask for.
    """
    tokens = dict(tokenizer.special_tokens_map) if tokenizer is not None else {}
    bos = tokenizer.bos_token if tokenizer is not None and prompt_encoder(tokenizer).bos else ""
    system = template.system_message if system_message is None else system_message
    good = chat_template(template, bos, system)
    found: dict[str, None] = {}
    failed: dict[str, list[str]] = {}
    bodies: list[tuple[str, str, str]] = []
    for name, (messages, answering) in _PROBES.items():
        wanted = _render(good, messages, answering, tokens)
        try:
            given = _render(text, messages, answering, tokens)
        except Exception as error:  # a template can raise anything
            failed.setdefault(one_line(error), []).append(name)
            continue
        head, body = _cut(given, template)
        wanted_head, wanted_body = _cut(wanted, template)
        if body and head != wanted_head:
            expected = messages[0]["content"] if messages[0]["role"] == "system" else system
            found[_head_phrase(head, wanted_head, expected, template, bos)] = None
        if body != wanted_body:
            bodies.append((name, body, wanted_body))
    failures = [f"fails on {', '.join(names)}: {error}" for error, names in failed.items()]
    return [*found, *_body_phrases(bodies), *failures]


def _render(text: str, messages: list[dict[str, Any]], answering: bool, tokens: dict[str, Any]) -> str:
    # The prompts, and where the answers in them are.
    result: Any = render_jinja_template([messages], chat_template=text, add_generation_prompt=answering, **tokens)
    return _WRITTEN_IMAGE.sub("<image>", result[0][0])


def _cut(prompt: str, template: ConversationTemplate) -> tuple[str, str]:
    """What comes before the first user turn, and the rest."""
    start = prompt.find(template.user_header)
    return (prompt, "") if start < 0 else (prompt[:start], prompt[start:])


def _head_phrase(head: str, wanted: str, system: str, template: ConversationTemplate, bos: str) -> str:
    if bos and wanted.startswith(bos) and not head.startswith(bos):
        return f"does not begin with {bos!r}, which this tokenizer puts in front"
    head, wanted = head.removeprefix(bos), wanted.removeprefix(bos)
    before, after = template.system_template.split("{system_message}")
    if not head.strip():
        return f"gives no system text where the conversation has none; this model's is {_short(system)}"
    inner = head.removeprefix(before).removesuffix(after + template.system_end)
    if head.startswith(before) and inner.strip() != system:
        inner = inner.strip().removesuffix(template.sep.strip()).strip()
    if head.startswith(before) and inner != system:
        whose = _whose(inner)
        named = f"is {whose}: {_short(inner)}" if whose else f"is {_short(inner)}"
        return f"system text {named} instead of {_short(system)}"
    return f"begins with {_short(head)} instead of {_short(wanted)}"


def _whose(system: str) -> str:
    if system in _SYSTEM_TEXTS:
        return _SYSTEM_TEXTS[system]
    if system in LEGACY_SYSTEM_MESSAGES.values():
        return "the one of the first 1.2 and 1.5 releases"
    same = [name for name in template_names() if get_template(name).system_message == system]
    return f"that of template {same[0]}" if same and system else ""


def _body_phrases(bodies: list[tuple[str, str, str]]) -> list[str]:
    """One phrase for each way in which turns differ, with the first conversation that shows it."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for name, given, wanted in bodies:
        images, wanted_images = given.count("<image>"), wanted.count("<image>")
        start = _first_difference(given, wanted)
        key, shown = (given[start : start + 6], wanted[start : start + 6]), slice(max(0, start - 16), start + 16)
        phrase = f"writes {given[shown]!r} instead of {wanted[shown]!r}"
        if not given:
            key, phrase = ("", ""), "writes turns in another format, without the user header"
        elif images != wanted_images:
            key, phrase = ("<image>", ""), f"writes {images} placeholder(s) for {wanted_images} image(s)"
        found.setdefault(key, (phrase, []))[1].append(name)
    return [
        f"{phrase} (in {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"
        for phrase, names in found.values()
    ]


def _first_difference(left: str, right: str) -> int:
    different = (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(different, min(len(left), len(right)))


def _short(text: str) -> str:
    return repr(text if len(text) <= 48 else f"{text[:45]}...")
