"""What the doctor says of a tokenizer: whether it loads without code of the folder, and the tokens that prompts need.

Which ids a text gets is not judged here; `golden.py` writes ids down so that they can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..conversation import ConversationTemplate
from ..prompting_internvl import IMG_CONTEXT_TOKEN, prompt_encoder
from .checks import CONFIG, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_MODEL, Finding, Subject, note, problem
from .source import IMAGE_TOKENS

_VOCABULARIES = (TOKENIZER, TOKENIZER_MODEL, "vocab.json")
_OWN_TOKENIZER = "take the tokenizer files of the release that this model comes from"


def check_tokenizer(subject: Subject) -> Iterator[Finding]:
    """Whether the tokenizer loads without code of the folder and has the tokens that prompts need."""
    if not subject.chat:
        return
    file = next((name for name in _VOCABULARIES if subject.has(name)), None)
    if file is None:
        message = f"no tokenizer: looked for {', '.join(_VOCABULARIES)}"
        yield problem("tokenizer", message, _OWN_TOKENIZER)
        return
    sound = True
    for finding in (*_loading(subject, file), *_contradictions(subject), *_tokens(subject, file)):
        sound = sound and finding.level != "problem"
        yield finding
    if sound:
        context = subject.tokenizer.convert_tokens_to_ids(IMG_CONTEXT_TOKEN)
        message = f"{file}: {len(subject.tokenizer):,} tokens, {IMG_CONTEXT_TOKEN} is {context}"
        yield Finding("tokenizer", "ok", message)


def _loading(subject: Subject, file: str) -> Iterator[Finding]:
    values = subject.read(TOKENIZER_CONFIG)
    if isinstance(values.get("extra_special_tokens"), list):
        message = f"{TOKENIZER_CONFIG}: extra_special_tokens is a list, which transformers 4 cannot read"
        yield note("tokenizer", message, "--fix OUT writes it for both")
    auto_map = values.get("auto_map") or {}
    references = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else auto_map
    references = references if isinstance(references, list) else [references]
    if not all(isinstance(reference, str | None) for reference in references):
        message = f"{TOKENIZER_CONFIG}: auto_map is {auto_map!r}, not names of classes"
        yield problem("tokenizer", message, f"correct {TOKENIZER_CONFIG}")
        return
    code = next((reference for reference in references if reference), None)
    if code:
        message = f"{TOKENIZER_CONFIG}: AutoTokenizer runs {code} from the folder and needs trust_remote_code=True"
        fix = "--fix OUT writes a tokenizer.json with the same ids where there can be one"
        yield note("tokenizer", message, fix)
    if subject.tokenizer is None:
        yield problem("tokenizer", f"{file} does not load: {subject.tokenizer_error}", _OWN_TOKENIZER)
    elif subject.tokenizer_error and not code:
        message = f"{TOKENIZER_CONFIG}: AutoTokenizer fails: {subject.tokenizer_error}"
        yield problem("tokenizer", message, f"correct {TOKENIZER_CONFIG}; {file} itself is readable")


def _contradictions(subject: Subject) -> Iterator[Finding]:
    """Tokens with two ids and ids with two tokens, among the files that number them."""
    ids: dict[str, tuple[int, str]] = {}
    tokens: dict[int, tuple[str, str]] = {}
    wrong: list[str] = []
    for file, token, number in _declared(subject):
        other, where = ids.setdefault(token, (number, file))
        if other != number:
            wrong.append(f"{token} is {number} in {file} and {other} in {where}")
        taken, where = tokens.setdefault(number, (token, file))
        if taken != token:
            wrong.append(f"{number} is {token} in {file} and {taken} in {where}")
    if wrong:
        message = f"token ids collide: {'; '.join(wrong[:3])}{'; ...' if len(wrong) > 3 else ''}"
        yield problem("tokenizer", message, "take all tokenizer files from one revision of the repository")


def _declared(subject: Subject) -> Iterator[tuple[str, str, int]]:
    """(file, token, id) of every added token that a file numbers."""
    for entry in subject.read(TOKENIZER).get("added_tokens") or ():
        yield TOKENIZER, entry["content"], entry["id"]
    for number, entry in (subject.read(TOKENIZER_CONFIG).get("added_tokens_decoder") or {}).items():
        yield TOKENIZER_CONFIG, entry["content"], int(number)
    for token, number in subject.read("added_tokens.json").items():
        yield "added_tokens.json", token, number


def _tokens(subject: Subject, file: str) -> Iterator[Finding]:
    tokenizer, template = subject.tokenizer, subject.template
    if tokenizer is None:
        return
    encoder = prompt_encoder(tokenizer)
    for token in IMAGE_TOKENS:
        yield from _single(file, encoder, token, "images cannot be placed in a prompt")
    if subject.config is not None:
        yield from _context_id(subject, file, encoder.token_id(IMG_CONTEXT_TOKEN))
        yield from _rows(subject, file)
    if template is not None:
        for mark in _marks(template):
            yield from _single(file, encoder, mark, f"template {template.name!r} is built of it")
    if tokenizer.eos_token_id is None:
        message = f"{TOKENIZER_CONFIG}: no eos_token; other programs may not stop"
        yield note("tokenizer", message, "--fix OUT writes every stop token into generation_config.json")
    if tokenizer.pad_token_id is None:
        message = f"{TOKENIZER_CONFIG}: no pad_token, which a batch of unequal prompts needs"
        yield note("tokenizer", message, "set one: tokenizer.pad_token = tokenizer.eos_token, then save it")
    elif template and tokenizer.pad_token == template.end_of_turn:
        message = f"{TOKENIZER_CONFIG}: pad_token {tokenizer.pad_token!r} is the end of a turn"
        yield note("tokenizer", message, "always pass the attention mask that the processor returns")


def _single(file: str, encoder: Any, token: str, why: str) -> Iterator[Finding]:
    """`token` must be one id, and a special one."""
    number, tokenizer = encoder.token_id(token), encoder.tokenizer
    if number is None:
        yield problem("tokenizer", f"{file} has no token {token}: {why}", _OWN_TOKENIZER)
        return
    ids = tokenizer(token, add_special_tokens=False)["input_ids"]
    if [i for i in ids if i == number or tokenizer.decode([i]).strip()] != [number]:
        message = f"{file}: {token} is in the vocabulary but is cut into {len(ids)} pieces: {why}"
        yield problem("tokenizer", message, _OWN_TOKENIZER)
    elif token not in {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}:
        message = f"{file}: {token} is not marked as special, so decoded answers can show it"
        yield note("tokenizer", message, "harmless in this package, which treats it as special")


def _marks(template: ConversationTemplate) -> list[str]:
    """The special tokens that a template writes."""
    markup = (template.system_template, *template.roles, template.sep, template.sep2 or "", template.answer_prefix)
    return list(dict.fromkeys(re.findall(r"<\|[^|>]+\|>|</s>", "".join(markup))))


def _context_id(subject: Subject, file: str, number: int | None) -> Iterator[Finding]:
    said, field = subject.config.img_context_token_id, "img_context_token_id"
    field = "image_token_id" if subject.kind == "native" else field
    if number is None:
        return
    if said is not None and said != number:
        message = f"{CONFIG}: {field} is {said}, but {IMG_CONTEXT_TOKEN} has id {number} in {file}"
        yield problem("tokenizer", message, f"--fix OUT sets it to {number}")
    known = [release.tokens.get("img_context") for release in subject.releases]
    if known and None not in known and number not in known:
        message = f"{file}: {IMG_CONTEXT_TOKEN} has id {number}; in {subject.releases[0].name} it is {known[0]}"
        yield note("tokenizer", message, "nothing, if tokens were added before training")


def _rows(subject: Subject, file: str) -> Iterator[Finding]:
    rows = subject.rows
    # transformers' own processor takes this one out of a prompt before the model sees it.
    replaced = getattr(subject.tokenizer, "video_token", None) if subject.kind == "native" else None
    vocabulary = subject.tokenizer.get_vocab()
    beyond = {token: number for token, number in vocabulary.items() if number >= rows and token != replaced}
    if beyond:
        shown = ", ".join(f"{token} ({number})" for token, number in sorted(beyond.items(), key=lambda x: x[1])[:3])
        message = f"{file}: {len(beyond)} ids are beyond the {rows} embedding rows, such as {shown}"
        yield problem("tokenizer", message, _OWN_TOKENIZER)
