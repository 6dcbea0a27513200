"""Time of image preprocessing, 800x1300 to 7 tiles of 448, on one thread.

Compares, in interleaved rounds of one run: Pillow's two resizes alone (the floor of any exact pipeline), a
straightforward pipeline (Pillow tiles, each converted and normalised by itself), and the two backends of
`InternVLImageProcessor`. Goals: exact at most 1.2x the resizes, fast at least 3x faster than straightforward.
JPEG decoding is not included.

    python benchmarks/preprocessing.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

try:
    from internvl_hub.image_processing_internvl import NORMALIZATIONS, InternVLImageProcessor, dynamic_preprocess
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

WIDTH, HEIGHT, SIZE = 800, 1300, 448


def sample_image() -> Image.Image:
    """A photograph-like image: smooth colour, edges and some noise."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    noise = np.random.default_rng(0).integers(0, 24, (HEIGHT, WIDTH, 3))
    waves = 110 + 90 * np.stack([np.sin(x / 31 + y / 97), np.sin(y / 53), np.sin((x * y) / 9000)], axis=-1)
    return Image.fromarray(np.clip(waves + noise, 0, 255).astype(np.uint8))


def resizes_alone(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    return image.resize((2 * SIZE, 3 * SIZE)), image.resize((SIZE, SIZE))


def straightforward(image: Image.Image) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in NORMALIZATIONS["imagenet"])
    tiles = dynamic_preprocess(image, use_thumbnail=True)
    arrays = (torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous() for tile in tiles)
    return torch.stack([(array.float() / 255 - mean) / std for array in arrays])


def measure(tasks: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every task in every round; tasks take turns, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(rounds):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(1000 * (time.perf_counter() - start))
    return times


def ratio(times: dict[str, list[float]], above: str, below: str) -> str:
    ratios = [a / b for a, b in zip(times[above], times[below], strict=True)]
    middle = statistics.median(times[above]) / statistics.median(times[below])
    return f"{middle:.2f}x of medians ({min(ratios):.2f}-{max(ratios):.2f} per round)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    image, processor = sample_image(), InternVLImageProcessor()
    tasks: dict[str, Callable[[], object]] = {
        "resizes alone": lambda: resizes_alone(image),
        "straightforward": lambda: straightforward(image),
        "exact": lambda: processor(image),
        "fast": lambda: processor(image, exact=False),
    }
    times = measure(tasks, rounds)
    print(f"{WIDTH}x{HEIGHT} -> 7 tiles, one thread, {rounds} rounds, torch {torch.__version__}")
    for name, values in times.items():
        print(f"{name:16} {statistics.median(values):7.2f} ms   ({min(values):.2f}-{max(values):.2f})")
    print(f"exact / resizes alone   {ratio(times, 'exact', 'resizes alone')}; goal <= 1.2x")
    print(f"straightforward / fast  {ratio(times, 'straightforward', 'fast')}; goal >= 3x")
    exact, fast = (processor(image, exact=value, normalize_type="siglip")["pixel_values"] for value in (True, False))
    difference = (exact - fast).abs() * 127.5
    print(f"fast against exact      max {difference.max():.0f}/255, mean {difference.mean():.3f}/255")


if __name__ == "__main__":
    main()
