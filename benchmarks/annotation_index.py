"""Opening a large annotation file: seconds and private memory, against a line loop and `datasets`.

A jsonl file of a million rows of 500 bytes is written to a temporary folder. Each opening runs in a process of its own
with the file in the page cache, imports not counted; the ways take turns, so that a busy machine slows all of them.
Each ends by reading the last row. Private memory is Private_Clean + Private_Dirty of /proc/self/smaps_rollup (Linux),
after opening less before. `datasets` converts the file to Arrow on disk, as it does when it sees a file first. Goals
of the index: below 3 s and 200 MB.

    python benchmarks/annotation_index.py
    python benchmarks/annotation_index.py --lines 100000 --rounds 3
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    from internvl_hub.data.annotations import AnnotationFile
except ImportError:
    sys.exit(f"internvl_hub is not installed: run `pip install -e {Path(__file__).resolve().parents[1]}` first")

MEGABYTE = 10**6
GOAL_SECONDS, GOAL_MEGABYTES = 3, 200
LINE_BYTES = 500


def write_file(path: Path, lines: int) -> None:
    """Rows of exactly 500 bytes, newline included."""
    with path.open("w", encoding="ascii") as file:
        for i in range(lines):
            turns = [{"from": "human", "value": f"<image>\nQuestion {i}"}, {"from": "gpt", "value": ""}]
            row = {"id": i, "image": f"{i:08}.jpg", "conversations": turns}
            turns[1]["value"] = "a" * (LINE_BYTES - 1 - len(json.dumps(row)))
            file.write(json.dumps(row) + "\n")


def private_bytes() -> int:
    """Memory of this process that it shares with no other."""
    rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    return 1024 * sum(map(int, re.findall(r"^Private_(?:Clean|Dirty): +(\d+) kB", rollup, re.MULTILINE)))


class LineLoop(Sequence[Any]):
    """The plain way: a Python loop over the lines, their offsets in a list."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.offsets: list[int] = []
        offset = 0
        with open(path, "rb") as file:
            for line in file:
                if line.strip():
                    self.offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, row: int) -> Any:  # type: ignore[override]
        with open(self.path, "rb") as file:
            file.seek(self.offsets[row])
            return json.loads(file.readline())


def opener(case: str) -> Callable[[str], Any]:
    """What opens the file, its imports done."""
    if case == "AnnotationFile":
        return AnnotationFile
    if case == "line loop":
        return LineLoop
    import datasets

    datasets.disable_progress_bars()

    def load(path: str) -> Any:
        cache = str(Path(path).parent / "cache")
        return datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)

    return load


def measure(case: str, path: str) -> dict[str, float]:
    """Opens the file in this process."""
    open_file = opener(case)
    before, began = private_bytes(), time.perf_counter()
    rows = open_file(path)
    last = rows[len(rows) - 1]
    seconds = time.perf_counter() - began
    if last["id"] != len(rows) - 1:
        raise RuntimeError(f"{case}: the last of {len(rows)} rows has the id {last['id']}")
    return {"seconds": seconds, "megabytes": (private_bytes() - before) / MEGABYTE, "rows": len(rows)}


def in_own_process(case: str, folder: Path) -> dict[str, float]:
    """`measure` in a fresh process, the file in the page cache and no cache of `datasets`."""
    with tempfile.TemporaryDirectory(dir=folder) as work:
        path = Path(work, "rows.jsonl")
        path.symlink_to(folder / "rows.jsonl")
        subprocess.run(["cat", folder / "rows.jsonl"], stdout=subprocess.DEVNULL, check=True)
        command = [sys.executable, __file__, "--case", case, "--path", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Prints one line per way and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=10**6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(options.case, options.path)))
        return
    cases = ["AnnotationFile", "line loop"]
    try:
        import datasets  # noqa: F401

        cases.append("datasets")
    except ImportError:
        print("datasets is not installed: left out")
    with tempfile.TemporaryDirectory() as folder:
        write_file(Path(folder, "rows.jsonl"), options.lines)
        found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case in cases:
                found[case].append(in_own_process(case, Path(folder)))
    _report(found, options.lines)


def _report(found: dict[str, list[dict[str, float]]], lines: int) -> None:
    print(f"{lines} lines of {LINE_BYTES} bytes, {len(found['AnnotationFile'])} rounds")
    seconds = {case: [one["seconds"] for one in values] for case, values in found.items()}
    for case, values in found.items():
        if {one["rows"] for one in values} != {lines}:
            sys.exit(f"{case} found {values[0]['rows']} rows")
        times, memory = seconds[case], statistics.median(one["megabytes"] for one in values)
        spread = f"({min(times):.2f}-{max(times):.2f})"
        print(f"{case:16} {statistics.median(times):7.2f} s {spread:15} {memory:7.1f} MB private")
    for case in list(found)[1:]:
        ratio = statistics.median(seconds[case]) / statistics.median(seconds["AnnotationFile"])
        print(f"{case + ' / AnnotationFile':34} {ratio:.1f}x of medians")
    print(f"goals of AnnotationFile at a million lines: below {GOAL_SECONDS} s and {GOAL_MEGABYTES} MB")


if __name__ == "__main__":
    main()
