"""Mathematics: quantities, LaTeX, and the helper process that survives what it is asked."""

import builtins
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from internvl_hub.evaluation import maths
from internvl_hub.evaluation.latex_text import latex_equal, read_quantity
from internvl_hub.evaluation.maths import MathsProcess, maths_equal
from internvl_hub.evaluation.verifiers import verify


def test_quantities():
    assert read_quantity("-1,234.5 km/h").value == -1234.5 and read_quantity("3 m^2").unit == "m^2"
    for text in ("5x", "5 x", "2 pi", "5 sin x", "1,23", "1 2", "--5", "1e999", "five", "5 or", "9" * 500):
        assert read_quantity(text) is None, text
    assert latex_equal("\\left( 1, 2 \\right)", "(1,2)") and not latex_equal("no where", "nowhere")
    assert not latex_equal("", "$") and latex_equal("$", "$")


@pytest.fixture
def hasty(monkeypatch):
    """A helper process with little time."""
    process = MathsProcess(seconds=1)
    monkeypatch.setattr(maths, "_shared", process)
    yield process
    process.close()


@pytest.mark.newest
def test_hopeless_expressions_are_failures(hasty):
    assert maths_equal("2", ["4/2"]).correct
    assert maths_equal("9**9**9**9", ["5"]).problem in ("timeout", "crash")
    assert maths_equal("100000!!!!", ["5"]).problem in ("timeout", "crash")
    assert maths_equal("(" * 10**6, ["5"]).problem == maths_equal("(" * 400 + "1", ["5"]).problem == "too_long"
    assert maths_equal("1+" * 10**6, ["5"]).problem == "too_long"
    assert maths_equal("2", ["4/2"]).correct  # a fresh process took over


@pytest.mark.skipif(sys.platform != "linux", reason="limits of address space")
def test_memory_is_bounded():
    code = (
        "from internvl_hub.evaluation.maths_worker import MEMORY, limit_memory\n"
        "limit_memory()\n"
        "bytearray(MEMORY // 8)\n"
        "try: bytearray(MEMORY)\n"
        "except MemoryError: raise SystemExit(0)\n"
        "raise SystemExit('no limit')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_killed_helper_is_replaced(hasty):
    assert hasty.compare("1/2", "0.5")["equal"]
    hasty.process.kill()
    hasty.process.wait()
    assert hasty.compare("1/2", "0.5")["equal"]


def test_math_works_in_threads(hasty):
    hasty.seconds = 60
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda n: maths_equal(f"{n}/2", [f"{n * 2}/4"]).correct, range(1, 20, 2)))
    assert all(results)


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
def test_forked_processes_have_helpers_of_their_own():
    code = (
        "import os, multiprocessing\n"
        "from internvl_hub.evaluation import maths\n"
        "def ask(n): return maths.maths_equal(f'{n}/2', [f'{2*n}/4']).correct, maths._shared.process.pid\n"
        "first = ask(1)\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: rest = pool.map(ask, [3, 5, 7], chunksize=1)\n"
        "assert all(right for right, _ in [first, *rest, ask(9)])\n"
        "assert first[1] not in {pid for _, pid in rest} and ask(9)[1] == first[1]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setattr(maths, "_shared", MathsProcess())
    monkeypatch.setattr(maths.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install internvl-hub\[eval\]"):
        maths_equal("1/2", ["0.5"])
    real = builtins.__import__

    def without_rapidfuzz(name, *rest):
        if name.startswith("rapidfuzz"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_rapidfuzz)
    with pytest.raises(ImportError, match=r"pip install internvl-hub\[eval\]"):
        verify("a", ["b"], "anls")
