"""A run that is killed and resumed is the run that was not: every remaining loss to the last bit, and the weights."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from internvl_hub.tests.training import killed_run
from internvl_hub.training.checkpoints import find_last_checkpoint

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def _start(folder: Path, kind: str, workers: int, ranks: int, *options: str) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, killed_run.__file__, str(folder), kind, str(workers), *options]
    with (folder / "output").open("a") as output:
        return subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True)


def _finish(process: subprocess.Popen, folder: Path) -> None:
    assert process.wait(timeout=600) == 0, (folder / "output").read_text()[-3000:]


def _kill_after(process: subprocess.Popen, folder: Path, step: int) -> None:
    """SIGKILL to all of its processes once it is past a step.

    The ranks first: torchrun's death would send them a SIGTERM, upon which they save.
    """
    log, deadline = folder / "losses-0", time.monotonic() + 600
    while not (log.is_file() and any(int(line.split()[0]) >= step for line in log.read_text().splitlines()[:-1])):
        assert process.poll() is None, (folder / "output").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for path in folder.glob("pid-*"):
        os.kill(int(path.read_text()), signal.SIGKILL)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _losses(folder: Path, rank: int) -> list[tuple[int, str]]:
    lines = (folder / f"losses-{rank}").read_text(encoding="utf-8").splitlines()
    return [(int(step), loss) for step, loss in (line.split() for line in lines)]


@pytest.mark.parametrize(
    ("kind", "workers", "ranks", "step"),
    [("qwen2", 2, 1, 10), pytest.param("internlm2", 1, 2, 6, marks=pytest.mark.newest)],
)
def test_killed_and_resumed(kind: str, workers: int, ranks: int, step: int, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _finish(_start(whole, kind, workers, ranks), whole)
    process = _start(killed, kind, workers, ranks)
    _kill_after(process, killed, step)
    last = find_last_checkpoint(killed / "run")
    assert last is not None and not (killed / "weights").exists()
    first = int(last.name.removeprefix("checkpoint-"))
    for rank in range(ranks):
        (killed / f"losses-{rank}").unlink()
    _finish(_start(killed, kind, workers, ranks, "--resume"), killed)
    for rank in range(ranks):
        expected = _losses(whole, rank)
        assert [step for step, _ in expected] == sorted(list(range(killed_run.STEPS)) * killed_run.ACCUMULATION)
        assert len({loss for _, loss in expected}) > killed_run.STEPS  # it trains
        assert _losses(killed, rank) == [entry for entry in expected if entry[0] >= first]
    assert (killed / "weights").read_text() == (whole / "weights").read_text()


def test_checkpoints_that_were_not_finished_are_passed_over(tmp_path: Path) -> None:
    assert find_last_checkpoint(tmp_path) is None
    for step, state in ((2, "{}"), (10, "{}"), (12, '{"log'), (14, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-x").mkdir()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    two = '{"stateful_callbacks": {"RunAccounts": {"args": {}, "attributes": {"world_size": 2}}}}'
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text(two)
    (tmp_path / "checkpoint-12" / "rng_state_0.pth").touch()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (tmp_path / "checkpoint-12" / "rng_state_1.pth").touch()
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-12"
