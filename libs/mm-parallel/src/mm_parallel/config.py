"""What a user asks for, as data; every layout that cannot be is refused here, with numbers.

This file imports no torch, so that a command line can be read, and a typo answered, without waiting for it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


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

    def mesh(self, device_type: str) -> "DeviceMesh | None":
        """The mesh ("dp_replicate", "dp_shard") over all ranks; None for one process without a process group."""
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh

        from mm_parallel.mesh import DATA_DIMS

        if not dist.is_initialized():
            self.resolve(1)
            return None
        layout = self.resolve(dist.get_world_size())
        return init_device_mesh(device_type, (layout.dp_replicate, layout.dp_shard), mesh_dim_names=DATA_DIMS)


@dataclass(frozen=True)
class MemoryConfig:
    """What is paid in time for memory.

    recompute: "none", "full", or the first k rungs, whose activations are computed again in the backward.
    """

    recompute: Literal["none", "full"] | int = "none"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
