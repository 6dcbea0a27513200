"""Picks the example images that the demo asks about: the first test-split samples of each kind, none chosen by hand.

Run: python -m internvl_hub.examples.internvl_tiny.bundle
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from .drawing import WORDS
from .tasks import Sample, TaskMixture

FOLDER = Path(__file__).resolve().parents[1] / "images"
SEED = 2024
_SCENE = {"color": 1.0, "shape": 1.0, "count": 1.0, "count_color": 1.0, "exists": 1.0, "pointing": 1.0}
# name -> (task weights, turns, what the sample must be like)
WISHES: dict[str, tuple[dict[str, float], int, Callable[[Sample], bool]]] = {
    "number_4_wide": ({"numbers": 1.0}, 1, lambda s: _english(s) and _number(s, 4) and s.image.width > s.image.height),
    "number_6_wide": ({"numbers": 1.0}, 1, lambda s: not _english(s) and _number(s, 6) and s.image.width > 128),
    "number_3_tall": ({"numbers": 1.0}, 1, lambda s: _english(s) and _number(s, 3) and s.image.width < s.image.height),
    "word": ({"words": 1.0}, 1, lambda s: _english(s) and s.turns[0].answer in WORDS),
    "shapes": (_SCENE, 4, lambda s: _english(s) and {"pointing", "count"} <= {turn.task for turn in s.turns}),
    "shapes_chinese": (_SCENE, 3, lambda s: all(turn.language == "zh" for turn in s.turns)),
}


def _english(sample: Sample) -> bool:
    return all(turn.language == "en" for turn in sample.turns)


def _number(sample: Sample, digits: int) -> bool:
    return len(sample.turns[0].answer) == digits


def find(weights: dict[str, float], turns: int, wish: Callable[[Sample], bool]) -> Sample:
    """The first sample of the test split that fits a wish."""
    mixture = TaskMixture("test", SEED, weights, (turns, turns))
    return next(sample for sample in map(mixture.__getitem__, range(100_000)) if wish(sample))


def write_bundle(folder: Path = FOLDER) -> Path:
    """Writes the images and `questions.json`: per image its file name and [question, right answer] pairs."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, wish in WISHES.items():
        sample = find(*wish)
        sample.image.save(folder / f"{name}.png")
        rows.append({"image": f"{name}.png", "turns": [[turn.question, turn.answer] for turn in sample.turns]})
    path = folder / "questions.json"
    path.write_text(json.dumps(rows, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    print(write_bundle())
