"""Peak memory of one training step: supervised rows through the head in chunks, against full logits.

One subprocess per case, and several rounds of all cases. The figure is the peak during forward and backward above what
weights and optimiser state take: a first step on a few tokens creates that state, its gradients are freed (`Trainer`
does so too, hence gradients count), and the peak is reset. On the CPU it is the resident memory of the process (Linux:
`VmHWM`, reset through `/proc/self/clear_refs`), on a GPU that of PyTorch's allocator.

The language model has the width and vocabulary of InternVL2.5-1B (896, 151674) and 2 of its 24 layers, with gradient
checkpointing as in the recipes, so that the head decides the peak, as it does in training at that size; batch of one
row of 4096 tokens, no image. Goal: at most 0.5x. Time is shown because the chunks' logits are computed twice: wall
time, and the CPU time of the process, which a busy machine distorts less.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --device cuda --dtype bfloat16
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

try:
    from internvl_hub.configuration_internvl_chat import InternVLChatConfig
    from internvl_hub.modeling_internvl_chat import InternVLChatModel
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

VOCAB_SIZE, WIDTH, MIB = 151674, 896, 2**20
HEADS = ("full logits", "chunked")
SHARES = (0.25, 1.0)
Case = tuple[float, str]


def build_model(layers: int, device: str, dtype: torch.dtype) -> InternVLChatModel:
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "num_hidden_layers": 1}
    language = {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": WIDTH, "intermediate_size": 4864,
        "num_attention_heads": 14, "num_key_value_heads": 2, "num_hidden_layers": layers, "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    torch.manual_seed(0)
    model = InternVLChatModel(InternVLChatConfig(vision_config=vision, llm_config=language))
    model.gradient_checkpointing_enable()
    return model.to(device=device, dtype=dtype).train()


def resident(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak) of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return 1024 * int(found[1])


def memory_now(device: str) -> int:
    """Bytes in use; forgets the peak."""
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def memory_peak(device: str) -> int:
    if device == "cpu":
        return resident("VmHWM")
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def step(model: InternVLChatModel, tokens: int, supervised: float, output_logits: bool, device: str) -> float:
    """Forward and backward of one row whose last tokens are supervised; returns the loss."""
    ids = torch.randint(1000, VOCAB_SIZE, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    labels = ids.clone()
    labels[:, : tokens - round(tokens * supervised)] = -100
    loss = model(input_ids=ids, labels=labels, output_logits=output_logits).loss
    loss.backward()
    return loss.item()


def run_case(args: argparse.Namespace) -> dict[str, float]:
    """Measures one case in this process."""
    full = args.case == "full logits"
    model = build_model(args.layers, args.device, getattr(torch, args.dtype))
    optimizer = torch.optim.AdamW(model.language_model.parameters(), lr=1e-6)
    step(model, 16, 1.0, full, args.device)
    optimizer.step()
    optimizer.zero_grad()
    before, clocks = memory_now(args.device), (time.perf_counter(), time.process_time())
    loss = step(model, args.tokens, args.supervised, full, args.device)
    peak, seconds, cpu = memory_peak(args.device), time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    norm = model.get_output_embeddings().weight.grad.float().norm().item()
    memory = {"memory": (peak - before) / MIB, "base": before / MIB}
    return {**memory, "seconds": seconds, "cpu": cpu, "loss": loss, "norm": norm}


def start_case(args: argparse.Namespace, share: float, head: str) -> dict[str, float]:
    """Runs one case in a process of its own."""
    command = [sys.executable, __file__, "--case", head, "--supervised", str(share), "--device", args.device]
    command += ["--dtype", args.dtype, "--tokens", str(args.tokens), "--layers", str(args.layers)]
    # Large blocks go back to the system as soon as they are freed, so that resident memory is memory in use.
    environment = {"PYTHONWARNINGS": "ignore", **os.environ, "MALLOC_MMAP_THRESHOLD_": str(MIB)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def check_same(results: dict[Case, list[dict[str, float]]], dtype: str) -> None:
    """Exits unless both heads gave the same loss and gradient."""
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for share in SHARES:
        full, chunked = (results[share, head][0] for head in HEADS)
        for name in ("loss", "norm"):
            if abs(full[name] - chunked[name]) > tolerance * abs(full[name]):
                sys.exit(f"{name} differs at {share:.0%}: full logits {full[name]}, chunked {chunked[name]}")
    print("loss and gradient norm of the head agree")


def ratio(results: dict[Case, list[dict[str, float]]], share: float, name: str) -> str:
    full, chunked = ([run[name] for run in results[share, head]] for head in HEADS)
    ratios = [a / b for a, b in zip(chunked, full, strict=True)]
    return f"{statistics.median(chunked) / statistics.median(full):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})"


def report(results: dict[Case, list[dict[str, float]]]) -> None:
    print("supervised  head         peak above MiB      wall s       CPU s")
    for (share, head), runs in results.items():
        values = {name: [run[name] for run in runs] for name in ("memory", "seconds", "cpu")}
        memory, seconds, cpu = (statistics.median(values[name]) for name in values)
        print(f"{share:10.0%}  {head:12} {memory:14.0f} {seconds:11.2f} {cpu:11.2f}")
    for share in SHARES:
        print(f"chunked / full at {share:4.0%}: memory {ratio(results, share, 'memory')}, goal <= 0.5x; ", end="")
        print(f"wall {ratio(results, share, 'seconds')}, CPU {ratio(results, share, 'cpu')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--case", choices=HEADS, help=argparse.SUPPRESS)
    parser.add_argument("--supervised", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(run_case(args)))
        return
    cases = [(share, head) for share in SHARES for head in HEADS]
    results: dict[Case, list[dict[str, float]]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case in cases:
            results[case].append(start_case(args, *case))
            print(f"{case[0]:.0%}, {case[1]}: {results[case][-1]}", file=sys.stderr)
    base = results[cases[0]][0]["base"]
    print(f"{args.tokens} tokens, vocabulary {VOCAB_SIZE}, {args.layers} layers, {args.dtype} on {args.device}")
    print(f"{args.rounds} rounds, torch {torch.__version__}; before the step {base:.0f} MiB")
    report(results)
    check_same(results, args.dtype)


if __name__ == "__main__":
    main()
