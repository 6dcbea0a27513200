"""Conversation templates: the original's data and prompts, and the Jinja template that must render the same text."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from internvl_hub.conversation import (
    LEGACY_SYSTEM_MESSAGES,
    Conversation,
    ConversationTemplate,
    ImageSlot,
    Segment,
    TemplateError,
    chat_template,
    conversation_from_messages,
    get_conv_template,
    get_template,
    register_conv_template,
    split_image_placeholders,
    template_names,
)

FIXTURES = Path(__file__).parent / "fixtures"
TEMPLATES = json.loads((FIXTURES / "templates.json").read_text(encoding="utf-8"))
PROMPTS = json.loads((FIXTURES / "prompts.json").read_text(encoding="utf-8"))
NAMES = ["Hermes-2", "internlm2-chat", "internvl2_5", "internvl3_5_gpt_oss", "internvl_zh", "phi3-chat"]
GPT_OSS_SYSTEM = (
    "<|start|>system<|message|>You are InternVL, a large language model trained by Shanghai AI Laboratory.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-08-06\n\nReasoning: low\n\n# Valid channels: final. Channel must "
    "be included for every message.<|end|>"
)
CHANNEL = "<|channel|>final<|message|>"


def talk(name: str, *turns: str | None, system: str | None = None) -> Conversation:
    """A conversation whose turns alternate, the user first."""
    conversation = get_conv_template(name)
    if system is not None:
        conversation.set_system_message(system)
    for i, turn in enumerate(turns):
        conversation.append_message(conversation.roles[i % 2], turn)
    return conversation


# ------------------------------------------------------------------------------------------------- the original's data


def test_every_template_of_the_original_is_there() -> None:
    assert template_names() == sorted(NAMES)
    assert set(TEMPLATES) == set(NAMES) - {"internvl3_5_gpt_oss"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_equal_the_original(name: str) -> None:
    template, expected = get_template(name), dict(TEMPLATES[name])
    # The original's style INTERNVL_ZH puts the bare system message first: that is an empty template there.
    assert template.system_template == (expected.pop("system_template") or "{system_message}")
    for key, value in expected.items():
        found = getattr(template, key)
        assert (list(found) if isinstance(found, tuple) else found) == value, key


@pytest.mark.parametrize("case", PROMPTS, ids=lambda case: case["template"])
def test_prompts_equal_the_original(case: dict) -> None:
    turns = [text for _, text in case["messages"]]
    assert talk(case["template"], *turns, system=case["system_message"]).get_prompt() == case["prompt"]


def test_prompt_fixtures_cover_every_original_template() -> None:
    assert {case["template"] for case in PROMPTS} == set(TEMPLATES)


def test_legacy_system_messages_name_templates() -> None:
    assert set(LEGACY_SYSTEM_MESSAGES) < set(NAMES)


# ------------------------------------------------------------------------------------------------------------- gpt-oss


def test_gpt_oss_single_turn() -> None:
    expected = GPT_OSS_SYSTEM + "<|start|>user<|message|><image>\nHi<|end|><|start|>assistant"
    assert talk("internvl3_5_gpt_oss", "<image>\nHi", None).get_prompt() == expected


def test_gpt_oss_earlier_answers_end_with_end() -> None:
    expected = (
        GPT_OSS_SYSTEM + f"<|start|>user<|message|>Hi<|end|><|start|>assistant{CHANNEL}Hello<|end|>"
        "<|start|>user<|message|>Bye<|end|><|start|>assistant"
    )
    assert talk("internvl3_5_gpt_oss", "Hi", "Hello", "Bye", None).get_prompt() == expected


def test_gpt_oss_training_ends_with_return() -> None:
    text = talk("internvl3_5_gpt_oss", "Hi", "Hello", "Bye", "Ciao").get_prompt()
    assert text.endswith(f"<|start|>user<|message|>Bye<|end|><|start|>assistant{CHANNEL}Ciao<|return|>")
    assert text.count("<|return|>") == 1
    assert f"{CHANNEL}Hello<|end|>" in text


def test_gpt_oss_answer_that_brings_its_channel_gets_no_second() -> None:
    with_channel = talk("internvl3_5_gpt_oss", "Hi", f"{CHANNEL}Hello", "Bye", None)
    assert with_channel.get_prompt() == talk("internvl3_5_gpt_oss", "Hi", "Hello", "Bye", None).get_prompt()


def test_gpt_oss_stop_token() -> None:
    assert get_template("internvl3_5_gpt_oss").end_of_turn == "<|return|>"


def test_internvl_zh_keeps_the_space_of_an_answer() -> None:
    assert talk("internvl_zh", "Hi", " x").get_prompt() == " <human>: Hi <bot>:  x</s>"


# ------------------------------------------------------------------------------------------------------------ segments


@pytest.mark.parametrize("name", NAMES)
def test_segments_mark_who_wrote_what(name: str) -> None:
    segments = talk(name, "Q1<image>Q2", "A1<image>", system="SYS").segments()
    assert [s.text for s in segments if s.kind == "text"] == ["SYS", "Q1", "Q2", "A1<image>"]
    assert [s.text for s in segments if s.kind == "image"] == ["<image>"]
    template = get_template(name)
    supervised = "".join(s.text for s in segments if s.supervised)
    assert supervised == f"{template.answer_prefix}A1<image>{template.last_answer_end.strip()}"


def test_newline_after_the_end_of_turn_is_not_supervised() -> None:
    assert talk("internvl2_5", "Q", "A").segments()[-2:] == [
        Segment("<|im_end|>", supervised=True),
        Segment("\n", supervised=False),
    ]


def test_placeholders_split() -> None:
    assert split_image_placeholders("<image>\nHi") == [ImageSlot(), "\nHi"]
    assert split_image_placeholders("a<image><image>b<image>") == ["a", ImageSlot(), ImageSlot(), "b", ImageSlot()]
    assert split_image_placeholders("") == []


def test_literal_placeholder_in_message_text_is_text() -> None:
    conversation = conversation_from_messages(get_template("internvl2_5"), [{"role": "user", "content": "<image>"}])
    assert [s.text for s in conversation.segments() if s.kind == "text"][1:] == ["<image>"]
    assert not [s for s in conversation.segments() if s.kind == "image"]


# -------------------------------------------------------------------------------------------------------------- errors


def test_unknown_template_lists_the_known() -> None:
    with pytest.raises(TemplateError, match="'nope'.*internvl2_5"):
        get_conv_template("nope")


def test_unknown_role_of_append() -> None:
    with pytest.raises(TemplateError, match="'narrator'"):
        get_conv_template("internvl2_5").append_message("narrator", "x")


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "tool", "content": "x"}], "Message 0 has role 'tool'"),
        ([{"content": "x"}], "Message 0 has role None"),
        ([{"role": "user", "content": "x"}, {"role": "system", "content": "y"}], "Message 1 has role 'system'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "type 'audio'"),
        ([{"role": "user", "content": ["bare"]}], "type 'str'"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "'assistant' holds an image"),
        ([{"role": "system", "content": [{"type": "image"}]}], "'system' holds an image"),
        ([{"role": "user", "content": [{"type": "video", "video": "film.mp4"}]}], "frames"),
        ([{"role": "user", "content": [{"type": "video", "video": []}]}], "frames"),
    ],
)
def test_bad_messages(messages: list, match: str) -> None:
    with pytest.raises(TemplateError, match=match):
        conversation_from_messages(get_template("internvl2_5"), messages)


@pytest.mark.parametrize(
    ("template", "role"), [("internlm2-chat", "tool"), ("internvl2_5", "system"), ("internvl2_5", "narrator")]
)
def test_jinja_refuses_the_same_roles(template: str, role: str) -> None:
    messages = [{"role": "user", "content": "x"}, {"role": role, "content": "y"}]
    with pytest.raises(Exception, match=f"misplaced role: {role}"):
        render(chat_template(get_template(template)), messages)
    with pytest.raises(TemplateError, match=f"Message 1 has role '{role}'"):
        conversation_from_messages(get_template(template), messages)


def test_a_name_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl_hub.conversation._TEMPLATES", {})
    register_conv_template(ConversationTemplate("mine", sep="|"))
    with pytest.raises(TemplateError, match="'mine' exists"):
        register_conv_template(ConversationTemplate("mine", sep="/"))
    register_conv_template(ConversationTemplate("mine", sep="/"), override=True)
    assert get_template("mine").sep == "/"


# --------------------------------------------------------------------------------------------------------------- Jinja


def render(template: str, messages: list, add_generation_prompt: bool = False) -> str:
    """Renders as every tokenizer and processor of transformers does."""
    rendered, _ = render_jinja_template(
        [messages], chat_template=template, add_generation_prompt=add_generation_prompt
    )
    return rendered[0]


NASTY = ["{{ x }}", "{% raw %}", "{% endraw %}", "{# c #}", "'", '"', "\\", "\\n", "\n", "\r\n", "<image>", "@USER@"]
NASTY += [CHANNEL, "<|im_end|>", "Frame-1: ", " ", "猫", "🦁", "é"]
TEXT = st.lists(st.sampled_from(NASTY) | st.text(max_size=6), max_size=5).map("".join)
TEXT_PART = TEXT.map(lambda text: {"type": "text", "text": text})
IMAGE_PART = st.sampled_from([{"type": "image", "image": "a.png"}, {"type": "image_url", "image_url": {"url": "a"}}])
VIDEO_PART = st.builds(
    lambda key, frames: {"type": "video", key: frames},
    st.sampled_from(["video", "frames"]),
    st.lists(st.just("f.png"), min_size=1, max_size=3),
)
USER = st.builds(
    lambda content: {"role": "user", "content": content},
    TEXT | st.lists(TEXT_PART | IMAGE_PART | VIDEO_PART, max_size=4),
)
ANSWER_TEXT = TEXT | TEXT.map(lambda text: CHANNEL + text) | TEXT.map(lambda text: " " + text)
ANSWER = st.builds(
    lambda content: {"role": "assistant", "content": content}, ANSWER_TEXT | st.lists(TEXT_PART, max_size=2)
)
SYSTEM = st.builds(lambda content: [{"role": "system", "content": content}], TEXT | st.lists(TEXT_PART, max_size=2))
MESSAGES = st.builds(
    lambda system, pairs, last: system + [m for pair in pairs for m in pair] + last,
    st.just([]) | SYSTEM,
    st.lists(st.tuples(USER, ANSWER), max_size=3),
    st.lists(USER, max_size=1),
)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=40, deadline=None)
@given(messages=MESSAGES, prompt=st.booleans(), system=st.none() | TEXT, bos=st.sampled_from(["", "<s>"]))
def test_jinja_renders_the_conversation(name: str, messages: list, prompt: bool, system: str | None, bos: str) -> None:
    template, before = get_template(name), copy.deepcopy(messages)
    conversation = conversation_from_messages(template, messages, system, add_generation_prompt=prompt)
    assert render(chat_template(template, bos, system), messages, prompt) == bos + conversation.get_prompt()
    assert messages == before


def test_jinja_sees_media_and_frames() -> None:
    content = [{"type": "video", "video": ["f"] * 2}, {"type": "image"}, {"type": "text", "text": "Q"}]
    text = render(chat_template(get_template("internvl2_5")), [{"role": "user", "content": content}])
    assert text.endswith("<|im_start|>user\nFrame-1: <image>\nFrame-2: <image>\n<image>\nQ<|im_end|>\n")


# ---------------------------------------------------------------------------------------------------------- properties


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(first=TEXT, answer=TEXT.filter(lambda text: not text.startswith(CHANNEL)), second=TEXT)
def test_a_later_prompt_starts_with_the_earlier_turn(name: str, first: str, answer: str, second: str) -> None:
    template = get_template(name)
    turn = talk(name, first, None).get_prompt() + template.answer_prefix + answer + template.sep
    assert talk(name, first, answer, second, None).get_prompt().startswith(turn)


def test_copies_are_independent() -> None:
    original = talk("internvl2_5", "Q", "A")
    copied = original.copy()
    copied.append_message(copied.roles[0], "more")
    copied.messages[0][1] = "other"
    copied.set_system_message("S")
    assert original.get_prompt() == talk("internvl2_5", "Q", "A").get_prompt() != copied.get_prompt()


def test_conversations_of_one_template_share_nothing() -> None:
    talk("internvl2_5", "Q")
    assert get_conv_template("internvl2_5").messages == []
