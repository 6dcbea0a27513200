"""Thinking and tool calls: prompts to the letter, and texts of every kind taken apart without an error."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT, INTERNLM2, PHI3, QWEN2, load
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import get_json_schema, render_jinja_template

from internvl_hub.conversation import (
    TemplateError,
    chat_template,
    conversation_from_messages,
    get_conv_template,
    get_template,
)
from internvl_hub.image_processing_internvl import InternVLImageProcessor
from internvl_hub.modeling_internvl_chat import InternVLChatModel
from internvl_hub.processing_internvl import InternVLProcessor
from internvl_hub.reasoning_internvl import (
    NO_THINKING_PREFIX,
    THINKING_SYSTEM_PROMPT,
    Reasoning,
    split_reasoning,
    split_reasoning_stream,
    without_reasoning,
)
from internvl_hub.tools_internvl import (
    ToolCall,
    answer_with_calls,
    parse_tool_calls,
    tool_results,
    tool_schemas,
    with_tools,
)

GREEDY = {"max_new_tokens": 3, "do_sample": False}


@cache
def loaded(name: str):
    return load(name), PreTrainedTokenizerFast.from_pretrained(CHAT / name)


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Ids of every prompt that a model is shown."""
    seen, original = [], InternVLChatModel.embed_prompt

    def embed_prompt(self, input_ids: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        seen.extend(input_ids.tolist())
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(InternVLChatModel, "embed_prompt", embed_prompt)
    return seen


# ------------------------------------------------------------------------------------------------------------ thinking


@pytest.mark.parametrize(
    ("text", "reasoning", "answer", "complete"),
    [
        ("<think>R</think>A", "R", "A", True),
        ("<think>\nR\n</think>\n\nA\n", "R", "A", True),
        ("A", "", "A", True),
        ("", "", "", True),
        ("<think>R", "R", "", False),
        ("<think>", "", "", False),
        ("R</think>A", "R", "A", True),
        ("<think><think>R</think></think>A", "R", "A", True),
        ("<think>\n<think>R</think>A", "R", "A", True),
        ("<think>R</think>\n</think> A", "R", "A", True),
        ("<think>a<think>b</think>c</think>A", "a<think>b</think>c", "A", True),
        ("<think>within <think> tags</think>A", "within <think> tags", "A", True),
        ("<think>a</think>b<think>c", "a\nc", "b", False),
        ("<think></think>A", "", "A", True),
        ("</think>", "", "", True),
        ("<thi", "", "<thi", True),
        ("1 < 2 </ think>", "", "1 < 2 </ think>", True),
    ],
    ids=range(17),
)
def test_reasoning_is_split(text: str, reasoning: str, answer: str, complete: bool) -> None:
    assert split_reasoning(text) == Reasoning(reasoning, answer, complete)


WORDS = st.text(st.sampled_from(" \nab<>/thinké猫"), max_size=12)
PIECES = st.lists(WORDS | st.sampled_from(["<think>", "</think>", "<thin", "k>"]), max_size=8)


@settings(deadline=None, max_examples=60)
@given(PIECES)
def test_any_text_is_split_and_streams_lose_nothing(pieces: list[str]) -> None:
    whole = split_reasoning("".join(pieces))
    assert "</think>" not in whole.answer and "<think>" not in whole.answer
    streamed = list(split_reasoning_stream(pieces))
    assert all(text for _, text in streamed)
    bare = "".join(pieces).replace("<think>", "").replace("</think>", "")
    assert "".join("".join(text for _, text in streamed).split()) == "".join(bare.split())


@settings(deadline=None, max_examples=40)
@given(WORDS, WORDS, st.integers(1, 5), st.booleans())
def test_streams_agree_with_whole_texts(reasoning: str, answer: str, size: int, opened: bool) -> None:
    text = f"{'' if opened else '<think>'}{reasoning}</think>{answer}"
    if reasoning.count("think>") or answer.count("think>"):
        return
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    joined = {"reasoning": "", "answer": ""}
    for kind, piece in split_reasoning_stream(pieces, opened=opened):
        joined[kind] += piece
    whole = split_reasoning(text)
    assert (joined["reasoning"].strip(), joined["answer"].strip()) == (whole.reasoning, whole.answer)


def test_long_texts_take_no_time_and_history_loses_thoughts() -> None:
    for part in ("<think>", "</think>", " ", "<", "</think> "):
        split_reasoning(part * 50_000)
    assert without_reasoning([("Q", "<think>a</think>b"), ("R", "c")]) == [("Q", "b"), ("R", "c")]


def test_thinking_changes_the_system_block_only(prompts: list) -> None:
    model, tokenizer = loaded(QWEN2)
    for system, expected in ((None, THINKING_SYSTEM_PROMPT), ("Be kind.", f"Be kind.\n{THINKING_SYSTEM_PROMPT}")):
        prompts.clear()
        model.chat(tokenizer, None, "Hi", GREEDY, system=expected)
        model.chat(tokenizer, None, "Hi", GREEDY, system=system, thinking=True)
        "".join(model.stream_chat(tokenizer, None, "Hi", GREEDY, system=system, thinking=True))
        model.batch_chat(tokenizer, None, ["Hi"], GREEDY, system=system, thinking=True)
        model.batch_answers(tokenizer, None, ["Hi"], GREEDY, system=system, thinking=True)
        assert len(prompts) == 5 and all(ids == prompts[0] for ids in prompts)


def test_no_thinking_begins_the_answer(prompts: list) -> None:
    model, tokenizer = loaded(QWEN2)
    plain = model.chat(tokenizer, None, "Hi", GREEDY)
    silent = model.chat(tokenizer, None, "Hi", GREEDY, thinking=False)
    (answer,) = model.batch_answers(tokenizer, None, ["Hi"], GREEDY, thinking=False)[0]
    assert tokenizer.decode(prompts[1]) == tokenizer.decode(prompts[0]) + NO_THINKING_PREFIX
    assert prompts[2] == prompts[1] and "think" not in silent and answer.text.strip() == silent
    assert "".join(model.stream_chat(tokenizer, None, "Hi", GREEDY, thinking=False)) == silent
    assert plain == model.chat(tokenizer, None, "Hi", GREEDY, thinking=None)


def test_tags_stay_where_a_tokenizer_has_them_as_special_tokens() -> None:
    model, _ = loaded(QWEN2)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(CHAT / QWEN2)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    ids = tokenizer("<think>a</think>b", add_special_tokens=False)["input_ids"]
    from internvl_hub.turns_internvl import IMAGE_TOKENS, Turn

    shown = {}
    for thinking in (None, True):
        turn = Turn(model, tokenizer, IMAGE_TOKENS, False, thinking=thinking)
        turn.prepare(None, "Hi", None, None)
        shown[thinking] = turn.decode(ids)
    assert split_reasoning(shown[True]) == Reasoning("a", "b", True) and "<think>" not in shown[None]


# ---------------------------------------------------------------------------------------------------------- tool calls


def weather(city: str, days: int = 1) -> str:
    """Tells the weather 天气.

    Args:
        city: Where.
        days: How many days "ahead".
    """
    return f"{city}: sun for {days}"


CALLS = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京", "days": 2}}}]
TALK = [
    {"role": "user", "content": "How is it?"},
    {"role": "assistant", "content": "I look.", "tool_calls": CALLS * 2},
    {"role": "tool", "content": "sun"},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "Sun, then rain."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("end", [1, 2, 4, 6])
def test_prompts_equal_those_of_qwen_itself(end: int) -> None:
    """TRL ships Qwen2.5's own template; only its first line, the default system text, is not ours."""
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    if not path.is_file():
        pytest.skip("this TRL has no copy of Qwen2.5's template")
    template, schema = get_template("internvl2_5"), get_json_schema(weather)
    talk = [{"role": "system", "content": "Be brief."}, *TALK[:end]]
    options = {"tools": [schema], "add_generation_prompt": talk[-1]["role"] != "assistant"}
    prompt = options["add_generation_prompt"]
    ours = conversation_from_messages(template, talk, None, prompt, [weather]).get_prompt()
    assert ours == conversation_from_messages(template, talk, None, prompt, [schema]).get_prompt()
    for jinja in (path.read_text(encoding="utf-8"), chat_template(template)):
        assert render_jinja_template([talk], chat_template=jinja, **options)[0][0] == ours


@pytest.mark.parametrize("name", ["internlm2-chat", "phi3-chat", "internvl3_5_gpt_oss"])
def test_templates_without_tools_say_so(name: str) -> None:
    with pytest.raises(TemplateError, match="internvl2_5"):
        conversation_from_messages(get_template(name), TALK[:1], tools=[weather])
    for messages in (TALK[:2], [*TALK[:1], TALK[2]]):
        with pytest.raises(TemplateError):
            conversation_from_messages(get_template(name), messages)
    source = chat_template(get_template(name))
    for messages, tools in ((TALK[:1], [get_json_schema(weather)]), (TALK[:2], None)):
        with pytest.raises(Exception, match="knows no tools"):
            render_jinja_template([messages], chat_template=source, tools=tools)


def test_processor_and_chat_give_the_same_ids(prompts: list) -> None:
    model, tokenizer = loaded(QWEN2)
    processor = InternVLProcessor(InternVLImageProcessor(image_size=56), tokenizer, "internvl2_5", 4)
    options = {"add_generation_prompt": True, "tools": [weather]}
    direct = processor.apply_chat_template(TALK[:1], tokenize=True, return_dict=False, **options)
    model.chat(tokenizer, None, "How is it?", GREEDY, tools=[weather])
    assert prompts[0] == (direct[0] if isinstance(direct[0], list) else direct)
    processor.chat_template = "{{ 'an old template without such things' }}"
    assert '"name": "weather"' in processor.apply_chat_template(TALK[:1], **options)


def test_a_round_of_calls(prompts: list) -> None:
    model, tokenizer = loaded(QWEN2)
    answered = answer_with_calls("I look.", [ToolCall("weather", {"city": "北京", "days": 2})] * 2)
    assert parse_tool_calls(answered).calls == [ToolCall("weather", {"city": "北京", "days": 2})] * 2
    history = [("How is it?", answered)]
    model.chat(tokenizer, None, tool_results(["sun", "rain"]), GREEDY, history=history, tools=[weather])
    wanted = conversation_from_messages(
        get_template("internvl2_5"), TALK[:4], model.system_message, True, [weather]
    ).get_prompt()
    assert tokenizer.decode(prompts[0]) == tokenizer.decode(tokenizer(wanted, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", [INTERNLM2, PHI3])
def test_other_language_models_are_not_asked(name: str) -> None:
    model, tokenizer = loaded(name)
    template, model.template = model.template, "internvl2_5"
    try:
        with pytest.raises(TemplateError, match="not trained on tool calls"):
            model.chat(tokenizer, None, "Hi", GREEDY, tools=[weather])
    finally:
        model.template = template


@pytest.mark.parametrize("tools", [[{}], [3], "weather", [{"type": "function", "function": {}}]], ids=range(4))
def test_bad_tools_are_named(tools) -> None:
    with pytest.raises(TypeError, match="tools"):
        tool_schemas(tools)


def test_descriptions() -> None:
    bare = {"name": "f", "parameters": {}}
    assert tool_schemas([bare]) == [{"type": "function", "function": bare}]
    assert with_tools("S", []) == "S" and with_tools(None, [weather]).startswith("# Tools")
    conversation = get_conv_template("phi3-chat")
    before = conversation.system_message
    conversation.describe_tools([])
    assert conversation.system_message == before


@pytest.mark.parametrize("text", ["a<image>b", "x</tool_response>y", "<tool_response>", "<image>"])
def test_results_cannot_break_their_turn(text: str) -> None:
    question = tool_results([text])
    assert question.count("<image>") == 0 and question.count("</tool_response>") == 1
    body = question.removeprefix("<tool_response>\n").removesuffix("\n</tool_response>")
    assert json.loads(body) == text
    assert tool_results(["plain", {"a": [text]}]).count("</tool_response>") == 2
    with pytest.raises(TypeError, match="list"):
        tool_results(text)


GOOD = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls", "rest", "problems"),
    [
        (GOOD, [("f", {"a": 1})], "", 0),
        (f"Well. {GOOD}\n{GOOD} Done.", [("f", {"a": 1})] * 2, "Well. \n Done.", 0),
        ("nothing", [], "nothing", 0),
        (GOOD.removesuffix("</tool_call>"), [("f", {"a": 1})], "", 0),
        ('<tool_call>{"name":"f","arguments":{"a":"</tool_call><tool_call>"}}</tool_call>!',
         [("f", {"a": "</tool_call><tool_call>"})], "!", 0),
        ('<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', [("f", {"a": 1})], "", 0),
        ('<tool_call>{"name":"f","parameters":{"a": 1}}</tool_call>', [("f", {"a": 1})], "", 0),
        ('<tool_call>{"name":"f"}</tool_call>', [("f", {})], "", 0),
        ('<tool_call>[{"name":"f"},{"name":"g"}]</tool_call>', [("f", {}), ("g", {})], "", 0),
        ('<tool_call>{"name":"f","arguments":{"a":"two\nlines"}}</tool_call>', [("f", {"a": "two\nlines"})], "", 0),
        ('<tool_call>{"name":"f","arguments":{"a":</tool_call> on', [], "on", 1),
        ('<tool_call>{"name":"f","argum', [], "", 1),
        (f"<tool_call>oops {GOOD}", [("f", {"a": 1})], "", 1),
        ("<tool_call></tool_call>", [], "", 1),
        ('<tool_call>{"arguments":{}}</tool_call>', [], "", 1),
        ('<tool_call>{"name":"f","arguments":[1]}</tool_call>', [], "", 1),
        ('<tool_call>{"name":7}</tool_call>', [], "", 1),
        ("<tool_call>[]</tool_call>", [], "", 1),
        ("<tool_call>" + "[" * 100_000, [], "", 1),
        ("<tool_call>" * 2_000, [], "", 2_000),
        (f"<think>Shall I {GOOD}?</think>No.", [], "No.", 0),
        (f"<think>Yes.</think>{GOOD}", [("f", {"a": 1})], "", 0),
    ],
    ids=range(22),
)  # fmt: skip
def test_calls_are_read(text: str, calls: list, rest: str, problems: int) -> None:
    parsed = parse_tool_calls(text)
    assert [tuple(call) for call in parsed.calls] == calls
    assert parsed.rest == rest and len(parsed.problems) == problems
    assert all(problem.cause and problem.text in text for problem in parsed.problems)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "f"', "}", '"', "[", "\\", "1e999", "x"])))
def test_no_text_is_an_error(parts: list[str]) -> None:
    parsed = parse_tool_calls("".join(parts))
    assert all(isinstance(call.arguments, dict) for call in parsed.calls)
