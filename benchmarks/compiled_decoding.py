"""Time per token of greedy decoding after an image: eager, with a static cache, and compiled with a static cache.

Compilation is transformers' own (`cache_implementation="static"` with a `CompileConfig`): on a GPU it happens by
itself with a static cache, on a CPU only where asked for. Each round times every way once, in turn, for a short and a
long answer; the difference of the two is decoding alone, without the prompt. All must give the same tokens. The first
compiled answer, which compiles, is reported apart.

    python benchmarks/compiled_decoding.py                        # InternVL-tiny
    python benchmarks/compiled_decoding.py --layers-fraction 0.1  # random weights in the proportions of InternVL2.5-1B
    python benchmarks/compiled_decoding.py --layers-fraction 1 --device cuda --dtype bfloat16
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import CompileConfig

try:
    from internvl_hub.benchmarks._one_billion import IMAGE_SIZE, build_model, layers_of, where
    from internvl_hub.examples.internvl_tiny import evaluate
    from internvl_hub.modeling_internvl_chat import InternVLChatModel
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "internvl-tiny"
SHORT = 2  # tokens


def compilation() -> CompileConfig:
    """One graph per step, also on a CPU."""
    config = CompileConfig(fullgraph=True, dynamic=False, mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators only without it
    return config


def ways() -> dict[str, dict[str, Any]]:
    """Options of `generate` by name."""
    static = {"cache_implementation": "static"}
    return {
        "eager": {"disable_compile": True},
        "eager, static cache": {**static, "disable_compile": True},
        "compiled, static cache": {**static, "compile_config": compilation()},
    }


class Question:
    """A prompt of one tile, and how long its answers may be."""

    def __init__(self, model: InternVLChatModel, length: int, device: str, dtype: torch.dtype) -> None:
        size, tokens = model.config.image_size, model.num_image_token
        context, vocabulary = model.config.img_context_token_id, model.config.llm_config.vocab_size
        text = torch.arange(100, 132) % vocabulary
        ids = torch.cat([torch.full((tokens,), context), text])[None].to(device)
        pixels = torch.linspace(-1, 1, 3 * size * size).sin().view(1, 3, size, size).to(device, dtype)
        self.model, self.length = model, length
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        # One length for all, so that every answer fits the one compiled graph.
        self.capacity = ids.shape[1] + length

    def ask(self, new_tokens: int, options: dict[str, Any]) -> tuple[float, torch.Tensor]:
        """Seconds and ids of a greedy answer of exactly so many tokens."""
        size = {"max_cache_len": self.capacity} if "cache_implementation" in options else {}
        start = time.perf_counter()
        ids = self.model.generate(
            **self.inputs, **options, **size, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False
        ).cpu()
        return time.perf_counter() - start, ids

    def per_token(self, options: dict[str, Any]) -> float:
        """Seconds of one decoding step."""
        short, _ = self.ask(SHORT, options)
        return (self.ask(self.length, options)[0] - short) / (self.length - SHORT)


def measure(question: Question, rounds: int) -> dict[str, list[float]]:
    """Seconds per token of every round, after each way answered once; exits where the tokens differ."""
    expected = None
    for name, options in ways().items():
        seconds, ids = question.ask(question.length, options)
        expected = ids if expected is None else expected
        print(f"first answer, {name:23} {seconds:6.1f} s")
        if not torch.equal(ids, expected):
            sys.exit(f"{name} gives other tokens than eager decoding")
    times: dict[str, list[float]] = {name: [] for name in ways()}
    for _ in range(rounds):
        for name, options in ways().items():
            times[name].append(question.per_token(options))
    return times


def report(times: dict[str, list[float]]) -> None:
    """A line per way: milliseconds per token, and eager decoding's time over it."""
    eager = times["eager"]
    for name, values in times.items():
        ratios = sorted(a / b for a, b in zip(eager, values, strict=True))
        print(
            f"{name:23} {1000 * statistics.median(values):7.2f} ms a token "
            f"({1000 * min(values):.2f}-{1000 * max(values):.2f}), eager / this {statistics.median(ratios):.2f}x "
            f"({ratios[0]:.2f}-{ratios[-1]:.2f} per round)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers-fraction", type=float, help=f"random weights, tiles of {IMAGE_SIZE} px")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=32, help="of the long answer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    if args.layers_fraction is None:
        model, what = evaluate.load(CHECKPOINT)[0].to(args.device, dtype).eval(), "InternVL-tiny"
    else:
        layers = layers_of(args.layers_fraction)
        model, what = build_model(layers, args.device, dtype), f"{layers} layers as in InternVL2.5-1B"
    question = Question(model, args.tokens, args.device, dtype)
    print(f"{what}, {args.tokens} tokens, {args.rounds} rounds, {args.dtype}, {where(args.device)}, ", end="")
    print(f"torch {torch.__version__}", flush=True)
    report(measure(question, args.rounds))


if __name__ == "__main__":
    main()
