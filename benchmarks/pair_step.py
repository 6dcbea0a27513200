"""One step of preference optimisation on a pair about an image: the image encoded once against once per answer.

The original repeats the pixels for both answers, in policy and reference; `MPOTrainer` encodes them once in each. Both
ways are the same trainer on the same pair, with gradients of everything, and must give the same loss. Random weights
in the proportions of InternVL2.5-1B, by default a twelfth of the layers of each tower; 7 tiles of 448 pixels (1792
visual tokens), answers of 128 tokens. Time is CPU time of the process on a CPU, which a busy machine distorts less,
and wall time on a GPU. Goal: at least 1.3x.

    python benchmarks/pair_step.py
    python benchmarks/pair_step.py --full --device cuda --bf16
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

try:
    from internvl_hub.benchmarks._one_billion import IMAGE_SIZE, LAYERS, build_model, layers_of, ratio, where
    from internvl_hub.training.arguments import InternVLTrainingArguments
    from internvl_hub.training.mpo import MPOTrainer
    from internvl_hub.training.preference_collation import PreferenceCollator
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

QUESTION_TOKENS = 32
Batch = dict[str, Any]


def make_pair(tiles: int, answer_tokens: int, context: int, tokens_per_tile: int) -> dict[str, Any]:
    """Features of one pair with random text."""
    prompt = torch.cat(
        [torch.full((tiles * tokens_per_tile,), context), torch.randint(100, 150000, (QUESTION_TOKENS,))]
    )
    pair: dict[str, Any] = {"pixel_values": torch.randn(tiles, 3, IMAGE_SIZE, IMAGE_SIZE), "num_patches": [tiles]}
    for name in ("chosen", "rejected"):
        answer = torch.randint(100, 150000, (answer_tokens,))
        pair[f"{name}_input_ids"] = torch.cat([prompt, answer])
        pair[f"{name}_labels"] = torch.cat([torch.full_like(prompt, -100), answer])
    return pair


def encoded_twice(batch: Batch) -> Batch:
    """The same batch with the pixels of every place written out."""
    places = batch["tile_index"]
    return {**batch, "pixel_values": batch["pixel_values"][places], "tile_index": torch.arange(len(places))}


def step(trainer: MPOTrainer, batch: Batch) -> float:
    """Loss of one forward and backward pass."""
    trainer.model.zero_grad(set_to_none=True)
    inputs = trainer._prepare_inputs(dict(batch))
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item()


def seconds(task: Callable[[], object], device: str) -> float:
    """Time of a task that ends with a number on the CPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    task()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiles", type=int, default=7)
    parser.add_argument("--answer-tokens", type=int, default=128)
    parser.add_argument("--layers-fraction", type=float, default=1 / 12, help="share of the layers of both towers")
    parser.add_argument("--full", action="store_true", help="all layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 weights")
    args = parser.parse_args()
    layers = LAYERS if args.full else layers_of(args.layers_fraction)
    model = build_model(layers, args.device, torch.bfloat16 if args.bf16 else torch.float32)
    pair = make_pair(args.tiles, args.answer_tokens, model.config.img_context_token_id, model.num_image_token)
    with tempfile.TemporaryDirectory() as folder:
        arguments = InternVLTrainingArguments(folder, use_cpu=args.device == "cpu", report_to=[])
        trainer = MPOTrainer(model, arguments, data_collator=PreferenceCollator(0, IMAGE_SIZE))
        once = {name: value for name, value in trainer.data_collator([pair]).items() if not name.startswith("num_")}
        ways = {"twice": encoded_twice(once), "once": once}
        print(f"{layers} of {LAYERS} layers, {args.tiles} tiles, {args.rounds} rounds, {model.dtype}, ", end="")
        print(f"{where(args.device)}, torch {torch.__version__}")
        model.train()
        losses = {name: step(trainer, batch) for name, batch in ways.items()}
        if abs(losses["once"] - losses["twice"]) > (2e-2 if args.bf16 else 1e-4) * abs(losses["twice"]):
            sys.exit(f"the losses differ: {losses}")
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.rounds):
            for name, batch in ways.items():
                times[name].append(seconds(lambda batch=batch: step(trainer, batch), args.device))
    for name, values in times.items():
        print(f"{name:8} {statistics.median(values):8.2f} s   ({min(values):.2f}-{max(values):.2f})")
    print(f"twice / once {ratio(times['twice'], times['once'])}; goal >= 1.3x")


if __name__ == "__main__":
    main()
