"""Compares mathematical expressions in a process of its own; run as a script by `maths.py`.

Reads one JSON object per line, {"answer": ..., "gold": ...}, and writes one, {"equal": bool, "problem": ...}, after a
first line that says it is ready. math-verify's own time limits need signals and the main thread and stop no long
multiplication, so they are off here: whoever started this process kills it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys

MEMORY = 1 << 30  # bytes of address space; the libraries take about a tenth of it


def limit_memory(size: int = MEMORY) -> None:
    """Let allocations fail beyond `size` bytes of address space, where the system knows such limits."""
    try:
        import resource
    except ImportError:  # Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > size:
        resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def compare(answer: str, gold: str, tolerance: float) -> dict[str, bool | str | None]:
    """Whether two expressions are equal, in symbols or as numbers within `tolerance` of the gold one."""
    from math_verify import verify

    wanted, found = parse(gold), parse(answer)
    if not wanted or not found:
        return {"equal": False, "problem": "unparsable"}
    equal = verify(wanted, found, timeout_seconds=None) or close(found[0], wanted[0], tolerance)
    return {"equal": bool(equal), "problem": None}


def parse(text: str) -> list:
    """Expressions in `text`, which is taken as LaTeX from end to end, or as plain arithmetic where that fails."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, LatexNormalizationConfig, parse

    # Units stay: dropped, they would make 5cm of 5m.
    kept = LatexNormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True)
    latex = LatexExtractionConfig(normalization_config=kept)
    for config, form in ((latex, f"${text}$"), (ExprExtractionConfig(), text)):
        found = parse(form, [config], fallback_mode="no_fallback", parsing_timeout=None)
        if found:
            return found
    return []


def close(found, wanted, tolerance: float) -> bool:
    """Whether both are real numbers, the one within `tolerance` of the other, which is not 0."""
    try:
        value, goal = complex(found.evalf(15)), complex(wanted.evalf(15))
    except (TypeError, ValueError, AttributeError, OverflowError):  # symbols, sets, relations
        return False
    real = value.imag == 0 and goal.imag == 0 and goal.real != 0
    return real and abs(value.real - goal.real) <= tolerance * abs(goal.real)


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # whatever prints must not spoil the replies
    import math_verify  # noqa: F401  (the time to import is not that of the first request)

    limit_memory()
    logging.disable()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = compare(request["answer"], request["gold"], request["tolerance"])
        except RecursionError:
            reply = {"equal": False, "problem": "crash"}
        except MemoryError:
            print(json.dumps({"equal": False, "problem": "crash"}), file=replies, flush=True)
            return  # with a clean heap the next one has a fair chance
        except Exception:  # noqa: BLE001  parsers fail in ways of their own on text that is no mathematics
            reply = {"equal": False, "problem": "unparsable"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
