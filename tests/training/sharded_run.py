"""One rank of a model sharded by FSDP2 on the CPU; the first writes what `test_sharding` compares.

Run as: torchrun --nproc-per-node 2 sharded_run.py OUTPUT.pt
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from internvl_hub.tests.training import tiny_models as tiny
from internvl_hub.training.collation import InternVLCollator
from internvl_hub.training.evaluation import label_weight
from internvl_hub.training.run import leave

STEPS, RATE = 3, 0.1


def batches(rank: int, ranks: int, packing: bool) -> list[dict[str, Any]]:
    """Micro-batches of one step each; in the second one the last rank has text alone."""
    rows = list(tiny.dataset(count=24))
    collator = InternVLCollator(2, tiny.IMAGE_SIZE, "square", packing)
    chosen = [rows[4 * step + rank * (4 // ranks) : 4 * step + (rank + 1) * (4 // ranks)] for step in range(STEPS)]
    if rank == ranks - 1 and ranks > 1:
        chosen[1] = [rows[1], rows[3]]
    return [{k: v for k, v in collator(part).items() if not k.startswith("num_")} for part in chosen]


def shard(model: nn.Module, mesh: Any, **options: Any) -> nn.Module:
    """As accelerate's `TRANSFORMER_BASED_WRAP` with the model's `_no_split_modules`."""
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def main() -> None:
    """Trains by plain SGD; then takes the loss in bfloat16 with label weights that bfloat16 cannot hold."""
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    model = shard(tiny.model().train(), mesh)
    sharded = {name: (tuple(p.shape), tuple(p.to_local().shape)) for name, p in model.named_parameters()}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert sum(isinstance(module, FSDPModule) for module in model.modules()) == 5  # two layers of each tower, the root
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=RATE), []
    for batch in batches(rank, ranks, packing=True):
        total = label_weight(batch)
        torch.distributed.all_reduce(total)
        loss = ranks * model(**batch, num_items_in_batch=float(total)).loss  # gradients are averaged over ranks
        loss.backward()
        mean = loss.detach() / ranks
        torch.distributed.all_reduce(mean)
        losses.append(float(mean))
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: value.full_tensor() for name, value in model.state_dict().items()}
    low = shard(tiny.model(), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    batch = batches(rank, ranks, packing=False)[0]
    ones = (batch["labels"] != -100).float()
    results = {}
    for name, weight in (("list", (ones * 1.001953125).tolist()), ("tensor", ones * 1.001953125), ("ones", ones)):
        results[name] = float(low(**{**batch, "loss_weight": weight}, num_items_in_batch=10.0).loss.detach())
    if rank == 0:
        output = {"losses": losses, "weights": weights, "sharded": sharded, "bf16": results}
        torch.save(output, sys.argv[1])
    torch.distributed.barrier()


if __name__ == "__main__":
    main()
    leave()
