"""Responses taken apart, and the prompts that ask for them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_hub.evaluation.answers import PROBLEMS, STYLES, last_box, parse_response
from internvl_hub.evaluation.prompts import (
    SHORT_ANSWER_INSTRUCTIONS,
    THINKING_SYSTEM_PROMPT,
    cot_prompt,
    script_of,
    without_short_instruction,
)

NASTY = [
    "", "   \n\t", "\x00", "\ud800", "\u202e\u200f", "(" * 10**6, "{" * 10**5, "}" * 10**5, "\\boxed{" * 10**4,
    "\\boxed{" + "{" * 10**5 + "}" * 10**5, "Final answer: " * 1000, "<think>" * 10**4, "</think>" * 10**4,
    "a" * 10**6, " " * 10**6, "\n" * 10**6, "\\boxed" * 10**5, "\\" * 10**5, "nan",
    "final answer" + " " * 10**5,
    "*" * 10**5, "答案：" * 100,
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reasoning", "answer"),
    [
        ("I see two.\nTwo and two.\nFinal answer: 4", "I see two.\nTwo and two.", "4"),
        ("Steps.\n\n**Final Answer:** **4 cm**\n", "Steps.", "4 cm"),
        ("Steps.\n\n**Final answer: 4**", "Steps.", "4"),
        ("看图。\n一共两个。\n答案：两个", "看图。\n一共两个。", "两个"),
        ("看图。\n一共两个。\n最终答案: 两个", "看图。\n一共两个。", "两个"),
        ("a\nFinal answer: 3?\nno\nFinal answer: 5", "a\nFinal answer: 3?\nno", "5"),
    ],
    ids=range(6),
)
def test_final_answers(text, reasoning, answer):
    parsed = parse_response(text, "final_answer")
    assert (parsed.reasoning, parsed.answer, parsed.problem) == (reasoning, answer, None)


@pytest.mark.parametrize(
    ("style", "text", "problem"),
    [
        ("direct", " \n", "empty"),
        ("final_answer", "a\nb\nc", "no_trigger"),
        ("final_answer", "a\nb\n" + "Final answer: 1\n" * 3, "many_triggers"),
        ("final_answer", "a\nFinal answer: 1", "few_lines"),
        ("final_answer", "\n\n\nFinal answer: 1", "no_reasoning"),
        ("final_answer", "a\nb\nFinal answer: 1\n2", "many_lines"),
        ("final_answer", "a\nb\nFinal answer:  \n", "no_answer"),
        ("boxed", "so 5", "no_box"),
        ("boxed", r"first \boxed{4}, then \boxed{\frac{1}{2}", "unclosed_box"),
        ("boxed", r"so \boxed{ }", "no_answer"),
        ("think", "so 5", "no_think"),
        ("think", "<think>so 5", "unclosed_think"),
        ("think", "<think>a</think>b</think>5", "many_thinks"),
        ("think", "<think> </think>5", "no_reasoning"),
        ("think", "<think>a</think>\n ", "no_answer"),
        ("think", r"<think>a</think>\boxed{5", "unclosed_box"),
    ],
    ids=range(16),
)
def test_every_broken_shape_has_its_problem(style, text, problem):
    parsed = parse_response(text, style)
    assert parsed.problem == problem and parsed.answer is None


def test_all_problems_are_listed_and_tested():
    assert len(set(PROBLEMS)) == len(PROBLEMS) == 12


@pytest.mark.parametrize(
    ("text", "answer", "reasoning"),
    [
        (r"Half of it." + "\n" + r"Answer: $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", "Half of it."),
        (r"a \boxed{1} b \boxed{2}", "2", r"a \boxed{1} b"),
        (r"\boxed{\boxed{7}}", "7", r"\boxed{"),
        (r"set \boxed{\{1, 2\}}", r"\{1, 2\}", "set"),
        (r"open \boxed{\left\{ x \right.}", r"\left\{ x \right.", "open"),
        (r"text \boxed {x} \boxed", "x", "text"),
    ],
    ids=range(6),
)
def test_boxes_with_braces_inside(text, answer, reasoning):
    parsed = parse_response(text, "boxed")
    assert (parsed.answer, parsed.reasoning) == (answer, reasoning)


@given(st.recursive(st.text("ab ", max_size=3), lambda inner: st.lists(inner, max_size=3).map(lambda x: "{" + "".join(x) + "}")))  # fmt: skip  # noqa: E501
def test_balanced_boxes_come_back_whole(content):
    assert last_box(f"x \\boxed{{{content}}} y }} {{") == (2, content)


def test_thoughts():
    parsed = parse_response("<think>\nTwo.\n</think>\n\nThe answer is 2.", "think")
    assert (parsed.reasoning, parsed.answer) == ("Two.", "The answer is 2.")
    assert parse_response("Two.</think> It is \\boxed{2}!", "think").answer == "2"  # <think> stood in the prompt
    assert parse_response("<think>\\boxed{3}</think>2", "think").answer == "2"


def test_lenient_reading_asks_only_for_an_answer():
    assert parse_response("Final answer: 5\nI hope it helps.", "final_answer", strict=False).answer == "5"
    assert (
        parse_response("Final answer: 1 Final answer: 2 Final answer: 3", "final_answer", strict=False).answer == "3"
    )
    assert parse_response("<think></think>a</think>5", "think", strict=False).answer == "5"
    assert parse_response("5", "final_answer", strict=False).problem == "no_trigger"


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("number", range(len(NASTY)))
def test_no_text_is_an_error(number, style):
    for strict in (True, False):
        parsed = parse_response(NASTY[number], style, strict=strict)
        assert (parsed.answer is None) == (parsed.problem is not None)
        assert parsed.problem is None or parsed.problem in PROBLEMS


@given(st.text() | st.none(), st.sampled_from(STYLES), st.booleans())
def test_any_text_gives_an_answer_or_a_problem(text, style, strict):
    parsed = parse_response(text, style, strict)
    assert (parsed.answer is None) == (parsed.problem is not None)
    assert parsed.answer is None or parsed.answer == parsed.answer.strip() != ""


@given(st.text("abc \n.:", min_size=1).filter(str.strip), st.text("xyz123 ", min_size=1).filter(str.strip))
def test_what_was_written_is_read_back(reasoning, answer):
    parsed = parse_response(f"{reasoning}\n\nFinal answer: {answer}", "final_answer")
    assert (parsed.reasoning, parsed.answer) == (reasoning.strip(), answer.strip())
    assert parse_response(f"<think>{reasoning}</think>\n\\boxed{{{answer}}}", "think").answer == answer.strip()


def test_unknown_names_are_errors():
    with pytest.raises(ValueError, match="style must be one of direct, final_answer"):
        parse_response("x", "cot")
    with pytest.raises(ValueError, match="style"):
        cot_prompt("x", "v1")
    with pytest.raises(ValueError, match="language must be one of auto, en, zh, got 'de'"):
        cot_prompt("x", "boxed", "de")


@pytest.mark.parametrize("instruction", SHORT_ANSWER_INSTRUCTIONS)
@pytest.mark.parametrize("style", STYLES[1:])
def test_short_instructions_are_taken_out(instruction, style):
    question = f"<image>\nHow many cats?\n{instruction}"
    assert without_short_instruction(question) == "<image>\nHow many cats?"
    prompt = cot_prompt(question, style)
    assert instruction not in prompt.question and "How many cats?" in prompt.question
    assert prompt.question.startswith("<image>\n") and prompt.question.count("<image>") == 1
    assert cot_prompt(question, "direct").question == question


def test_short_instructions_in_other_spellings():
    for text in (
        "Q?  answer the question using a single word or phrase",
        "Q? Answer the  question using\na single word or phrase.",
        "Q?\nPlease answer the question and put the final answer within \\boxed{}.",
    ):
        assert without_short_instruction(text) == "Q?"
    assert without_short_instruction("Answer with the option’s letter from the given choices directly. Q?") == "Q?"
    assert without_short_instruction("Is \\boxed{5} right?") == "Is \\boxed{5} right?"
    assert without_short_instruction("Q" + " " * 10**5 + "?").endswith("?")


def test_prompts_name_what_is_read_back():
    english, chinese = cot_prompt("How many {dogs}?", "final_answer"), cot_prompt("图中有几只狗？", "final_answer")
    assert "Final answer: .." in english.question and "{dogs}" in english.question and english.system is None
    assert "答案: ..." in chinese.question and "图中有几只狗？" in chinese.question
    assert "Answer: \\boxed{$ANSWER}" in cot_prompt("Q?", "boxed").question
    assert "Answer: \\boxed{$ANSWER}" in cot_prompt("Q?", "boxed", "zh").question
    thinking = cot_prompt("Q?", "think")
    assert thinking.system == THINKING_SYSTEM_PROMPT and thinking.question.endswith("within \\boxed{}.")
    assert THINKING_SYSTEM_PROMPT.startswith("You are an AI assistant that rigorously follows this response protocol:")
    assert cot_prompt("图中有几只狗？", "final_answer", "en").question.startswith("Answer the question below.")


def test_several_media_stay_in_front():
    prompt = cot_prompt("Image-1: <image>\nImage-2: <image>\nWhich is red?", "boxed").question
    assert prompt.startswith("Image-1: <image>\nImage-2: <image>\nWhich is red?")
    prompt = cot_prompt("<video>\nWhich is red, <image> or not?", "final_answer").question
    assert prompt.startswith("<video>\nAnswer the question") and prompt.endswith("Which is red, <image> or not?")


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What does 停 mean?", "en"), ("<image>\n这是什么？", "zh"), ("図の犬は何匹ですか", "en"), ("", "en"),
        ("ABCD 中AB的长度是多少", "zh"),
    ],
    ids=range(5),
)  # fmt: skip
def test_language_by_script(text, language):
    assert script_of(text) == language
