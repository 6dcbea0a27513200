"""The tasks of InternVL-tiny as files: pictures and a jsonl, to try every command that takes training data.

Run: python -m internvl_hub.examples.internvl_tiny.export build/tiny-data [--rows 1000] [--split train]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...conversation import IMAGE_PLACEHOLDER
from .model import load_recipe
from .tasks import Sample, Split, TaskMixture

_SIDES = {"question": "human", "answer": "gpt"}


def export(folder: Path, rows: int, split: Split = "train", seed: int = 0, turns: tuple[int, int] = (2, 4)) -> Path:
    """Writes `rows` conversations in the recipe's last mixture of tasks.

    Args:
        folder: Gets `images/` and `SPLIT.jsonl`.
        rows: How many.
        split: Digits and words of which split.
        seed: Of the draw.
        turns: Fewest and most questions about a picture.

    Returns:
        The jsonl.
    """
    mixture = TaskMixture(split, seed, load_recipe()["stages"][-1]["weights"], turns)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in tqdm(range(rows), desc=f"Drawing {split}", unit=" rows"):
            file.write(json.dumps(_row(mixture[i], images, f"{split}-{i}.png"), ensure_ascii=False) + "\n")
    return path


def _row(sample: Sample, images: Path, name: str) -> dict[str, Any]:
    """A row of the original's format; the picture goes to its file."""
    conversations = [
        {"from": side, "value": getattr(turn, part)} for turn in sample.turns for part, side in _SIDES.items()
    ]
    if sample.image is None:
        return {"id": sample.id, "conversations": conversations}
    sample.image.save(images / name)
    conversations[0]["value"] = f"{IMAGE_PLACEHOLDER}\n{conversations[0]['value']}"
    return {"id": sample.id, "image": name, "conversations": conversations}


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--split", default="train", choices=("train", "val", "test"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(export(arguments.folder, arguments.rows, arguments.split, arguments.seed))


if __name__ == "__main__":
    main()
