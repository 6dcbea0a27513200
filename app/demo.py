"""Demo: publish the tiny checkpoint into a folder, load it as any Hub repository, and ask it about images.

Run: python -m internvl_hub.app.demo
     python -m internvl_hub.app.demo --image photo.png --question "What number is written?"

It prints every question with its answer and saves a picture of the images with their answers.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..evaluation.boxes import Box, box_iou, parse_boxes
from ..upload_to_hub import gather

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "checkpoints" / "internvl-tiny"
EXAMPLES = ROOT / "examples" / "images"
BUILD = Path("build")


@dataclass
class Turn:
    """A question, its right answer where known, and what the model said."""

    question: str
    expected: str | None = None
    answer: str = ""

    @property
    def overlap(self) -> float | None:
        """Overlap of the answer's box with the right one; None where no box is asked for."""
        wanted = find_box(self.expected or "")
        if wanted is None:
            return None
        found = find_box(self.answer)
        return 0.0 if found is None else box_iou(found, wanted)

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is right (a box: overlap of at least a half); None where that is not known."""
        if self.expected is None:
            return None
        return self.answer == self.expected if self.overlap is None else self.overlap >= 0.5

    @property
    def mark(self) -> str:
        """`right` or `WRONG`, for a box with the overlap; empty where the right answer is not known."""
        if self.is_right is None:
            return ""
        overlap = "" if self.overlap is None else f" (IoU {self.overlap:.2f})"
        return ("right" if self.is_right else "WRONG") + overlap


@dataclass
class Example:
    """An image with the conversation about it."""

    path: Path
    turns: list[Turn] = field(default_factory=list)


def find_box(text: str) -> Box | None:
    """The first box of an answer, in thousandths of the image's sides."""
    return next(iter(parse_boxes(text)), None)


def read_examples(folder: Path) -> list[Example]:
    """The bundled images and questions."""
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [Example(folder / row["image"], [Turn(*turn) for turn in row["turns"]]) for row in rows]


def load(folder: Path) -> tuple[Any, Any]:
    """Model and processor, through transformers' Auto classes and the code in the folder alone."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def ask(model: Any, processor: Any, example: Example) -> None:
    """Runs a conversation about one image; later turns reuse what the first has computed."""
    tiles = processor.image_processor([str(example.path)])
    session, history = model.new_session(), None
    for turn in example.turns:
        turn.answer, history = model.chat(
            processor.tokenizer,
            tiles["pixel_values"],
            turn.question,
            {"max_new_tokens": 64, "do_sample": False},
            history=history,
            return_history=True,
            num_patches_list=tiles["num_patches"].tolist(),
            keep_markup=True,
            session=session,
        )


def draw(examples: Sequence[Example], path: Path, width: int = 460) -> Path:
    """Saves one picture: each image with its questions and answers beside it, boxes drawn in."""
    rows = [_draw_row(example, width) for example in examples]
    columns = 2
    heights = [max(row.height for row in rows[i : i + columns]) for i in range(0, len(rows), columns)]
    sheet = Image.new("RGB", (columns * rows[0].width, sum(heights)), "white")
    top = 0
    for i, height in zip(range(0, len(rows), columns), heights, strict=True):
        for column, row in enumerate(rows[i : i + columns]):
            sheet.paste(row, (column * row.width, top))
        top += height
    sheet.save(path)
    return path


def _draw_row(example: Example, text_width: int, side: int = 240, margin: int = 14) -> Image.Image:
    image = Image.open(example.path).convert("RGB")
    scale = side / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.LANCZOS)
    pen = ImageDraw.Draw(image)
    for box in filter(None, (find_box(turn.answer) for turn in example.turns)):
        corners = [v * s / 1000 for v, s in zip(box, (image.width, image.height) * 2, strict=True)]
        pen.rectangle(corners, outline="magenta", width=3)
    lines = [line for turn in example.turns for line in _lines(turn)]
    height = max(image.height, 22 * len(lines)) + 2 * margin
    row = Image.new("RGB", (side + text_width + 3 * margin, height), "white")
    row.paste(image, (margin + (side - image.width) // 2, (height - image.height) // 2))
    pen = ImageDraw.Draw(row)
    for i, (text, colour) in enumerate(lines):
        font = ImageFont.load_default(16)
        pen.text((side + 2 * margin, margin + 22 * i), text, fill=colour, font=font)
    return row


def _lines(turn: Turn) -> list[tuple[str, str]]:
    answer = re.sub(r"</?(ref|box)>", "", turn.answer)
    colour = "firebrick" if turn.is_right is False else "darkgreen"
    return [(f"Q  {_printable(turn.question)}", "black"), (f"A  {_printable(answer)}   {turn.mark}", colour)]


def _printable(text: str) -> str:
    """Pillow's own font has no Chinese: such text stands in the terminal only."""
    text = re.sub(r"</?ref>", "", text)
    return text if text.isascii() else "(Chinese text, see the terminal)"


def build_parser() -> argparse.ArgumentParser:
    """Command-line options."""
    parser = argparse.ArgumentParser(prog="python -m internvl_hub.app.demo", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, help="folder of a checkpoint (default: the tiny one)"
    )
    parser.add_argument(
        "--build", type=Path, default=BUILD, help="where to gather it and save the picture (default: build)"
    )
    parser.add_argument("--image", type=Path, help="ask about this image instead of the bundled ones")
    parser.add_argument("--question", action="append", default=[], help="with --image; may be repeated")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if (options.image is None) != (not options.question):
        parser.error("--image and --question go together")
    folder = (
        options.build / "internvl-tiny"
        if options.checkpoint == CHECKPOINT
        else options.build / options.checkpoint.name
    )
    files = gather(options.checkpoint, folder, overwrite=True)
    print(f"Gathered {len(files)} files into {folder}; loading it with trust_remote_code=True.")
    model, processor = load(folder)
    if options.image is not None:
        examples = [Example(options.image, [Turn(question) for question in options.question])]
    else:
        examples = read_examples(EXAMPLES)
    for example in examples:
        ask(model, processor, example)
        print(f"\n{example.path.name}")
        for turn in example.turns:
            print(f"  Q: {turn.question}\n  A: {turn.answer}   {turn.mark}")
    print(f"\nSaved {draw(examples, options.build / 'demo.png')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
