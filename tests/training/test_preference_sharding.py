"""MPO under FSDP2 (`fully_shard`) on two gloo ranks: policy and reference sharded, the same loss and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_hub.tests.training import preference_runs, preference_sharded_run
from internvl_hub.tests.training.two_ranks import run_two_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_two_ranks(preference_sharded_run.__file__, tmp_path_factory.mktemp("sharding") / "ranks.pt")


@pytest.mark.newest
@pytest.mark.parametrize("kind", list(preference_sharded_run.OPTIONS))
def test_a_sharded_step_equals_one_process(kind: str, ranks: dict[str, Any], tmp_path: Path) -> None:
    trainer = preference_runs.make_trainer(str(tmp_path), **preference_sharded_run.OPTIONS[kind])
    loss, gradients = preference_runs.step(trainer, preference_sharded_run.batches(0, 1))
    found = ranks[kind]
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["shift"] == pytest.approx(trainer.shift.value, rel=1e-5) and found["shift"] != 0
    assert found["gradients"].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
