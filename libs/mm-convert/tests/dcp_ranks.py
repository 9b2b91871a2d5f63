"""Run by test_dcp.py: four ranks save sharded tensors with torch, and load ours.

    python dcp_ranks.py FOLDER

Reads FOLDER/whole.pt, a flat dictionary of tensors, and FOLDER/ours, the same as a DCP folder; writes FOLDER/theirs,
{"model": …} of the same tensors in DTensors of many placements. Exits with 1 when what was loaded differs.
"""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

PLACEMENTS = {
    "rows": [Replicate(), Shard(0)],
    "columns": [Replicate(), Shard(1)],
    "grid": [Shard(0), Shard(1)],
    "grid the other way": [Shard(1), Shard(0)],
    "rows twice": [Shard(0), Shard(0)],
    "whole": [Replicate(), Replicate()],
}


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(6, 10), torch.nn.Linear(10, 6)
        self.scale = torch.nn.Parameter(torch.randn(3, 2))  # fewer rows than ranks


def sharded(whole: dict[str, torch.Tensor], mesh) -> dict[str, torch.Tensor]:
    """Every tensor in every placement that its sides allow."""
    return {
        f"{name}/{kind}": distribute_tensor(tensor, mesh, places)
        for name, tensor in whole.items()
        for kind, places in PLACEMENTS.items()
        if all(place.is_replicate() or place.dim < tensor.dim() for place in places)
    }


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    whole = torch.load(folder / "whole.pt")

    for kind, places in PLACEMENTS.items():
        targets = {
            name: distribute_tensor(torch.zeros_like(tensor), mesh, places)
            for name, tensor in whole.items()
            if all(place.is_replicate() or place.dim < tensor.dim() for place in places)
        }
        dcp.load({"model": targets}, checkpoint_id=folder / "ours")
        for name, target in targets.items():
            assert torch.equal(target.full_tensor(), whole[name]), (kind, name)

    dcp.save({"model": sharded(whole, mesh), "step": 7}, checkpoint_id=folder / "theirs")

    torch.manual_seed(0)
    block = Block()
    if rank == 0:
        torch.save(block.state_dict(), folder / "block.pt")
    parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(block, mesh=mesh["dp"])
    dcp.save({"model": block.state_dict()}, checkpoint_id=folder / "block")
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")  # torch is imported once
    ranks = [context.Process(target=run, args=(rank, Path(sys.argv[1]))) for rank in range(4)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    alive = [process for process in ranks if process.exitcode is None]
    for process in alive:
        process.kill()
    sys.exit(1 if alive or any(process.exitcode for process in ranks) else 0)
