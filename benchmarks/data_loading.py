"""Rows of a training data set to model inputs, per core, against the plain way: Pillow tile by tile, then torch.

Rows have one photograph each (JPEG, 800x1300, 1920x1080 and 640x480, cut from the two that scikit-learn bundles), a
question and an answer of some words; a picture becomes up to 12 tiles of 448 pixels and a thumbnail. The plain way is
the original's `dynamic_preprocess`, `build_transform` without augmentation and `preprocess_internvl2_5` written as
they read. Both decode the JPEG with Pillow, which no way of tiling makes faster: its share is printed, and the ratio
without it. Rows are taken one by one on one thread, and the ways take turns; what is measured is processor time, which
other work on a busy machine disturbs less than the clock on the wall.
Goals with decoding: exact at least 1.05x, fast (`exact=False`) at least 2x the rows a second of the plain way.

    python benchmarks/data_loading.py
    python benchmarks/data_loading.py --rounds 30
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers import PreTrainedTokenizerFast

try:
    from internvl_hub.configuration_internvl_chat import InternVLChatConfig
    from internvl_hub.data.dataset import ConversationDataset
    from internvl_hub.data.records import RecordFile
    from internvl_hub.image_processing_internvl import NORMALIZATIONS, InternVLImageProcessor
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

SIZE, MAX_TILES, TOKENS_PER_TILE = 448, 12, 256
SIZES = ((800, 1300), (1920, 1080), (640, 480))
GOALS = {"exact": 1.05, "fast": 2.0}
QUESTION = "<image>\nWhat can be seen in this picture, and how do its parts lie to one another?"
ANSWER = "A quiet place with clear colours. In front there is a large shape, behind it several small ones. " * 4
TOKENIZER = Path(__file__).resolve().parents[1] / "checkpoints" / "internvl-tiny"


def write_rows(folder: Path) -> Path:
    """Photographs of every size, as cameras store them (quality 90), and their annotation file."""
    rows = []
    for width, height in SIZES:
        for name in ("china.jpg", "flower.jpg"):
            photograph = Image.fromarray(load_sample_image(name))
            scale = max(width / photograph.width, height / photograph.height)
            enlarged = photograph.resize((round(photograph.width * scale), round(photograph.height * scale)))
            left, top = (enlarged.width - width) // 2, (enlarged.height - height) // 2
            path = folder / f"{width}x{height}-{name}"
            enlarged.crop((left, top, left + width, top + height)).save(path, quality=90)
            turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
            rows.append({"image": path.name, "conversations": turns})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- the plain way ---------------------------------------------------------------------------------------------------


def closest_ratio(width: int, height: int) -> tuple[int, int]:
    """Columns and rows, as the original searches them for every picture."""
    grids = {(i, j) for n in range(1, MAX_TILES + 1) for i in range(1, n + 1) for j in range(1, n + 1)
             if i * j <= MAX_TILES}  # fmt: skip
    best, least = (1, 1), float("inf")
    for grid in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - grid[0] / grid[1])
        if difference < least:
            best, least = grid, difference
        elif difference == least and width * height > 0.5 * SIZE * SIZE * grid[0] * grid[1]:
            best = grid
    return best


def plain_tiles(image: Image.Image) -> list[Image.Image]:
    columns, rows = closest_ratio(*image.size)
    canvas = image.resize((columns * SIZE, rows * SIZE))  # bicubic, Pillow's default
    tiles = []
    for i in range(columns * rows):
        left, top = i % columns * SIZE, i // columns * SIZE
        tiles.append(canvas.crop((left, top, left + SIZE, top + SIZE)))
    return [*tiles, image.resize((SIZE, SIZE))] if len(tiles) > 1 else tiles


def plain_tensor(tile: Image.Image) -> torch.Tensor:
    """What torchvision's Resize, ToTensor and Normalize do."""
    mean, std = (torch.tensor(values)[:, None, None] for values in NORMALIZATIONS["imagenet"])
    tile = tile.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(tile, copy=True)).permute(2, 0, 1).contiguous()
    return pixels.float().div(255).sub_(mean).div_(std)


def plain_tokens(turns: list[dict[str, str]], tiles: int, tokenizer: Any, system: str) -> dict[str, torch.Tensor]:
    """Turn by turn; labels are the answers and their end token."""
    visual = f"<img>{'<IMG_CONTEXT>' * (TOKENS_PER_TILE * tiles)}</img>"
    ids: list[int] = []
    labels: list[int] = []
    for speaker, text in [("system", system), *((turn["from"], turn["value"]) for turn in turns)]:
        role = {"system": "system", "human": "user", "gpt": "assistant"}[speaker]
        body = text.replace("<image>", visual) if speaker == "human" else text
        part = tokenizer(f"<|im_start|>{role}\n{body}<|im_end|>\n")["input_ids"]
        head = len(tokenizer(f"<|im_start|>{role}\n")["input_ids"])
        ids += part
        labels += [-100] * head + part[head:-1] + [-100] if speaker == "gpt" else [-100] * len(part)
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def plain_row(line: str, folder: Path, tokenizer: Any, system: str) -> dict[str, Any]:
    row = json.loads(line)
    image = Image.open(folder / row["image"]).convert("RGB")
    tiles = [plain_tensor(tile) for tile in plain_tiles(image)]
    return {**plain_tokens(row["conversations"], len(tiles), tokenizer, system), "pixel_values": torch.stack(tiles)}


# --- comparison ------------------------------------------------------------------------------------------------------


def make_ways(path: Path) -> dict[str, Callable[[int], Any]]:
    """A function of the row for each way, and for decoding alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(TOKENIZER, model_max_length=8192)
    config = InternVLChatConfig(
        vision_config={"image_size": SIZE, "patch_size": 14},
        llm_config={"architectures": ["Qwen2ForCausalLM"]},
        force_image_size=SIZE,
        template="internvl2_5",
        system_message="You are a helpful assistant.",
        img_context_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    datasets = {
        name: ConversationDataset(RecordFile(path, path.parent), tokenizer,
                                  InternVLImageProcessor(max_dynamic_patch=MAX_TILES, exact=name == "exact"), config)
        for name in GOALS
    }  # fmt: skip
    lines = path.read_text().splitlines()
    images = [path.parent / json.loads(line)["image"] for line in lines]
    return {
        "decoding alone": lambda row: Image.open(images[row]).convert("RGB"),
        "plain": lambda row: plain_row(lines[row], path.parent, tokenizer, config.system_message),
        **{name: dataset.__getitem__ for name, dataset in datasets.items()},
    }


def check(ways: dict[str, Callable[[int], Any]], rows: int) -> tuple[int, float]:
    """Exact must equal the plain way; returns all tiles, and how far fast is off at most, in 255ths."""
    std = torch.tensor(NORMALIZATIONS["imagenet"][1])[:, None, None]
    tiles, off = 0, 0.0
    for row in range(rows):
        plain, exact, fast = (ways[name](row) for name in ("plain", "exact", "fast"))
        if not all(torch.equal(plain[key], exact[key]) for key in ("input_ids", "labels", "pixel_values")):
            sys.exit(f"row {row}: the exact path and the plain way differ")
        tiles += len(plain["pixel_values"])
        off = max(off, float(((fast["pixel_values"] - exact["pixel_values"]) * std * 255).abs().max()))
    return tiles, off


def measure(ways: dict[str, Callable[[int], Any]], rows: int, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of processor time (rounds, rows) of every way; they take turns, in an order that rotates."""
    times = {name: np.zeros((rounds, rows)) for name in ways}
    names = list(ways)
    for turn in range(rounds):
        for row in range(rows):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                start = time.process_time()
                ways[name](row)
                times[name][turn, row] = 1000 * (time.process_time() - start)
    return times


def report(times: dict[str, np.ndarray], tiles: int, off: float) -> None:
    per_round = {name: values.mean(axis=1) for name, values in times.items()}
    decoding = per_round["decoding alone"]
    print(
        f"{times['plain'].shape[1]} rows, {tiles} tiles, one thread, {len(decoding)} rounds, torch {torch.__version__}"
    )
    for name, values in per_round.items():
        share = f"  decoding {statistics.median(decoding / values):.0%}" if name != "decoding alone" else ""
        print(f"{name:15} {np.median(values):7.2f} ms a row   ({values.min():.2f}-{values.max():.2f}){share}")
    for name, goal in GOALS.items():
        ratios = per_round["plain"] / per_round[name]
        least = times["plain"].min(axis=0).sum() / times[name].min(axis=0).sum()
        tiling = np.median((per_round["plain"] - decoding) / (per_round[name] - decoding))
        print(f"plain / {name:6} {np.median(ratios):.2f}x, median of rounds ({ratios.min():.2f}-{ratios.max():.2f}); "
              f"{least:.2f}x of best times; {tiling:.2f}x without decoding; goal >= {goal}x")  # fmt: skip
    for (width, height), start in zip(SIZES, range(0, 2 * len(SIZES), 2), strict=True):
        chosen = {name: np.median(values[:, start : start + 2]) for name, values in times.items()}
        found = ", ".join(f"{name} {chosen['plain'] / chosen[name]:.2f}x" for name in GOALS)
        print(f"  {width}x{height}: {found}, decoding {chosen['decoding alone'] / chosen['plain']:.0%} of plain")
    print(f"exact equals the plain way to the bit; fast is off by at most {off:.0f}/255")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ways = make_ways(write_rows(Path(folder)))
        rows = 2 * len(SIZES)
        tiles, off = check(ways, rows)
        report(measure(ways, rows, rounds), tiles, off)


if __name__ == "__main__":
    main()
