"""Held-out accuracy of InternVL-tiny before and after quantization, with what is quantized and what is not.

The questions are those of `internvl_hub.examples.internvl_tiny.evaluate`, the answers greedy. Before and after see the
same questions, so the difference is that of the paired answers: its 95 % interval is taken over the questions that
only one of the two gets right. Goal: at most one point lost. `--also-vision` quantizes the vision encoder and the
projector too, to see what the default of this package is for. `--folder` compares folders that were compressed before
(`internvl quantize`) with the checkpoint that they were made from.

    python benchmarks/quantization_accuracy.py bnb-int8 bnb-nf4 torchao-int8
    python benchmarks/quantization_accuracy.py bnb-nf4 --samples 400 --also-vision
    python benchmarks/quantization_accuracy.py --folder build/tiny-gptq build/tiny-awq --samples 50

The methods need `pip install bitsandbytes` or `pip install torchao`, folders `pip install compressed-tensors`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

try:
    from internvl_hub.examples.internvl_tiny import evaluate
    from internvl_hub.examples.internvl_tiny.metrics import Row
    from internvl_hub.modeling_internvl_chat import InternVLChatModel
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

CHECKPOINT = Path(__file__).resolve().parents[1] / "checkpoints" / "internvl-tiny"
METHODS = ("bnb-int8", "bnb-nf4", "bnb-fp4", "torchao-int8", "torchao-int8-dynamic", "quanto-int8")
GOAL = 1.0  # points


def settings(method: str, also_vision: bool = False) -> Any:
    """A quantization configuration for `from_pretrained`; with `also_vision` the output head alone is left out."""
    from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

    kept = ["lm_head"] if also_vision else None
    if method.startswith("bnb-"):
        # Said in another spelling than the default list, which this package would extend.
        listed = {"llm_int8_skip_modules": ["language_model.lm_head"] if also_vision else None}
        if method == "bnb-int8":
            return BitsAndBytesConfig(load_in_8bit=True, **listed)
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=method.removeprefix("bnb-"), **listed)
    listed = {"modules_to_not_convert": ["language_model.lm_head"] if kept else None}
    if method == "quanto-int8":
        return QuantoConfig(weights="int8", **listed)
    from torchao import quantization

    kinds = {
        "torchao-int8": lambda: quantization.Int8WeightOnlyConfig(),
        "torchao-int8-dynamic": lambda: quantization.Int8DynamicActivationInt8WeightConfig(),
    }
    return TorchAoConfig(kinds[method](), **listed)


def quantized_linears(model: nn.Module) -> list[str]:
    """Names of the linear layers whose weights are no plain floating-point tensors, or are packed ones."""
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or hasattr(m, "in_features")]
    return [name for name, module in linears if _is_quantized(module)]


def _is_quantized(module: nn.Module) -> bool:
    if hasattr(module, "quantization_scheme"):  # of compressed-tensors, which unpacks at the first forward
        return True
    weight = module.weight
    plain = type(weight) in (torch.Tensor, nn.Parameter) and type(weight.data) is torch.Tensor
    return not plain or not weight.is_floating_point()


def unpack_odd_widths(model: nn.Module) -> int:
    """Turns off bitsandbytes' packed CPU kernel in 4-bit layers that it cannot pack; returns how many.

    Its packing wants widths that are a multiple of the 64 weights of a block. Those of the released models are, the
    160 of InternVL-tiny is not.
    """
    odd = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu") and m.in_features % 64]
    for module in odd:
        module.support_avx512bf16_for_cpu = False
    return len(odd)


def load(method: str, also_vision: bool = False) -> InternVLChatModel:
    """The tiny checkpoint, quantized by a method of `METHODS`; of any other name, the folder that it is."""
    if method not in METHODS:
        return InternVLChatModel.from_pretrained(method).eval()
    model = InternVLChatModel.from_pretrained(CHECKPOINT, quantization_config=settings(method, also_vision)).eval()
    unpack_odd_widths(model)
    return model


def compare(before: list[Row], after: list[Row]) -> tuple[float, float, int]:
    """Change of the accuracy in points, half the width of its 95 % interval, and the questions that changed sides."""
    pairs = [(correct(b), correct(a)) for b, a in zip(before, after, strict=True)]
    lost, won = pairs.count((True, False)), pairs.count((False, True))
    n = len(before)
    spread = math.sqrt(max(lost + won - (won - lost) ** 2 / n, 0.0)) / n  # McNemar's paired difference
    return 100 * (won - lost) / n, 196 * spread, won + lost


def correct(row: Row) -> bool:
    """An exact answer, or a box that overlaps the right one by at least a half."""
    return row.score >= 0.5


def accuracy(rows: list[Row]) -> float:
    """In percent."""
    return 100 * sum(map(correct, rows)) / len(rows)


def main() -> None:
    """Prints a line per method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=", ".join(METHODS))
    parser.add_argument("--folder", nargs="+", default=[], help="compressed before, from the same checkpoint")
    parser.add_argument("--samples", type=int, default=100, help="questions per task")
    parser.add_argument("--also-vision", action="store_true", help="quantize vision encoder and projector as well")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    if missing := [folder for folder in options.folder if not Path(folder, "config.json").is_file()]:
        parser.error(f"no checkpoint in {', '.join(missing)}")
    if not [*options.methods, *options.folder]:
        parser.error("name a method, or a --folder")
    model, processor = evaluate.load(CHECKPOINT)
    samples = list(evaluate.held_out("test", options.samples))
    before = evaluate.mark(model.eval(), processor, samples)
    print(f"n {len(before)}, float32: {accuracy(before):.1f} %", flush=True)
    for method in [*options.methods, *options.folder]:
        model = load(method, options.also_vision)
        names = quantized_linears(model)
        parts = {part: sum(name.startswith(part) for name in names) for part in ("vision_model", "mlp1", "language")}
        after = evaluate.mark(model, processor, samples)
        change, half, moved = compare(before, after)
        verdict = "within" if change >= -GOAL else "MORE THAN"
        print(
            f"{method}: {accuracy(after):.1f} %, change {change:+.2f} +- {half:.2f} points ({moved} answers changed "
            f"sides), {verdict} {GOAL:g} point lost; quantized layers {parts}",
            flush=True,
        )


if __name__ == "__main__":
    main()
