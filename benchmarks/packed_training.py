"""Packed against padded training: supervised tokens a second on a realistic mix of lengths.

Run: python -m internvl_hub.benchmarks.packed_training [--rounds 5] [--full]

Rows have the lengths of an instruction mix (text, one picture, several, video) at one seventh of their size, so that a
CPU can train on them: a tile takes 36 tokens, a pack 2,304 tokens and 48 tiles. `--full` is the original scale (256,
16,384) in the proportions of a 1B model, for a GPU. All ways go over the same rows with the same model; a step is
forward, backward and update. Padded batches hold as many rows as a pack does on average, in random order or grouped by
length; "one mask" is packing as transformers does it on `sdpa`, for comparison.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..configuration_internvl_chat import InternVLChatConfig
from ..modeling_internvl_chat import InternVLChatModel
from ..training.batching import BatchPlanner
from ..training.collation import InternVLCollator
from ..training.packed_attention import attention_by_row
from ..training.packing import EpochPlanner

PAD, CONTEXT, VOCABULARY = 0, 1, 8192


@dataclass(frozen=True)
class Scale:
    """Sizes of tile, pack and model."""

    per_tile: int
    max_tokens: int
    image_size: int
    patch_size: int
    vision: tuple[int, int, int]  # width, layers, heads
    language: tuple[int, int, int]
    rows: int
    max_tiles: int = 48


SMALL = Scale(36, 2304, 84, 7, (96, 3, 3), (192, 4, 6), rows=64)
FULL = Scale(256, 16384, 448, 14, (1024, 24, 16), (896, 24, 14), rows=256)


def lengths(count: int, scale: Scale, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, tiles, supervised tokens) of rows: 30 % text, 50 % one picture, 12 % several, 8 % video."""
    generator, unit = np.random.default_rng(seed), scale.per_tile / 256
    kind = generator.choice(4, size=count, p=(0.30, 0.50, 0.12, 0.08))
    tiles = np.select(
        [kind == 0, kind == 1, kind == 2],
        [0, generator.choice([1, 3, 5, 7, 13], size=count, p=(0.25, 0.2, 0.2, 0.25, 0.1)),
         generator.integers(2, 13, size=count)],
        generator.integers(8, 33, size=count),
    )  # fmt: skip
    question = generator.lognormal(np.log(60), 0.7, size=count) * unit + 4
    median = np.select([kind == 0, kind == 1, kind == 2], [350, 90, 150], 120)
    answer = np.clip(generator.lognormal(np.log(median), 1.0, size=count), 2, 4000) * unit + 2
    supervised = np.maximum(answer.astype(int), 1)
    tokens = np.minimum(question.astype(int) + supervised + tiles * scale.per_tile, scale.max_tokens)
    return tokens, tiles, np.minimum(supervised, tokens - tiles * scale.per_tile - 1)


def make_rows(scale: Scale) -> list[dict[str, Any]]:
    """Rows as a data set returns them, of random ids and pixels."""
    generator, rows = torch.Generator().manual_seed(0), []
    for tokens, tiles, supervised in zip(*(part.tolist() for part in lengths(scale.rows, scale)), strict=True):
        text = torch.randint(2, VOCABULARY, (tokens - tiles * scale.per_tile,), generator=generator)
        ids = torch.cat([torch.full((tiles * scale.per_tile,), CONTEXT), text])
        labels = torch.where(torch.arange(tokens) >= tokens - supervised, ids, -100)
        shape = (tiles, 3, scale.image_size, scale.image_size)
        pixels = torch.randn(shape, generator=generator) if tiles else None
        rows.append({"input_ids": ids, "labels": labels, "pixel_values": pixels, "num_patches": [tiles] * bool(tiles)})
    return rows


def make_model(scale: Scale, device: str, dtype: torch.dtype) -> InternVLChatModel:
    """Random weights."""
    (width, layers, heads), (llm_width, llm_layers, llm_heads) = scale.vision, scale.language
    vision = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "qkv_bias": True,
              "intermediate_size": 4 * width, "image_size": scale.image_size, "patch_size": scale.patch_size,
              "norm_type": "layer_norm", "qk_normalization": False}  # fmt: skip
    text = {"architectures": ["Qwen2ForCausalLM"], "hidden_size": llm_width, "num_hidden_layers": llm_layers,
            "num_attention_heads": llm_heads, "num_key_value_heads": 2, "intermediate_size": 5 * llm_width,
            "vocab_size": VOCABULARY, "max_position_embeddings": scale.max_tokens}  # fmt: skip
    torch.manual_seed(0)
    config = InternVLChatConfig(vision_config=vision, llm_config=text, ps_version="v2", img_context_token_id=CONTEXT)
    return InternVLChatModel(config).to(device, dtype).train()


def make_batches(rows: Sequence[dict[str, Any]], scale: Scale) -> dict[str, list[list[dict[str, Any]]]]:
    """The rows of every batch of one epoch, by way."""
    tokens = np.array([len(row["input_ids"]) for row in rows])
    tiles = np.array([sum(row["num_patches"]) for row in rows])
    packs = EpochPlanner(tokens, tiles, scale.max_tokens, scale.max_tiles, seed=0)
    size = max(1, round(len(rows) / len(packs)))
    plans = {
        "packed": packs,
        "packed, one mask": packs,
        "padded": BatchPlanner(tokens, size, seed=0),
        "padded, grouped": BatchPlanner(tokens, size, seed=0, group=True, multiple=8),
    }
    return {name: [[rows[i] for i in batch] for batch in plan.packs(0)] for name, plan in plans.items()}


def time_epoch(
    model: InternVLChatModel, optimizer: torch.optim.Optimizer, batches: list[Any], packing: bool, scale: Scale
) -> tuple[float, int]:
    """Seconds of an epoch, collation left out, and its supervised tokens."""
    collator = InternVLCollator(PAD, scale.image_size, "square", packing)
    device, dtype = model.device, model.dtype
    # On a shared machine the processor time of one thread says more than the clock on the wall.
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds, supervised = 0.0, 0
    for rows in batches:
        batch = {k: v for k, v in collator(rows).items() if not k.startswith("num_")}
        supervised += int((batch["labels"] != -100).sum())
        batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        _synchronise(device)
        start = clock()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _synchronise(device)
        seconds += clock() - start
    return seconds, supervised


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(scale: Scale, rounds: int, device: str, dtype: torch.dtype) -> Iterator[dict[str, float]]:
    """Supervised tokens a second of every way, round by round."""
    model, rows = make_model(scale, device, dtype), make_rows(scale)
    optimizer, ways = torch.optim.SGD(model.parameters(), lr=1e-4), make_batches(rows, scale)
    for name, batches in ways.items():
        tokens = sum(len(row["input_ids"]) for batch in batches for row in batch)
        padded = sum(len(batch) * max(len(row["input_ids"]) for row in batch) for batch in batches if batch)
        room = len(batches) * scale.max_tokens if name.startswith("packed") else padded
        print(f"{name}: {len(batches)} batches, {tokens / room:.1%} of their room is tokens")
    for number in range(rounds + 1):
        result = {}
        for name, batches in ways.items():
            with attention_by_row(model.language_model) if name == "packed" else nullcontext():
                seconds, supervised = time_epoch(model, optimizer, batches, name.startswith("packed"), scale)
            result[name] = supervised / seconds
        if number:  # the first round warms up
            yield result


def main() -> None:
    """Prints rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--full", action="store_true", help="the original scale, in bfloat16 on a GPU")
    options = parser.parse_args()
    scale = FULL if options.full else SMALL
    device, dtype = ("cuda", torch.bfloat16) if options.full else ("cpu", torch.float32)
    found = list(rates(scale, options.rounds, device, dtype))
    for name in found[0]:
        values = [result[name] for result in found]
        ratios = [result["packed"] / result[name] for result in found]
        print(
            f"{name}: {statistics.median(values):.0f} supervised tokens/s ({min(values):.0f}-{max(values):.0f}); "
            f"packed is {statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
