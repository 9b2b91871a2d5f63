"""From the degrees that a user asks for to a DeviceMesh; every layout that cannot be is refused here, with numbers."""

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA_DIMS = ("dp_replicate", "dp_shard")


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks are laid out.

    dp_replicate: copies of the model; each is made of dp_shard ranks. More than 1 with dp_shard > 1 is HSDP.
    dp_shard: ranks over which one copy is sharded (FSDP); -1 takes what is left.
    """

    dp_replicate: int = 1
    dp_shard: int = -1

    def resolve(self, world: int) -> "ParallelConfig":
        """The same layout for `world` ranks, without -1. Raises ValueError where it does not fit."""
        if self.dp_replicate < 1:
            raise ValueError(f"dp_replicate={self.dp_replicate}: must be at least 1 (1 is one copy of the model)")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(f"dp_shard={self.dp_shard}: must be at least 1, or -1 for what is left")
        if self.dp_shard == -1:
            if world % self.dp_replicate:
                raise ValueError(
                    f"{world} ranks cannot hold dp_replicate={self.dp_replicate} equal copies: "
                    f"dp_replicate must divide {world} ({_divisors(world)})"
                )
            return ParallelConfig(self.dp_replicate, world // self.dp_replicate)
        needed = self.dp_replicate * self.dp_shard
        if needed != world:
            fits = [f"start {needed} ranks"]
            if world % self.dp_replicate == 0:
                fits.append(f"dp_shard={world // self.dp_replicate} (or -1: what is left)")
            if world % self.dp_shard == 0:
                fits.append(f"dp_replicate={world // self.dp_shard}")
            raise ValueError(
                f"dp_replicate={self.dp_replicate} x dp_shard={self.dp_shard} is a layout of {needed} ranks, "
                f"but {world} were started: {', or '.join(fits)}; both must divide {world} ({_divisors(world)})"
            )
        return self

    def mesh(self, device_type: str) -> DeviceMesh | None:
        """The mesh ("dp_replicate", "dp_shard") over all ranks; None for one process without a process group."""
        if not dist.is_initialized():
            self.resolve(1)
            return None
        layout = self.resolve(dist.get_world_size())
        return init_device_mesh(device_type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=DATA_DIMS)


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(rank, size) along the data: which share of the global batch is ours. Every rank of both dims has its own."""
    if mesh is None:
        return 0, 1
    rank = 0
    for dim in DATA_DIMS:
        rank = rank * mesh[dim].size() + mesh.get_local_rank(dim)
    return rank, mesh[DATA_DIMS].size()


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
