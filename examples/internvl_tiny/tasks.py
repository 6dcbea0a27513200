"""Questions and answers about the pictures of `drawing`, as InternVL conversations in English and Chinese.

A sample is one picture with a few question-answer turns, or (3 %) text alone. `TaskMixture` yields samples as a pure
function of (split, seed, index), so nothing need be stored; `write_split` stores them as png + jsonl all the same.
Train, val and test never share a handwritten glyph or a printed word; their scenes come from different random streams.

Boxes follow InternVL: `<ref>name</ref><box>[[x1, y1, x2, y2]]</box>`, integers 0-1000 of the image's width and height.
They are rounded to multiples of `BOX_STEP` = 10: on these pictures (64-192 px) one pixel is 5-16 units, so a third
digit would be noise to learn. The exact box stays in `Turn.target`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from .drawing import COLORS, SHAPES, SPLITS, Item, Scene, Split, number_image, random_scene, random_word, word_image

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
BOX_STEP = 10
# task -> (family of picture, share of first turns); later turns come from the same family
TASKS: dict[str, tuple[str, float]] = {
    "numbers": ("number", 0.28), "digit_count": ("number", 0.03), "first_digit": ("number", 0.02),
    "last_digit": ("number", 0.02), "words": ("word", 0.20), "letter_count": ("word", 0.02),
    "first_letter": ("word", 0.02), "color": ("scene", 0.07), "shape": ("scene", 0.06), "count": ("scene", 0.03),
    "count_color": ("scene", 0.03), "count_shape": ("scene", 0.03), "exists": ("scene", 0.05),
    "describe": ("scene", 0.02), "pointing": ("scene", 0.09), "sum": ("text", 0.02), "identity": ("text", 0.01),
}  # fmt: skip
PHRASES: dict[str, dict[Language, tuple[str, ...]]] = {
    "numbers": {"en": ("What number is written?", "What is the number?", "Read the number.", "Which number is this?"),
                "zh": ("图中写的数字是什么？", "图中的数字是多少？", "请读出数字。", "这是什么数字？")},
    "digit_count": {"en": ("How many digits are there?", "How many digits do you see?", "Count the digits."),
                    "zh": ("图中有几个数字？", "一共有几个数字？", "请数一数数字。")},
    "first_digit": {"en": ("What is the first digit?", "Which digit is first?", "Read the first digit."),
                    "zh": ("第一个数字是什么？", "第一个数字是多少？", "请读出第一个数字。")},
    "last_digit": {"en": ("What is the last digit?", "Which digit is last?", "Read the last digit."),
                   "zh": ("最后一个数字是什么？", "最后一个数字是多少？", "请读出最后一个数字。")},
    "words": {"en": ("What word is written?", "What is the word?", "Read the word.", "Which word is this?"),
              "zh": ("图中写的单词是什么？", "图中的单词是什么？", "请读出单词。", "这是什么单词？")},
    "letter_count": {"en": ("How many letters are there?", "How many letters do you see?", "Count the letters."),
                     "zh": ("图中有几个字母？", "一共有几个字母？", "请数一数字母。")},
    "first_letter": {"en": ("What is the first letter?", "Which letter is first?", "Read the first letter."),
                     "zh": ("第一个字母是什么？", "单词的第一个字母是什么？", "请读出第一个字母。")},
    "color": {"en": ("What color is the {shape}?", "What is the color of the {shape}?", "Which color is the {shape}?"),
              "zh": ("{shape}是什么颜色？", "图中的{shape}是什么颜色？", "{shape}的颜色是什么？")},
    "shape": {"en": ("What shape is {color}?", "Which shape is {color}?", "What is the {color} shape?"),
              "zh": ("{color}的是什么形状？", "什么形状是{color}的？", "{color}的图形是什么形状？")},
    "count": {"en": ("How many shapes are there?", "How many shapes do you see?", "Count the shapes."),
              "zh": ("图中有几个图形？", "一共有几个图形？", "请数一数图形。")},
    "count_color": {"en": ("How many {color} shapes are there?", "How many shapes are {color}?",
                           "Count the {color} shapes."),
                    "zh": ("图中有几个{color}的图形？", "有几个图形是{color}的？", "请数一数{color}的图形。")},
    "count_shape": {"en": ("How many {shape}{plural} are there?", "How many {shape}{plural} do you see?",
                           "Count the {shape}{plural}."),
                    "zh": ("图中有几个{shape}？", "一共有几个{shape}？", "请数一数{shape}。")},
    "exists": {"en": ("Is there {a} {color} {shape}?", "Do you see {a} {color} {shape}?",
                      "Is {a} {color} {shape} there?"),
               "zh": ("有{color}的{shape}吗？", "图中有{color}的{shape}吗？", "图中有没有{color}的{shape}？")},
    "describe": {"en": ("What shapes are there?", "Which shapes do you see?", "List the shapes."),
                 "zh": ("图中有哪些图形？", "有哪些图形？", "请列出图形。")},
    "pointing": {"en": ("Where is the {ref}?", "Find the {ref}.", "Point to the {ref}."),
                 "zh": ("{ref}在哪里？", "请找出{ref}。", "请指出{ref}。")},
    "sum": {"en": ("{left}+{right}=?", "What is {left}+{right}?", "How much is {left}+{right}?"),
            "zh": ("{left}+{right}等于几？", "{left}+{right}是多少？", "请计算{left}+{right}。")},
    "identity": {"en": ("Hello, who are you?", "Who are you?", "What is your name?"),
                 "zh": ("你好，你是谁？", "你是谁？", "你叫什么名字？")},
}  # fmt: skip
CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色", "orange": "橙色",
    "black": "黑色", "white": "白色", "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形",
    "cross": "十字形", "Yes": "有", "No": "没有", "I am InternVL-tiny.": "我是 InternVL-tiny。",
}  # fmt: skip


@dataclass(frozen=True)
class Turn:
    """One question (no `<image>` marker) and its answer.

    `target` is the exact box (x1, y1, x2, y2), 0-1000, of a pointing turn; None for every other task.
    """

    question: str
    answer: str
    task: str
    language: Language
    target: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Sample:
    """One conversation; `image` is RGB, or None for text alone. `scene` is what was drawn, where shapes were."""

    id: str
    image: Image.Image | None
    turns: list[Turn]
    scene: Scene | None = None


@dataclass(frozen=True)
class _Ask:
    """A question before it is put into words: names stay English, `item` is the shape to point at."""

    task: str
    answer: str
    words: tuple[tuple[str, str], ...] = ()
    item: Item | None = None


def _word_it(rng: random.Random, ask: _Ask, scene: Scene | None = None) -> Turn:
    """Choose language and phrasing, translate names and answer."""
    language = rng.choice(LANGUAGES)
    words, answer, target = dict(ask.words), ask.answer, None
    if ask.task == "describe" and scene is not None:
        names = [_name(item.color, item.kind, language) for item in scene.items]
        answer = ("、" if language == "zh" else ", ").join(names)
    if "color" in words:
        words["a"] = "an" if words["color"] == "orange" else "a"
    if "shape" in words:
        words["plural"] = "es" if words["shape"] == "cross" else "s"
    if language == "zh":
        words = {key: CHINESE.get(value, value) for key, value in words.items()}
        answer = CHINESE.get(answer, answer)
    if ask.item is not None and scene is not None:
        words["ref"] = f"<ref>{_name(ask.item.color, ask.item.kind, language)}</ref>"
        target = exact_box(ask.item, scene)
        answer = f"{words['ref']}<box>[[{', '.join(map(str, quantised(target)))}]]</box>"
    return Turn(rng.choice(PHRASES[ask.task][language]).format(**words), answer, ask.task, language, target)


def _name(color: str, kind: str, language: Language) -> str:
    return f"{CHINESE[color]}的{CHINESE[kind]}" if language == "zh" else f"{color} {kind}"


def exact_box(item: Item, scene: Scene) -> tuple[float, float, float, float]:
    """Tight box of `item` in thousandths of the image's width and height."""
    (width, height), (left, top, right, bottom) = scene.size, item.box
    return 1000 * left / width, 1000 * top / height, 1000 * right / width, 1000 * bottom / height


def quantised(box: tuple[float, float, float, float]) -> tuple[int, ...]:
    """`box` rounded to multiples of `BOX_STEP`, as it is written in answers."""
    return tuple(BOX_STEP * round(value / BOX_STEP) for value in box)


def _ask_string(task: str, text: str) -> _Ask:
    """A question about a digit string or a word."""
    answers = {"first_digit": text[0], "first_letter": text[0], "last_digit": text[-1],
               "digit_count": str(len(text)), "letter_count": str(len(text))}  # fmt: skip
    return _Ask(task, answers.get(task, text))


def _ask_color(rng: random.Random, scene: Scene) -> _Ask | None:
    kinds = [item.kind for item in scene.items]
    single = [item for item in scene.items if kinds.count(item.kind) == 1]
    item = rng.choice(single) if single else None
    return item and _Ask("color", item.color, (("shape", item.kind),))


def _ask_shape(rng: random.Random, scene: Scene) -> _Ask | None:
    colors = [item.color for item in scene.items]
    single = [item for item in scene.items if colors.count(item.color) == 1]
    item = rng.choice(single) if single else None
    return item and _Ask("shape", item.kind, (("color", item.color),))


def _ask_count(rng: random.Random, scene: Scene) -> _Ask:
    return _Ask("count", str(len(scene.items)))


def _ask_describe(rng: random.Random, scene: Scene) -> _Ask:
    return _Ask("describe", "")  # names are translated one by one


def _ask_count_color(rng: random.Random, scene: Scene) -> _Ask:
    """One time in six about any colour, mostly an absent one, so that 0 occurs as an answer."""
    colors = [item.color for item in scene.items]
    color = rng.choice(list(COLORS) if rng.random() < 1 / 6 else sorted(set(colors)))
    return _Ask("count_color", str(colors.count(color)), (("color", color),))


def _ask_count_shape(rng: random.Random, scene: Scene) -> _Ask:
    kinds = [item.kind for item in scene.items]
    kind = rng.choice(SHAPES if rng.random() < 1 / 6 else sorted(set(kinds)))
    return _Ask("count_shape", str(kinds.count(kind)), (("shape", kind),))


def _ask_exists(rng: random.Random, scene: Scene) -> _Ask:
    """Half yes, half no; three in four of the no's keep the colour or the kind of a shape that is there."""
    there = {(item.color, item.kind) for item in scene.items}
    color, kind = pair = rng.choice(sorted(there))
    if yes := rng.random() < 0.5:
        return _Ask("exists", "Yes", (("color", color), ("shape", kind)))
    while not yes and pair in there:
        change = rng.randrange(8)
        pair = (color if change < 3 else rng.choice(list(COLORS)), rng.choice(SHAPES) if not 3 <= change < 6 else kind)
    return _Ask("exists", "No", (("color", pair[0]), ("shape", pair[1])))


def _ask_pointing(rng: random.Random, scene: Scene) -> _Ask | None:
    pairs = [(item.color, item.kind) for item in scene.items]
    single = [item for item in scene.items if pairs.count((item.color, item.kind)) == 1]
    item = rng.choice(single) if single else None
    return item and _Ask("pointing", "", (("color", item.color), ("shape", item.kind)), item)


_SCENE_ASKS: dict[str, Callable[[random.Random, Scene], _Ask | None]] = {
    "color": _ask_color, "shape": _ask_shape, "count": _ask_count, "count_color": _ask_count_color,
    "count_shape": _ask_count_shape, "exists": _ask_exists, "describe": _ask_describe, "pointing": _ask_pointing,
}  # fmt: skip


def _ask_text(rng: random.Random, task: str) -> _Ask:
    left, right = rng.randint(0, 9), rng.randint(0, 9)
    if task == "identity":
        return _Ask(task, "I am InternVL-tiny.")
    return _Ask(task, str(left + right), (("left", str(left)), ("right", str(right))))


@dataclass(frozen=True)
class TaskMixture:
    """Endless samples; `mixture[index]` depends on (split, seed, index) and the two settings below only. Picklable.

    Args:
        split: "train", "val" or "test"; decides handwriting, words and the random stream.
        seed: another seed, another endless series.
        weights: share of first turns per task (keys of `TASKS`, any positive scale); a task left out never occurs.
            None takes the shares in `TASKS`.
        turns: least and most turns per picture; (1, 1) for evaluation. No question is asked twice of a picture.

    Raises:
        ValueError: unknown split or task, a negative weight, or weights that sum to zero.
    """

    split: Split
    seed: int = 0
    weights: dict[str, float] | None = field(default=None, hash=False)
    turns: tuple[int, int] = (2, 4)

    def __post_init__(self) -> None:
        weights = self._weights()
        if self.split not in SPLITS:
            raise ValueError(f"split is {self.split!r}; use one of {', '.join(SPLITS)}")
        if unknown := sorted(set(weights) - set(TASKS)):
            raise ValueError(f"weights name unknown tasks {unknown}; known: {', '.join(TASKS)}")
        if min(weights.values(), default=0) < 0 or not sum(weights.values()) > 0:
            raise ValueError(f"weights must be >= 0 with a positive sum, got {self.weights}")

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` >= 0; there is no last one, so iterate over a range, not over the mixture."""
        if index < 0:
            raise IndexError(f"index is {index}; a mixture has no end, so negative indices have no meaning")
        rng = random.Random(f"internvl-tiny/{self.split}/{self.seed}/{index}")
        weights = {task: weight for task, weight in self._weights().items() if weight > 0}
        lead = rng.choices(list(weights), list(weights.values()))[0]
        family = TASKS[lead][0]
        tasks = {task: weight for task, weight in weights.items() if TASKS[task][0] == family}
        name, wanted = f"{self.split}-{self.seed}-{index}", rng.randint(*self.turns)
        if family == "scene":
            return _scene_sample(rng, name, lead, tasks, wanted)
        if family == "text":
            asks = _distinct(rng, lead, tasks, wanted, lambda task: _ask_text(rng, task))
            return Sample(name, None, [_word_it(rng, ask) for ask in asks])
        if family == "number":
            text = "".join(rng.choices("0123456789", k=rng.randint(1, 6)))
            image = number_image(rng, text, self.split, tall=len(text) > 1 and rng.random() < 0.25)
        else:
            text = random_word(rng, self.split)
            image = word_image(rng, text)
        asks = _distinct(rng, lead, tasks, wanted, lambda task: _ask_string(task, text))
        return Sample(name, image, [_word_it(rng, ask) for ask in asks])

    def _weights(self) -> dict[str, float]:
        return {task: share for task, (_, share) in TASKS.items()} if self.weights is None else self.weights


def _scene_sample(rng: random.Random, name: str, lead: str, tasks: dict[str, float], wanted: int) -> Sample:
    """Draw scenes until one can answer the leading task."""
    scene = random_scene(rng)
    while (first := _SCENE_ASKS[lead](rng, scene)) is None:
        scene = random_scene(rng)
    asks = _distinct(rng, lead, tasks, wanted, lambda task: _SCENE_ASKS[task](rng, scene), first)
    return Sample(name, scene.render(), [_word_it(rng, ask, scene) for ask in asks], scene)


def _distinct(
    rng: random.Random, lead: str, tasks: dict[str, float], wanted: int, ask: Callable[[str], _Ask | None],
    first: _Ask | None = None,
) -> list[_Ask]:  # fmt: skip
    """Up to `wanted` different questions, the leading task first; fewer where the picture has no more to ask."""
    asks = [first or ask(lead)]
    for _ in range(3 * wanted):
        if len(asks) >= wanted:
            break
        further = ask(rng.choices(list(tasks), list(tasks.values()))[0])
        if further is not None and (further.task, further.words) not in {(a.task, a.words) for a in asks}:
            asks.append(further)
    return asks


def to_record(sample: Sample, image_name: str | None) -> dict:
    """One jsonl row in InternVL's conversation format; `task`, `language` and `target` hold one entry per turn.

    `<image>` stands in the first human turn only; a sample without image has no image, width and height keys.

    Raises:
        ValueError: the sample has an image but no name was given for its file.
    """
    record: dict = {"id": sample.id}
    if sample.image is not None:
        if image_name is None:
            raise ValueError(f"sample {sample.id} has an image: image_name must name its file")
        record |= {"image": image_name, "width": sample.image.width, "height": sample.image.height}
    marker = "" if sample.image is None else "<image>\n"
    record["conversations"] = [
        {"from": speaker, "value": value}
        for place, turn in enumerate(sample.turns)
        for speaker, value in (("human", turn.question if place else marker + turn.question), ("gpt", turn.answer))
    ]
    for key in ("task", "language", "target"):
        record[key] = [getattr(turn, key) for turn in sample.turns]
    return record


def write_split(
    folder: str | Path, n: int, split: Split, seed: int = 0, weights: dict[str, float] | None = None,
    turns: tuple[int, int] = (2, 4),
) -> Path:  # fmt: skip
    """Write samples 0 to n-1 as `folder/images/*.png` and `folder/{split}.jsonl`; return the path of the jsonl.

    Image names in the rows are relative to `folder/images`, which is the `root` of the dataset's meta entry.
    """
    mixture, images = TaskMixture(split, seed, weights, turns), Path(folder, "images")
    images.mkdir(parents=True, exist_ok=True)
    path = Path(folder, f"{split}.jsonl")
    with path.open("w", encoding="utf-8") as rows:
        for index in range(n):
            sample, name = mixture[index], f"{split}-{seed}-{index:06d}.png"
            if sample.image is not None:
                sample.image.save(images / name)
            rows.write(json.dumps(to_record(sample, name), ensure_ascii=False) + "\n")
    return path
