"""Presets: prompts to the letter, and limits as the original's evaluation scripts have them."""

import pytest

from internvl_hub.evaluation.answers import STYLES
from internvl_hub.evaluation.presets import PRESETS, Preset, find_preset
from internvl_hub.evaluation.prompts import cot_prompt
from internvl_hub.evaluation.questions import Question, parse_questions
from internvl_hub.evaluation.scoring import SCORERS
from internvl_hub.evaluation.totals import TOTALS

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def question(text: str = "What?", images: int = 1, **fields: object) -> Question:
    row = {"question": "<image>\n" * images + text, "images": ["a.png"] * images, "answer": "A", **fields}
    (made,) = parse_questions({key: value for key, value in row.items() if value})
    return made


PROMPTS = {
    "plain": ("What?", {}, "<image>\nWhat?"),
    "vqav2": ("What?", {}, f"<image>\nWhat? {WORD}"),
    "docvqa": (f"What? {WORD}", {}, f"<image>\nWhat? {WORD}"),
    "vizwiz": (
        "What?", {},
        f"<image>\nWhat? When the provided information is insufficient, respond with 'Unanswerable'. {WORD}",
    ),
    "mme": ("A cat? Please answer yes or no.", {}, f"<image>\nA cat? Please answer yes or no. {WORD}"),
    "ai2d": ("What?\nA. x", {}, "<image>\nWhat?\nA. x"),
    "mmbench_en": (
        "What?", {"options": ["x", "{y}"], "hint": "Look."}, f"<image>\nLook.\nWhat?\nA. x\nB. {{y}}\n{LETTER}",
    ),
    "mmbench_cn": ("什么？", {"options": ["甲", "乙"]}, "<image>\n什么？\nA. 甲\nB. 乙\n请直接回答选项字母。"),
    "scienceqa": (f"What?\n{LETTER}", {"options": ["x", "y"]}, f"<image>\nWhat?\nA. x\nB. y\n{LETTER}"),
    "mmmu": ("What?", {"options": ["x", "y"]}, f"<image>\nWhat?\nA. x\nB. y\n{LETTER}"),
    "mvbench": (
        "What?", {"options": ["x", "y"]},
        "<image>\nCarefully watch the video and pay attention to the cause and sequence of events, the detail and "
        "movement of objects, and the action and pose of persons. Based on your observations, select the best option "
        "that accurately addresses the question.\nQuestion:What?\nOptions:\n(A) x\n(B) y\nOnly give the best option.",
    ),
    "refcoco": (
        "the red cup", {},
        "<image>\nPlease provide the bounding box coordinate of the region this sentence describes: "
        "<ref>the red cup</ref>",
    ),
    "mmvp": ("What?", {"options": ["x", "y"]}, f"<image>\nWhat?\nA. x\nB. y\n{LETTER}"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts(name: str) -> None:
    text, fields, expected = PROMPTS[name]
    assert find_preset(name).text_for(question(text, **fields)) == expected


def test_an_open_question_of_a_choice_benchmark() -> None:
    assert find_preset("mmmu").text_for(question("How many?")) == f"<image>\nHow many?\n{WORD}"
    assert find_preset("scienceqa").text_for(question("Which?\nA. x")) == f"<image>\nWhich?\nA. x\n{LETTER}"


def test_several_images() -> None:
    made = question("What?", 2)
    assert find_preset("mantis").text_for(made) == f"Image-1: <image>\nImage-2: <image>\nWhat? {WORD}"
    assert find_preset("vqav2").text_for(made) == f"<image>\n<image>\nWhat? {WORD}"
    assert find_preset("vqav2").text_for(question("Is <image> red?", 0, image="a")) == f"Is <image> red? {WORD}"


# name: tokens, tiles (the table of the original's evaluation)
LIMITS = {
    **dict.fromkeys(("vqav2", "okvqa", "textvqa", "gqa", "vizwiz", "ai2d", "mmmu"), (10, 6)),
    **dict.fromkeys(("ocrvqa", "pope", "mmbench_en", "mmbench_cn", "ccbench", "seed", "scienceqa"), (100, 6)),
    **dict.fromkeys(("m3cot", "mmvp", "refcoco"), (100, 6)),
    "chartqa": (100, 12), "docvqa": (100, 18), "infovqa": (100, 24), "mme": (20, 6), "mvbench": (1000, 1),
    "tiny_lvlm": (30, 6), "mathvista": (4096, 6), "mmmu_pro": (4096, 6),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    preset = find_preset(name)
    assert (preset.max_new_tokens, preset.tiles_for(question())) == LIMITS[name]


def test_pages_share_a_larger_budget() -> None:
    preset = find_preset("mpdocvqa")
    assert [preset.tiles_for(question(images=n)) for n in (1, 2, 3, 4, 20)] == [18, 36, 54, 64, 64]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_asked_and_scored(name: str) -> None:
    preset = PRESETS[name]
    assert preset.metric in SCORERS and preset.totals in TOTALS and preset.style in STYLES
    assert Preset(**preset.as_dict()) == preset and preset.name == name
    for made in (question(), question(options=["x", "y"])):
        text = preset.text_for(made)
        assert "What?" in text and text.count("<image>") == 1 and "{" not in text
        reasoned = cot_prompt(text, "boxed").question
        assert WORD not in reasoned and LETTER not in reasoned and "What?" in reasoned


def test_no_such_preset() -> None:
    with pytest.raises(ValueError, match="no preset 'docvqb'; there are plain, vqav2"):
        find_preset("docvqb")
