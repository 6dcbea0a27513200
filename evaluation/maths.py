"""Whether a mathematical answer equals the gold one: as LaTeX, as a quantity, or as an expression by math-verify.

Text and plain numbers are compared here. Expressions go to one helper process, which is killed and replaced when it
takes too long or too much memory, so that `9**9**9**9` is a recorded failure anywhere: in threads, in forked workers
and on systems without signals. Quantities with units that differ are unequal; a unit that only one has is ignored.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .latex_text import Quantity, has_words, latex_equal, plain_latex, read_quantity
from .text_metrics import is_year, numbers_close

TOLERANCE = 1e-3  # relative; MMPR's math score
SECONDS = 5.0  # for one pair of expressions
START_SECONDS = 120.0
LONGEST = 1000  # characters of an expression
DEEPEST = 20  # brackets inside brackets: parsing takes exponential time in them
RECYCLED_AFTER = 5000  # expressions, as caches of the libraries grow
MATHS_PROBLEMS = ("too_long", "timeout", "crash", "unparsable")


@dataclass(frozen=True)
class MathsResult:
    """Whether an answer is right, and why it could not be judged: one of `MATHS_PROBLEMS`, or None."""

    correct: bool
    problem: str | None = None


def maths_equal(answer: str, gold: Sequence[str], tolerance: float = TOLERANCE) -> MathsResult:
    """Compare an answer in mathematics with gold answers, any of which counts.

    Numbers may differ by `tolerance` relative to the gold one; 0 and years (`text_metrics.is_year`) must be met.
    "50%" equals 50 and 0.5. Text with words is never taken for a product of letters.

    Raises:
        ImportError: math-verify is missing and an expression must be compared.
    """
    problem = None
    for text in gold:
        result = _compare(answer, text, tolerance)
        if result.correct:
            return result
        problem = problem or result.problem
    return MathsResult(False, problem)


def _compare(answer: str, gold: str, tolerance: float) -> MathsResult:
    if max(len(answer), len(gold)) > LONGEST:
        same = bool(answer.strip()) and answer.strip() == gold.strip()
        return MathsResult(same, None if same else "too_long")
    if latex_equal(answer, gold):
        return MathsResult(True)
    first, second = plain_latex(answer), plain_latex(gold)
    found, wanted = read_quantity(first), read_quantity(second)
    if found and wanted:
        return MathsResult(_quantities_equal(found, wanted, 0.0 if is_year(gold) else tolerance))
    if not first or not second or has_words(first) or has_words(second):
        return MathsResult(False)
    if max(_depth(first), _depth(second)) > DEEPEST:
        return MathsResult(False, "too_long")
    reply = _helper().compare(first, second, tolerance)
    return MathsResult(reply["equal"], reply["problem"])


def _quantities_equal(found: Quantity, wanted: Quantity, tolerance: float) -> bool:
    units = {unit.lower() if len(unit) > 2 else unit for unit in (found.unit, wanted.unit)} - {""}
    if len(units) > 1:
        return False
    scales = (1.0, 0.01) if found.unit == "%" != wanted.unit else (1.0,)
    scales = (1.0, 100.0) if wanted.unit == "%" != found.unit else scales
    values = [found.value * scale for scale in scales]
    return any(value == wanted.value or numbers_close(value, wanted.value, tolerance) for value in values)


def _depth(text: str) -> int:
    deepest = depth = 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        deepest = max(deepest, depth)
    return deepest


class MathsProcess:
    """One helper process, started when first needed; safe to use from several threads, which take turns.

    Args:
        seconds: Time for one comparison, without that for starting the process.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.process: subprocess.Popen[str] | None = None
        self.answered = 0
        self.lock = threading.Lock()

    def compare(self, answer: str, gold: str, tolerance: float = TOLERANCE) -> dict:
        """{"equal": bool, "problem": str or None}; a process that had to be stopped gives "timeout" or "crash".

        Raises:
            ImportError: math-verify is missing or cannot be imported.
        """
        request = json.dumps({"answer": answer, "gold": gold, "tolerance": tolerance})
        with self.lock:
            if self.process is None or self.process.poll() is not None or self.answered >= RECYCLED_AFTER:
                self.close()
                self.process = self._start()
            line, late = _ask(self.process, request, self.seconds)
            self.answered += 1
            if late or not line:
                self.close()
            return json.loads(line) if line else {"equal": False, "problem": "timeout" if late else "crash"}

    def close(self) -> None:
        """Stop the process, if there is one."""
        process, self.process, self.answered = self.process, None, 0
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError("answers in mathematics need math-verify: pip install internvl-hub[eval]")
        script = Path(__file__).with_name("maths_worker.py")
        paths = os.pathsep.join(path for path in sys.path if path)
        process = subprocess.Popen(
            [sys.executable, "-P", str(script)],  # -P: this folder's modules are not the helper's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        line, late = _ask(process, None, START_SECONDS)
        if late or not line:
            process.kill()
            reason = f"no start within {START_SECONDS:.0f} s" if late else process.communicate()[1].strip()[-500:]
            raise ImportError(f"math-verify cannot be imported: {reason}")
        return process


def _ask(process: subprocess.Popen[str], request: str | None, seconds: float) -> tuple[str, bool]:
    """The reply ("" for none) and whether the time was up, in which case the process is killed."""
    assert process.stdin is not None and process.stdout is not None  # both are pipes
    late = threading.Event()

    def stop() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        if request is not None:
            process.stdin.write(request + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
    except OSError:  # the process is gone
        line = ""
    finally:
        timer.cancel()
        timer.join()
    return (line if line.endswith("\n") else ""), late.is_set()


_shared = MathsProcess()
_inherited: list[MathsProcess] = []  # of parent processes: kept, so that nothing here waits for their helpers


def _helper() -> MathsProcess:
    return _shared


def _after_fork() -> None:
    """A forked process has a helper of its own: the pipes and the lock it inherits belong to its parent."""
    global _shared
    _inherited.append(_shared)
    _shared = MathsProcess(_shared.seconds)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
atexit.register(lambda: _shared.close())
