"""Starts a script on two gloo ranks of this machine; no tests here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_two_ranks(script: str, output: Path, *arguments: str) -> dict[str, Any]:
    """What `script OUTPUT ARGUMENTS...` saved in its output.

    Raises:
        AssertionError: it failed; the message has the end of the traceback.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, script, str(output), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)
