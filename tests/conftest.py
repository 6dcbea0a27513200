"""What every test shares: paths, one seed, no network, and a private cache of remote code.

Tests never import this module: that would run it again and make a second cache.
"""

import atexit
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
sys.path.append(str(ROOT / "tests"))  # for `from tiny import ...`: importlib mode adds no paths of its own

# All of this must be set before transformers is imported. Two folders of the same name with the same configuration
# code share classes in one cache of remote code, so each worker has its own, never the user's.
_MODULES = tempfile.mkdtemp(prefix="internvl_hub_modules_")
atexit.register(shutil.rmtree, _MODULES, ignore_errors=True)
os.environ["HF_MODULES_CACHE"] = _MODULES
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of reference numbers (see its README.md)."""
    return FIXTURES


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, whatever ran before it on this worker."""
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that matplotlib makes during the test, in order."""
    figure = pytest.importorskip("matplotlib.figure")
    made: list[Any] = []

    class Recorded(figure.Figure):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Recorded)
    return made
