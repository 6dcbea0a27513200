r"""Prompts that ask for reasoning before an answer, in the forms that `answers.parse_response` reads.

Three forms, as in MMPR: v1 ends in "Final answer: ..." (English or Chinese), v2 in "Answer: \boxed{...}", v3 thinks
between tags under a system prompt. The phrases that are read back, the short instructions and the system prompt are
fixed; the rest is worded here, so answers are not those to the original prompts word for word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..reasoning_internvl import THINKING_SYSTEM_PROMPT as THINKING_SYSTEM_PROMPT
from .answers import STYLES

LANGUAGES = ("auto", "en", "zh")

# What data sets append to ask for a bare answer (tools/reasoning_data_pipeline, chat/eval).
SHORT_ANSWER_INSTRUCTIONS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "Please answer Yes or No.",
    "Only give the best option.",
    "请直接回答选项字母。",
)

_TEMPLATES = {
    ("final_answer", "en"): (
        "Answer the question below. Explain your reasoning step by step first: say what you see, what follows from it "
        'and why. End with one separate line of the form "Final answer: ..", which holds only the answer.\n\n'
        "Question:\n\n{question}"
    ),
    ("final_answer", "zh"): (
        "请回答下面的问题。先一步一步地写出推理过程：说明看到了什么、能得出什么以及理由。"
        "最后单独用一行写出结论，格式为“答案: ...”，这一行只写答案。\n\n问题：\n\n{question}"
    ),
    ("boxed", "en"): (
        "{question}\n\nReason step by step before you answer. The last line of your response must have the form "
        r"'Answer: \boxed{{$ANSWER}}' (without quotes), where $ANSWER is the answer to the question."
    ),
    ("boxed", "zh"): (
        "{question}\n\n请先一步一步地推理，再作答。回答的最后一行必须采用如下格式：'Answer: \\boxed{{$ANSWER}}'"
        "（不带引号），其中 $ANSWER 是问题的答案。"
    ),
    ("think", "en"): "{question}\n\nPut the final answer within \\boxed{{}}.",
    ("think", "zh"): "{question}\n\n请把最终答案写在 \\boxed{{}} 中。",
}

_MEDIA = re.compile(r"\s*(?:(?:(?:Image-|Frame-?)\d+:\s*)?<(?:image|video)>\s*)+")
_HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff]")
_KANA = re.compile(r"[\u3040-\u30ff]")
_LATIN_WORD = re.compile(r"[A-Za-z]{2,}")
_MARK = re.compile(r"<[a-z_]+>")


def _instruction_pattern(instruction: str) -> str:
    """Any white space between the words, either apostrophe, with or without the full stop."""
    words = r"\s+".join(re.escape(word) for word in instruction.rstrip(".。").split())
    return words.replace("'", "['’]") + r"[.。]?(?!\w)"


# Only from the start of white space, so that long runs of it are read once.
_INSTRUCTIONS = re.compile(
    rf"(?<!\s)\s*(?:{'|'.join(map(_instruction_pattern, SHORT_ANSWER_INSTRUCTIONS))})", re.IGNORECASE
)
_BOXED_SENTENCE = re.compile(r"[^.!?。！？\n]*\\boxed\{\s*(?:\.{3}|…)?\s*\}[^.!?。！？\n]*[.。]?")


@dataclass(frozen=True)
class CotPrompt:
    """A question that asks for reasoning.

    Attributes:
        question: The user's turn; leading `<image>` and `<video>` marks stay in front.
        system: System text; None for the model's own.
        style: How the response is read, of `answers.STYLES`.
    """

    question: str
    system: str | None
    style: str


def without_short_instruction(question: str) -> str:
    r"""`question` without the instructions that ask for a bare answer and sentences about an empty `\boxed{}`.

    Removed with the white space before them, anywhere in the text; nothing else changes but white space at the ends.
    """
    question = _INSTRUCTIONS.sub("", question)
    if "\\boxed" in question:
        question = _BOXED_SENTENCE.sub("", question)
    return question.strip()


def cot_prompt(question: str, style: str, language: str = "auto") -> CotPrompt:
    """A question as a prompt that asks for reasoning.

    Args:
        question: As in the data; short-answer instructions are taken out (but for "direct").
        style: Of `answers.STYLES`: "final_answer" (v1), "boxed" (v2), "think" (v3), or "direct", which leaves the
            question as it is.
        language: "en", "zh", or "auto" for Chinese where the question has more Chinese characters than Latin words.

    Raises:
        ValueError: an unknown style or language.
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {', '.join(STYLES)}, got {style!r}")
    if language not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {language!r}")
    if style == "direct":
        return CotPrompt(question, None, style)
    plain = without_short_instruction(question)
    media = _MEDIA.match(plain)
    lead = media[0] if media else ""
    template = _TEMPLATES[style, script_of(question) if language == "auto" else language]
    text = lead + template.format(question=plain[len(lead) :])
    return CotPrompt(text, THINKING_SYSTEM_PROMPT if style == "think" else None, style)


def script_of(text: str) -> str:
    """Language of a question: "zh" with more Chinese characters than Latin words and no Japanese kana, else "en"."""
    text = _MARK.sub("", text)
    return "zh" if len(_HAN.findall(text)) > len(_LATIN_WORD.findall(text)) and not _KANA.search(text) else "en"
