"""One rank of MPO sharded by FSDP2 on the CPU; the first writes what `test_preference_sharding` compares.

Run as: torchrun --nproc-per-node 2 preference_sharded_run.py OUTPUT.pt
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from internvl_hub.tests.training import preference_runs
from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.tests.training.sharded_run import shard
from internvl_hub.training.preference_collation import PreferenceCollator
from internvl_hub.training.reference import FrozenReference
from internvl_hub.training.run import leave

LORA = {"freeze_backbone": True, "use_llm_lora": 4, "lora_dropout": 0.0}
OPTIONS: dict[str, dict[str, Any]] = {"whole": {}, "lora": LORA}
COLLATOR = PreferenceCollator(preference_runs.PAD, tiny.IMAGE_SIZE)


def batches(rank: int, ranks: int) -> list[dict[str, Any]]:
    """Two micro-batches of a step; with two ranks, each rank's of the same eight pairs."""
    rows = preference_runs.pairs(8)
    return [COLLATOR(part[rank * (4 // ranks) : (rank + 1) * (4 // ranks)]) for part in (rows[:4], rows[4:])]


def sharded_step(kind: str, folder: str, mesh: Any) -> dict[str, Any]:
    """Loss and whole gradients of a step, with the shift it used."""
    trainer = preference_runs.make_trainer(folder, ddp_backend="gloo", **OPTIONS[kind])
    if isinstance(trainer.reference, FrozenReference):
        # The trainer shares frozen parameters unless FSDP is on; accelerate's plugin is not on here.
        trainer.reference.module = shard(trainer.reference.module, mesh)
    trainer.model = trainer.model_wrapped = shard(trainer.model, mesh)
    assert all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loss, gradients = preference_runs.step(trainer, batches(rank, ranks))
    total = torch.tensor(loss / ranks)
    torch.distributed.all_reduce(total)
    whole = {name: gradient.full_tensor() for name, gradient in gradients.items()}
    return {"loss": float(total), "gradients": whole, "shift": trainer.shift.value}


def main() -> None:
    """A step of each kind."""
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with tempfile.TemporaryDirectory() as folder:
        found = {kind: sharded_step(kind, folder, mesh) for kind in OPTIONS}
    if torch.distributed.get_rank() == 0:
        torch.save(found, sys.argv[1])
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
    leave()
