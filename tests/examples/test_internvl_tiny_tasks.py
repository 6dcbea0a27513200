"""The tiny task suite: same seed same sample, nothing shared between splits, true answers, tight boxes, fair marks."""

from __future__ import annotations

import json
import pickle
import random
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer

from internvl_hub.examples.internvl_tiny import metrics
from internvl_hub.examples.internvl_tiny.drawing import (
    COLORS,
    LAYOUTS,
    SHAPES,
    SPLITS,
    handwriting_indices,
    number_image,
    random_scene,
    random_word,
    vocabulary,
    word_split,
)
from internvl_hub.examples.internvl_tiny.tasks import (
    BOX_STEP,
    CHINESE,
    PHRASES,
    TASKS,
    TaskMixture,
    Turn,
    to_record,
    write_split,
)
from internvl_hub.examples.internvl_tiny.tokenizer import CHAT_TOKENS, IMAGE_TOKENS, SYSTEM_PROMPT, build_tokenizer

SCENE_TASKS = {task: 1.0 for task, (family, _) in TASKS.items() if family == "scene"}


def digest(sample) -> tuple:
    return sample.id, sample.turns, None if sample.image is None else sample.image.tobytes()


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def scenes():
    mixture = TaskMixture("train", 5, SCENE_TASKS)
    return [mixture[index] for index in range(600)]


# --- samples ---------------------------------------------------------------------------------------------------------


def test_sample_depends_on_split_seed_and_index_only():
    mixture = TaskMixture("train", 3)
    forwards = [digest(mixture[index]) for index in range(40)]
    copy = pickle.loads(pickle.dumps(mixture))
    assert [digest(copy[index]) for index in reversed(range(40))] == forwards[::-1]
    for other in (TaskMixture("train", 4), TaskMixture("val", 3)):
        assert sum(digest(other[index])[1:] == forwards[index][1:] for index in range(40)) <= 2  # text-only may recur


def test_first_turns_follow_the_weights():
    mixture = TaskMixture("train", 0, {"sum": 3.0, "identity": 1.0})
    first = [mixture[index].turns[0].task for index in range(400)]
    assert set(first) == {"sum", "identity"}
    assert 0.68 < first.count("sum") / 400 < 0.82
    assert {turn.task for index in range(50) for turn in TaskMixture("val", 0, {"count": 1})[index].turns} == {"count"}


@pytest.mark.parametrize("weights", [{"poetry": 1.0}, {"sum": -1.0, "count": 2.0}, {"sum": 0.0}, {}])
def test_bad_weights_are_refused(weights):
    with pytest.raises(ValueError, match="weights"):
        TaskMixture("train", 0, weights)


def test_bad_split_and_index_are_refused():
    with pytest.raises(ValueError, match="split"):
        TaskMixture("dev")
    with pytest.raises(IndexError):
        TaskMixture("train")[-1]


def test_turn_limits_and_no_question_twice():
    for index in range(100):
        turns = TaskMixture("train", 1)[index].turns
        assert 1 <= len(turns) <= 4 and len({turn.question for turn in turns}) == len(turns)
        assert len(TaskMixture("test", 1, turns=(1, 1))[index].turns) == 1


def test_three_per_cent_are_text_only():
    share = sum(share for family, share in TASKS.values() if family == "text")
    assert share / sum(share for _, share in TASKS.values()) == pytest.approx(0.03, abs=0.005)


def test_every_task_has_three_to_five_phrasings_in_both_languages():
    assert set(PHRASES) == set(TASKS)
    assert all(3 <= len(set(PHRASES[task][language])) <= 5 for task in TASKS for language in ("en", "zh"))


# --- splits ----------------------------------------------------------------------------------------------------------


def test_handwriting_is_split_within_each_digit():
    owners = {split: handwriting_indices(split) for split in SPLITS}
    every = sorted(row for rows in owners.values() for digit in rows for row in digit)
    assert every == list(range(1797))
    for digit in range(10):
        counts = [len(owners[split][digit]) for split in SPLITS]
        assert counts[0] / sum(counts) == pytest.approx(0.8, abs=0.02) and min(counts[1:]) >= 17


def test_pictures_use_the_glyphs_of_their_split_only(monkeypatch):
    from internvl_hub.examples.internvl_tiny import drawing

    used, glyph = set(), drawing._glyph
    monkeypatch.setattr(drawing, "_glyph", lambda row: used.add(row) or glyph(row))
    for index in range(60):
        TaskMixture("test", 0, {"numbers": 1.0})[index]
    assert used <= {row for rows in handwriting_indices("test") for row in rows}


def test_words_are_split_whatever_their_case():
    for split in SPLITS:
        assert len(vocabulary(split)) >= 30
        drawn = [random_word(random.Random(seed), split) for seed in range(400)]
        assert all(word_split(word) == split and 3 <= len(word) <= 7 for word in drawn)
        assert all(word in (word.lower(), word.upper()) for word in drawn)
        invented = sum(word.lower() not in vocabulary(split) for word in drawn)
        assert 0.3 < invented / len(drawn) < 0.5


# --- answers ---------------------------------------------------------------------------------------------------------


def named(question: str, names) -> str | None:
    """The colour or shape that a question names, in either language."""
    found = [name for name in names if re.search(rf"\b{name}(e?s)?\b", question) or CHINESE[name] in question]
    assert len(found) <= 1
    return found[0] if found else None


def true_answer(turn: Turn, items) -> str:
    """The answer in English, worked out from the drawn items and the words of the question alone."""
    color, kind = named(turn.question, COLORS), named(turn.question, SHAPES)
    match = [i for i in items if color in (None, i.color) and kind in (None, i.kind)]
    if turn.task == "exists":
        assert color and kind
        return "Yes" if match else "No"
    if turn.task.startswith("count"):
        return str(len(match))
    if turn.task == "describe":
        names = [(CHINESE[i.color] + "的" + CHINESE[i.kind], f"{i.color} {i.kind}") for i in items]
        return "、".join(zh for zh, _ in names) if turn.language == "zh" else ", ".join(en for _, en in names)
    assert len(match) == 1
    return match[0].color if turn.task == "color" else match[0].kind


def test_scene_answers_are_true(scenes):
    seen = set()
    for sample in scenes:
        for turn in sample.turns:
            if turn.task != "pointing":
                answer = true_answer(turn, sample.scene.items)
                assert turn.answer == (CHINESE.get(answer, answer) if turn.language == "zh" else answer)
                seen.add((turn.task, turn.language))
    assert seen == {(task, language) for task in SCENE_TASKS if task != "pointing" for language in ("en", "zh")}


def test_yes_and_no_balance_and_counts_spread(scenes):
    turns = [turn for sample in scenes for turn in sample.turns]
    replies = [turn.answer in ("Yes", "有") for turn in turns if turn.task == "exists"]
    assert 0.4 < sum(replies) / len(replies) < 0.6
    sizes = [len(random_scene(random.Random(seed)).items) for seed in range(1000)]
    assert all(150 < sizes.count(n) < 250 for n in range(1, 6))


def test_article_agrees():
    turns = [t for index in range(200) for t in TaskMixture("train", 2, {"exists": 1.0})[index].turns]
    assert any("an orange" in turn.question for turn in turns)
    assert not any(re.search(r"\ba orange|\ban (?!orange)", turn.question) for turn in turns)


def test_string_answers_agree_with_each_other():
    weights = {task: 1.0 for task, (family, _) in TASKS.items() if family in ("number", "word")}
    lengths = set()
    for index in range(200):
        answers = {turn.task: turn.answer for turn in TaskMixture("val", 7, weights, turns=(4, 4))[index].turns}
        text = answers.get("numbers") or answers.get("words")
        if text is None:
            continue
        lengths.add(len(text) if "numbers" in answers else 0)
        expected = {"numbers": text, "words": text, "digit_count": str(len(text)), "letter_count": str(len(text)),
                    "first_digit": text[0], "first_letter": text[0], "last_digit": text[-1]}  # fmt: skip
        assert answers.items() <= expected.items()
    assert lengths == {0, 1, 2, 3, 4, 5, 6}


def test_sums_are_right():
    for index in range(100):
        for turn in TaskMixture("train", 0, {"sum": 1.0})[index].turns:
            left, right = map(int, re.findall(r"\d", turn.question))
            assert int(turn.answer) == left + right


# --- pictures --------------------------------------------------------------------------------------------------------


def test_boxes_are_tight_around_the_drawn_pixels():
    for seed in range(150):
        scene = random_scene(random.Random(seed))
        drawn = (np.asarray(scene.render()) != np.array(scene.background)).any(-1)
        assert drawn.shape == (scene.size[1], scene.size[0])
        for item in scene.items:
            left, top, right, bottom = item.box
            rows, columns = np.nonzero(drawn[top:bottom, left:right])
            assert (rows.min(), columns.min()) == (0, 0)
            assert (rows.max() + 1, columns.max() + 1) == (bottom - top, right - left)
            drawn[top:bottom, left:right] = False
        assert not drawn.any()


def tile_grid(width: int, height: int) -> tuple[int, int]:
    """Columns and rows of 64 px tiles, at most 6: brute force over InternVL's rule."""
    grids = sorted(((i, j) for i in range(1, 7) for j in range(1, 7) if i * j <= 6), key=lambda g: g[0] * g[1])
    best, least = (1, 1), float("inf")
    for i, j in grids:
        difference = abs(width / height - i / j)
        if difference < least or (difference == least and width * height > 0.5 * 64 * 64 * i * j):
            best, least = (i, j), difference
    return best


def test_shapes_are_large_enough_in_the_tiles():
    layouts = set()
    for seed in range(300):
        scene = random_scene(random.Random(seed))
        columns, rows = tile_grid(*scene.size)
        assert scene.size == (64 * columns, 64 * rows)
        least = min(min(i.box[2] - i.box[0], i.box[3] - i.box[1]) for i in scene.items)
        assert least >= 17
        layouts.add((columns, rows, 2 if least < 28 else 1))
    assert layouts == set(LAYOUTS)


def test_shapes_are_in_reading_order():
    """Row by row from the left; a row of cells is 64 or 32 px high and every shape stays in its cell."""
    for seed in range(300):
        scene = random_scene(random.Random(seed))
        middles = [((i.box[0] + i.box[2]) / 2, (i.box[1] + i.box[3]) / 2) for i in scene.items]
        small = any(item.side < 30 for item in scene.items)
        cells = [(int(y // (32 if small else 64)), int(x // (32 if small else 64))) for x, y in middles]
        assert cells == sorted(cells) and len(set(cells)) == len(cells)


def test_one_tile_holds_up_to_four_shapes():
    scenes = [random_scene(random.Random(seed)) for seed in range(300)]
    assert {len(scene.items) for scene in scenes if scene.size == (64, 64)} == {1, 2, 3, 4}


def test_no_shape_crosses_a_tile_border():
    for seed in range(300):
        for item in random_scene(random.Random(seed)).items:
            left, top, right, bottom = item.box
            assert left // 64 == right // 64 and top // 64 == bottom // 64


@pytest.mark.parametrize("tall", [False, True])
def test_long_numbers_need_more_tiles(tall):
    mean = []
    for length in range(1, 7):
        sizes = [number_image(random.Random(seed), "407152"[:length], "train", tall).size for seed in range(40)]
        grids = [tile_grid(*size) for size in sizes]
        assert all(grid[0 if tall else 1] == 1 for grid in grids)
        mean.append(np.mean([max(grid) for grid in grids]))
    assert mean[:2] == [1, 1] and 2 <= mean[2] <= 2.5 and 2 <= mean[3] <= 2.5 and 3 <= mean[4] <= 4


def test_pointing_box_format_and_rounding(scenes):
    turns = [(sample, turn) for sample in scenes for turn in sample.turns if turn.task == "pointing"]
    assert len(turns) > 100
    for sample, turn in turns:
        match = re.fullmatch(r"<ref>(.+)</ref><box>\[\[(\d+), (\d+), (\d+), (\d+)\]\]</box>", turn.answer)
        color, kind = named(match[1], COLORS), named(match[1], SHAPES)
        (item,) = [i for i in sample.scene.items if (i.color, i.kind) == (color, kind)]
        exact = 1000 * np.array(item.box) / np.tile(sample.image.size, 2)
        written = np.array([int(value) for value in match.groups()[1:]])
        assert turn.target == pytest.approx(exact) and f"<ref>{match[1]}</ref>" in turn.question
        assert (np.abs(written - exact) <= BOX_STEP / 2).all() and (written % BOX_STEP == 0).all()
    assert np.mean([metrics.score("pointing", turn.answer, turn) for _, turn in turns]) > 0.95


# --- records ---------------------------------------------------------------------------------------------------------


def test_record_follows_the_conversation_format():
    for index in range(60):
        sample = TaskMixture("train", 9, {"sum": 1.0, "numbers": 1.0})[index]
        record = to_record(sample, None if sample.image is None else "a.png")
        values = [turn["value"] for turn in record["conversations"]]
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * len(sample.turns)
        assert values[0].startswith("<image>\n") == ("image" in record) == (sample.image is not None)
        assert not any("<image>" in value for value in values[1:])
        assert values[1::2] == [turn.answer for turn in sample.turns]
    with pytest.raises(ValueError, match="image_name"):
        to_record(TaskMixture("train", 0, {"count": 1.0})[0], None)


def test_written_split_equals_the_samples_in_memory(tmp_path):
    path = write_split(tmp_path, 30, "val", seed=2)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 30
    for index, row in enumerate(rows):
        sample = TaskMixture("val", 2)[index]
        assert row == json.loads(json.dumps(to_record(sample, row.get("image"))))
        if sample.image is not None:
            stored = Image.open(tmp_path / "images" / row["image"])
            assert stored.size == (row["width"], row["height"]) and stored.tobytes() == sample.image.tobytes()


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_special_tokens_come_first(tokenizer):
    specials = [*CHAT_TOKENS, *IMAGE_TOKENS]
    assert tokenizer.convert_tokens_to_ids(specials) == list(range(12))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (0, 2, None)
    assert tokenizer.model_max_length == 2048 and 500 <= len(tokenizer) <= 800
    assert tokenizer("".join(specials)).input_ids == list(range(12))
    assert tokenizer.decode(range(12), skip_special_tokens=True) == ""


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", [
    "a , b .  c 's !\r\n\n x", "e\u0301 \u00e9 \ufb01 \u2126", "<img></img> <im",
    "\uff41\u3000\t\U0001f9d1\u200d\U0001f52c",
])  # fmt: skip
def test_no_clean_up_and_no_normalisation(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@given(number=st.integers(0, 10**7), text=st.sampled_from(["{}", "a{}b", "[[{}, 20]]", "第{}个", " {}"]))
@settings(max_examples=60, deadline=None)
def test_every_digit_is_a_token(tokenizer, number, text):
    tokens = [tokenizer.decode([token]) for token in tokenizer(text.format(number)).input_ids]
    assert all(len(token) == 1 for token in tokens if any(c.isdigit() for c in token))


def test_prompts_are_short(tokenizer):
    assert len(tokenizer(SYSTEM_PROMPT).input_ids) <= 6
    assert all(len(tokenizer(f"{role}\n").input_ids) <= 2 for role in ("system", "user", "assistant"))
    turns = [turn for index in range(200) for turn in TaskMixture("test")[index].turns]
    assert np.mean([len(tokenizer(turn.question).input_ids) for turn in turns]) < 6


def test_tokenizer_is_reproducible_and_reloads(tokenizer, tmp_path):
    assert build_tokenizer().get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<img><IMG_CONTEXT></img>\nWhat is 2+3? a , b"
    assert again(text).input_ids == tokenizer(text).input_ids and again.decode(again(text).input_ids) == text
    with pytest.raises(ValueError, match="vocab_size"):
        build_tokenizer(["a"], vocab_size=100)


# --- marks -----------------------------------------------------------------------------------------------------------


def turn_of(task: str, answer: str, target=None) -> Turn:
    return Turn("?", answer, task, "en", target)


def test_exact_match_strips_and_keeps_case():
    assert metrics.score("words", " Cat\n", turn_of("words", "Cat")) == 1.0
    assert metrics.score("words", "cat", turn_of("words", "CAT")) == 0.0
    assert metrics.score("numbers", "0471", turn_of("numbers", "471")) == 0.0


@pytest.mark.parametrize("text", [
    "", "[[", "]]", "[[1, 2, 3]]", "[[1, 2, 3, 4, 5]]", "[[300, 100, 100, 300]]", "[[a, b, c, d]]",
    "[[1, 2, 3, " + "9" * 9000, "[[100, 100, 300, 300]] [[100, 100, 300, 300]]", "[[100, 100, 100, 100]]",
    "[[-5, 0, 10, 10]]", "[[\u0661, \u0662, \u0663, \u0664]]",
])  # fmt: skip
def test_malformed_boxes_score_nothing(text):
    assert metrics.score("pointing", text, turn_of("pointing", "", (100.0, 100.0, 300.0, 300.0))) == 0.0


@given(st.text(alphabet="[]<box>/0123456789,. -", max_size=60), st.sampled_from(sorted(TASKS)))
@settings(max_examples=200, deadline=None)
def test_any_prediction_gets_a_mark(text, task):
    assert 0.0 <= metrics.score(task, text, turn_of(task, "x", (0.0, 0.0, 500.0, 500.0))) <= 1.0


def test_box_overlap_against_pixel_counting():
    rng = random.Random(0)
    for _ in range(50):
        boxes, masks = [], []
        for _ in range(2):
            (x1, x2), (y1, y2) = sorted(rng.sample(range(30), 2)), sorted(rng.sample(range(30), 2))
            mask = np.zeros((30, 30), bool)
            mask[y1:y2, x1:x2] = True
            boxes.append((x1, y1, x2, y2))
            masks.append(mask)
        assert metrics.box_iou(*boxes) == pytest.approx((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
    assert metrics.score("pointing", "red circle[[0,0, 10,10]]", turn_of("pointing", "[[0, 0, 10, 20]]")) == 0.5


def test_table_groups_lengths_and_languages():
    rows = [metrics.make_row(turn_of("numbers", "4071"), "4071"), metrics.make_row(turn_of("numbers", "7"), "1"),
            metrics.make_row(turn_of("pointing", "", (0.0, 0.0, 10.0, 10.0)), "[[0, 0, 10, 8]]")]  # fmt: skip
    table = metrics.aggregate(rows)
    assert list(table) == [
        "all", "numbers", "numbers/1 digit", "numbers/4 digits", "numbers/en", "pointing", "pointing/en",
    ]  # fmt: skip
    assert table["numbers"] | {"low": 0, "high": 0} == {"n": 2, "accuracy": 0.5, "low": 0, "high": 0, "mean_iou": None}
    assert table["pointing"]["mean_iou"] == pytest.approx(0.8)
    assert "| numbers/4 digits | 1 | 100.0 |" in metrics.format_table(table)
    assert metrics.aggregate([]) == {}


def test_wilson_interval():
    assert metrics.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)  # published example, z = 1.96
    assert metrics.wilson(0, 0) == (0.0, 1.0)
    assert metrics.wilson(0, 20)[0] == 0.0 and metrics.wilson(20, 20)[1] == 1.0
