"""FSDP2 (`fully_shard`) on two gloo ranks: sharded parameters, the same training, and label weights that stay exact.

accelerate's FSDP plugin shards nothing on a CPU, so torch's own function is called as the plugin would.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from internvl_hub.tests.training import runs, sharded_run
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.tests.training.two_ranks import run_two_ranks
from internvl_hub.training.evaluation import label_weight


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_two_ranks(sharded_run.__file__, tmp_path_factory.mktemp("sharding") / "ranks.pt")


@pytest.mark.newest
def test_every_parameter_is_sharded(ranks: dict[str, Any]) -> None:
    assert ranks["sharded"].keys() == dict(tiny.model().named_parameters()).keys()
    for name, (whole, local) in ranks["sharded"].items():
        assert local[0] == -(-whole[0] // 2) and local[1:] == whole[1:], name


@pytest.mark.newest
def test_sharded_training_equals_one_process(ranks: dict[str, Any]) -> None:
    """Against plain torch on the rows of both ranks, one after the other."""
    model, losses = tiny.model().train(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=sharded_run.RATE)
    for parts in zip(*(sharded_run.batches(rank, 2, packing=False) for rank in range(2)), strict=True):
        total = sum(label_weight(part) for part in parts)
        step = [model(**part, num_items_in_batch=total).loss for part in parts]
        sum(step).backward()
        losses.append(float(sum(step)))
        optimizer.step()
        optimizer.zero_grad()
    assert ranks["losses"] == pytest.approx(losses, rel=1e-5)
    assert len({round(loss, 3) for loss in losses}) == sharded_run.STEPS
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ranks["weights"][name], value, rtol=0, atol=2e-6)


@pytest.mark.newest
def test_bf16_rounds_label_weights_unless_they_are_a_list(ranks: dict[str, Any]) -> None:
    """Why the trainer passes a list: 1.001953125 is 1.0 in bfloat16."""
    low = ranks["bf16"]
    assert low["tensor"] == low["ones"]
    assert low["list"] == pytest.approx(1.001953125 * low["ones"], rel=1e-7)


@pytest.mark.parametrize("casts", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_the_trainer_hides_weights_from_casts(casts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = runs.make_trainer(str(tmp_path))
    batch = next(iter(trainer.get_train_dataloader()))
    seen: dict[str, Any] = {}

    def forward(model: torch.nn.Module, **inputs: Any) -> dict[str, torch.Tensor]:
        seen.update(inputs)
        return {"loss": torch.zeros(())}

    def prepare(self: Any, data: Any) -> Any:  # as DeepSpeed's branch of Trainer._prepare_input
        if isinstance(data, dict):
            return {key: prepare(self, value) for key, value in data.items()}
        return data.bfloat16() if isinstance(data, torch.Tensor) and data.is_floating_point() else data

    monkeypatch.setattr(type(trainer), "_prepare_input", prepare)
    monkeypatch.setattr(trainer, casts, True)
    monkeypatch.setattr(type(trainer.model), "forward", forward)
    trainer.accounts.take([batch])
    inputs = trainer._prepare_inputs(batch)
    trainer.compute_loss(trainer.model, inputs, num_items_in_batch=torch.tensor(3.7001953125))
    assert seen["pixel_values"].dtype == torch.bfloat16
    assert seen["loss_weight"] == batch["loss_weight"].tolist() and seen["num_items_in_batch"] == 3.7001953125
