"""Benchmarks as data: how each is asked, with which limits, and how its answers are judged.

The settings are those of the original's scripts (internvl_chat/eval and the evaluation tables of the papers): greedy,
six tiles unless said otherwise. No data are shipped; a preset is applied to files in the form of `questions`. Captions
(CIDEr and its relatives need Java and large packages of their own) and benchmarks judged by GPT (MMVet, LLaVA-Bench,
MMHal, whose scores change with the judge) are left out, and so are those that are scored by uploading answers.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .prompts import SHORT_ANSWER_INSTRUCTIONS
from .questions import Question

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
REASONING_TOKENS = 4096
_MVBENCH = (
    "Carefully watch the video and pay attention to the cause and sequence of events, the detail and movement of "
    "objects, and the action and pose of persons. Based on your observations, select the best option that accurately "
    "addresses the question.\n"
)
_LEADING_MEDIA = re.compile(r"(?:\s*<(?:image|video)>)+\s*")
_MARK = re.compile("<image>")


@dataclass(frozen=True)
class Preset:
    """How a benchmark is asked and scored.

    Attributes:
        name: As on the command line.
        title: Of the benchmark.
        metric: How one answer is judged, of `scoring.SCORERS`.
        prompt: The user's turn behind the media, with `{question}`, `{options}` (one line each), `{hint}` (the row's
            field `hint` and a newline, if it has one). An instruction that the row's text has already is not repeated.
        open_prompt: For questions without options; "" for `prompt`.
        option_form: Of one line of the options.
        max_new_tokens: Of an answer; with a reasoning style, `REASONING_TOKENS`.
        max_tiles: Of a question; None for the checkpoint's.
        tiles_per_image: The most that each of several images may have; `max_tiles` then bounds their sum.
        num_frames: Of a video.
        exif: Turn pictures upright.
        totals: How marks become the score, of `totals.TOTALS`.
        style: How the answer is asked for and read, of `answers.STYLES`.
        system: System text; None for the model's own.
        number_images: Begin with `Image-1: <image>` and so on.
        note: Where scores may differ from published ones.
    """

    name: str
    title: str
    metric: str
    prompt: str = "{question}"
    open_prompt: str = ""
    option_form: str = "{letter}. {text}"
    max_new_tokens: int = 100
    max_tiles: int | None = 6
    tiles_per_image: int | None = None
    num_frames: int = 16
    exif: bool = True
    totals: str = "mean"
    style: str = "direct"
    system: str | None = None
    number_images: bool = False
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """As json values, from which `Preset(**values)` makes it again."""
        return asdict(self)

    def text_for(self, question: Question) -> str:
        """The user's turn for a question, before any change for a reasoning style."""
        media = _LEADING_MEDIA.match(question.text)
        lead = media[0] if media else ""
        template = self.prompt if question.options or not self.open_prompt else self.open_prompt
        if not question.options:
            template = template.replace("{options}\n", "")
        hint = question.fields.get("hint")
        body = template.format(
            question=_without_repeated(question.text[len(lead) :], template),
            options="\n".join(self.option_form.format(letter=k, text=v) for k, v in lettered(question.options)),
            hint=f"{hint}\n" if isinstance(hint, str) and hint.strip() else "",
        )
        return (_numbered(lead) if self.number_images else lead) + body

    def tiles_for(self, question: Question) -> int | None:
        """Most tiles of a question, which its images share."""
        if self.max_tiles is None or self.tiles_per_image is None:
            return self.max_tiles
        return min(self.max_tiles, self.tiles_per_image * max(1, len(question.images)))


def lettered(options: Sequence[str]) -> list[tuple[str, str]]:
    """Options with their letters, A first; at most 26."""
    return list(zip(string.ascii_uppercase, options, strict=False))


def find_preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: there is none.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]


def _without_repeated(text: str, template: str) -> str:
    """The text without an instruction that the template adds."""
    for instruction in SHORT_ANSWER_INSTRUCTIONS:
        if instruction in template:
            text = text.replace(instruction, "")
    return text.strip()


def _numbered(lead: str) -> str:
    numbers = iter(range(1, lead.count("<image>") + 1))
    return _MARK.sub(lambda mark: f"Image-{next(numbers)}: {mark[0]}", lead)


_WORDS = f"{{question}} {WORD}"
_CHOICE = f"{{hint}}{{question}}\n{{options}}\n{LETTER}"
_CHOICE_CN = f"{{hint}}{{question}}\n{{options}}\n{LETTER_CN}"
_SELECTED = "the options are in the question where the row has none"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "plain", "Plain questions", "auto", max_new_tokens=1024, max_tiles=None,
            note="questions go as they are; a row's 'task' names its verifier, and without one boxes are compared as "
            "boxes and all else by the best of VQA score, choice and mathematics",
        ),
        Preset("vqav2", "VQAv2", "vqa", _WORDS, max_new_tokens=10),
        Preset("okvqa", "OK-VQA", "vqa", _WORDS, max_new_tokens=10),
        Preset("textvqa", "TextVQA", "vqa", _WORDS, max_new_tokens=10, note="without the data set's OCR tokens"),
        Preset("gqa", "GQA", "exact", _WORDS, max_new_tokens=10, note="accuracy only"),
        Preset(
            "vizwiz", "VizWiz", "vqa",
            "{question} When the provided information is insufficient, respond with 'Unanswerable'. " + WORD,
            max_new_tokens=10,
        ),
        Preset("ocrvqa", "OCR-VQA", "exact", _WORDS),
        Preset("ai2d", "AI2D", "exact", _CHOICE, "{question}", max_new_tokens=10, note=_SELECTED),
        Preset(
            "chartqa", "ChartQA", "relaxed", _WORDS, max_tiles=12, totals="mean_of_categories",
            note="the score is the mean of the categories, human and augmented",
        ),
        Preset("docvqa", "DocVQA", "anls", _WORDS, max_tiles=18),
        Preset("infovqa", "InfographicVQA", "anls", _WORDS, max_tiles=24),
        Preset("mpdocvqa", "MP-DocVQA", "anls", _WORDS, max_tiles=64, tiles_per_image=18),
        Preset(
            "pope", "POPE", "pope", _WORDS, totals="pope",
            note="needs 'category' (adversarial, popular, random); the score is their mean F1",
        ),
        Preset(
            "mme", "MME", "mme", _WORDS, max_new_tokens=20, totals="mme",
            note="needs 'category' (the task); the score is perception plus cognition, at most 2800",
        ),
        Preset("mmbench_en", "MMBench (English)", "letter", _CHOICE, note="one order of the options"),
        Preset("mmbench_cn", "MMBench (Chinese)", "letter", _CHOICE_CN, note="one order of the options"),
        Preset("ccbench", "CCBench", "letter", _CHOICE_CN),
        Preset("seed", "SEED-Bench, images", "first_letter", _CHOICE, "{question}", note=_SELECTED),
        Preset("scienceqa", "ScienceQA", "letter", _CHOICE),
        Preset("m3cot", "M3CoT", "letter", _CHOICE),
        Preset(
            "mmmu", "MMMU", "mmmu", f"{{question}}\n{{options}}\n{LETTER}", f"{{question}}\n{WORD}",
            max_new_tokens=10,
            note="an answer that names no option is wrong, where the original guesses; the first image is not "
            "enlarged, and all images share the tiles",
        ),
        Preset(
            "mmmu_pro", "MMMU-Pro", "mmmu_pro", f"{{question}}\n{{options}}\n{LETTER}",
            max_new_tokens=REASONING_TOKENS,
            note="the prompt is worded as for MMMU",
        ),
        Preset(
            "mathvista", "MathVista", "mathvista", max_new_tokens=REASONING_TOKENS,
            note="answers are found by rules, not by GPT-4; the question is the row's whole query",
        ),
        Preset(
            "mvbench", "MVBench", "mvbench",
            f"{_MVBENCH}Question:{{question}}\nOptions:\n{{options}}\nOnly give the best option.",
            option_form="({letter}) {text}", max_new_tokens=1000, max_tiles=1, totals="mean_of_categories",
            note="frames are announced as 'Frame-1: ', the form of training",
        ),
        Preset("mmvp", "MMVP", "letter", _CHOICE, totals="groups", note="needs 'group', equal for the two of a pair"),
        Preset(
            "refcoco", "RefCOCO, RefCOCO+, RefCOCOg", "grounding",
            "Please provide the bounding box coordinate of the region this sentence describes: <ref>{question}</ref>",
            exif=False, note="needs 'bbox' with 'width' and 'height', or from 0 to 1000",
        ),
        Preset(
            "mantis", "Mantis-Eval", "exact", _CHOICE, _WORDS, max_new_tokens=50, max_tiles=12, number_images=True,
        ),
        Preset(
            "mirb", "MIRB", "exact", _CHOICE, _WORDS, max_new_tokens=512, max_tiles=12, number_images=True,
            totals="mean_of_categories", note="needs 'category' (one of the four groups)",
        ),
        Preset(
            "mmiu", "MMIU", "letter", _CHOICE, max_tiles=12, number_images=True, totals="mean_of_categories",
            note="needs 'category' (the task)",
        ),
        Preset(
            "tiny_lvlm", "Tiny-LVLM-eHub", "contains", _WORDS, max_new_tokens=30, totals="sum_of_categories",
            note="needs 'category' (one of the five groups); the score is the sum of their accuracies",
        ),
    )
}  # fmt: skip
