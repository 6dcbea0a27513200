"""Peak private memory of converting a checkpoint, against the size of a shard and against loading and saving it.

Random weights in several shards are written first, then each case runs in a process of its own. Private memory is
`RssAnon` of /proc/self/status (Linux), above what the process has before it starts; mapped files do not count, because
the system can drop their pages at any time. Goal: below two shards.

    python benchmarks/conversion_memory.py
    python benchmarks/conversion_memory.py --shards 12 --shard-mb 1000
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import InternVLForConditionalGeneration

try:
    from internvl_hub.configuration_internvl_chat import InternVLChatConfig
    from internvl_hub.conversion.convert import convert, upgrade
    from internvl_hub.modeling_internvl_chat import InternVLChatModel
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

MEGABYTE = 10**6
TOKENIZER = Path(__file__).parents[1] / "checkpoints" / "internvl-tiny"
CASES = ("convert to native", "convert back", "upgrade, rewriting", "transformers: load and save")


def private_bytes() -> int:
    """Anonymous resident memory of this process."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    if match is None:
        raise RuntimeError("/proc/self/status has no RssAnon: this benchmark needs Linux")
    return 1024 * int(match[1])


class Peak(threading.Thread):
    """Samples the private memory every millisecond until stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.peak = private_bytes()
        self.running = True

    def run(self) -> None:
        while self.running:
            self.peak = max(self.peak, private_bytes())
            time.sleep(0.001)

    def stop(self) -> int:
        """Bytes above the start."""
        self.running = False
        self.join()
        return self.peak - self.start_bytes


def make_checkpoint(folder: Path, shards: int, shard_bytes: int) -> int:
    """Writes random bfloat16 weights of an original-layout model; returns their bytes."""
    width = 1024
    per_layer = (4 * width * width + 3 * width * 4 * width) * 2
    llm = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": width, "intermediate_size": 4 * width,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 8192, "tie_word_embeddings": False,
        "num_hidden_layers": max(1, round(shards * shard_bytes / per_layer)),
    }  # fmt: skip
    vision = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048,
              "image_size": 448, "norm_type": "layer_norm", "qkv_bias": True, "qk_normalization": False}  # fmt: skip
    config = InternVLChatConfig(vision, llm, force_image_size=448, ps_version="v2", template="internvl2_5")
    model = InternVLChatModel(config).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard_bytes)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    return sum(parameter.numel() * 2 for parameter in model.parameters())


def measure(case: str, work: Path, shard_bytes: int) -> dict[str, float]:
    """Runs one case in this process."""
    options = {"max_shard_size": shard_bytes, "progress": False}
    peak, began = Peak(), time.perf_counter()
    peak.start()
    if case == CASES[0]:
        convert(work / "original", work / "native", "native", **options)
    elif case == CASES[1]:
        convert(work / "native", work / "back", "original", **options)
    elif case == CASES[2]:
        upgrade(work / "original", work / "upgraded", rewrite=True, **options)
    else:
        model = InternVLForConditionalGeneration.from_pretrained(work / "native")
        model.save_pretrained(work / "saved", max_shard_size=shard_bytes)
    return {"seconds": time.perf_counter() - began, "bytes": peak.stop()}


def main() -> None:
    """Prints one line per case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--shard-mb", type=int, default=200, help="size of a shard, 10**6 bytes")
    parser.add_argument("--case", choices=(*CASES, "make"), help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shard_bytes = options.shard_mb * MEGABYTE
    if options.case == "make":
        print(json.dumps({"bytes": make_checkpoint(options.work / "original", options.shards, shard_bytes)}))
        return
    if options.case:
        print(json.dumps(measure(options.case, options.work, shard_bytes)))
        return
    with tempfile.TemporaryDirectory() as work:
        shared = ["--work", work, "--shards", str(options.shards), "--shard-mb", str(options.shard_mb)]
        total = _run("make", shared)["bytes"]
        largest = max(path.stat().st_size for path in Path(work, "original").glob("*.safetensors"))
        print(f"{total / MEGABYTE:.0f} MB of weights, largest shard {largest / MEGABYTE:.0f} MB")
        for case in CASES:
            found = _run(case, shared)
            print(
                f"{case:<30} peak private memory {found['bytes'] / MEGABYTE:6.0f} MB = "
                f"{found['bytes'] / shard_bytes:.2f} shards, {found['seconds']:.1f} s"
            )


def _run(case: str, shared: list[str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--case", case, *shared]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
