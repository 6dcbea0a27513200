"""N sampled answers to one question about an image: `batch_answers` against N calls of `chat`.

`batch_answers` encodes the image and computes the prompt once and then decodes all answers together; `chat` does all
of it for each. Random weights in the proportions of InternVL2.5-1B, by default a quarter of the layers of each tower;
7 tiles of 448 pixels (1792 visual tokens), 8 answers of 32 tokens. Both ways take turns in one run; greedily (where
all answers are one) they must give the same tokens. Time is CPU time of the process on a CPU, which a busy machine
distorts less, and wall time on a GPU. Goal: at least 3x.

    python benchmarks/shared_sampling.py
    python benchmarks/shared_sampling.py --full --device cuda --dtype bfloat16 --new-tokens 256
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    from internvl_hub.benchmarks._one_billion import (
        IMAGE_SIZE,
        LAYERS,
        add_model_options,
        build_model,
        build_tokenizer,
        layers_of,
        ratio,
        where,
    )
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

TILES, CHECKED_TOKENS = 7, 8
QUESTION = "<image>\n" + " ".join(f"w{i}" for i in range(100, 110))


def seconds(task: Callable[[], object], device: str) -> float:
    """Time of a task, which ends with ids on the CPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    task()
    return clock() - start


def report(times: dict[str, list[float]]) -> None:
    for name, values in times.items():
        print(f"{name:20} {statistics.median(values):8.2f} s   ({min(values):.2f}-{max(values):.2f})")
    print(f"chats / batch_answers {ratio(times['chats'], times['batch_answers'])}; goal >= 3x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser, rounds=3)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    layers = LAYERS if args.full else layers_of(args.layers_fraction)
    dtype = getattr(torch, args.dtype)
    model, tokenizer = build_model(layers, args.device, dtype), build_tokenizer()
    pixels = torch.randn(TILES, 3, IMAGE_SIZE, IMAGE_SIZE).to(device=args.device, dtype=dtype)
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": args.new_tokens, "min_new_tokens": args.new_tokens}
    several = {**options, "num_return_sequences": args.answers}
    ways = {
        "chats": lambda: [model.chat(tokenizer, pixels, QUESTION, options) for _ in range(args.answers)],
        "batch_answers": lambda: model.batch_answers(tokenizer, pixels, [QUESTION], several, [TILES]),
    }
    print(f"{layers} of {LAYERS} layers, {TILES} tiles, {args.answers} answers of {args.new_tokens} tokens, ", end="")
    print(f"{args.rounds} rounds, {args.dtype}, {where(args.device)}, torch {torch.__version__}")
    greedy = {"do_sample": False, "max_new_tokens": CHECKED_TOKENS}
    alone = model.chat(tokenizer, pixels, QUESTION, greedy)
    # Nearly greedy, so that the answers go the shared way and are one all the same.
    together = model.batch_answers(
        tokenizer, pixels, [QUESTION], {**greedy, "do_sample": True, "top_k": 1, "num_return_sequences": 2}, [TILES]
    )
    if {answer.text.strip() for answer in together[0]} != {alone}:
        sys.exit(f"shared {[answer.text for answer in together[0]]}, alone {alone!r}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            times[name].append(seconds(way, args.device))
    report(times)


if __name__ == "__main__":
    main()
