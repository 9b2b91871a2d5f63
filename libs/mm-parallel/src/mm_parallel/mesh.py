"""The dims of the mesh, and this rank's place in them.

From the outside in, so that the ranks that talk most are neighbours:

    pp            stages of a pipeline
    dp_replicate  copies of the model                          } each rank of the two has samples of its own
    dp_shard      ranks that share one copy (FSDP)             }
    ring          ranks that pass keys and values around       } together "cp": the same samples, other tokens
    ulysses       ranks that exchange tokens for heads         }
    tp            ranks that share every matrix: the same samples and tokens

Parameters are sharded over dp_shard, ring and ulysses together ("fsdp"), as ranks of one sample need the same weights.
"""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mm_parallel.config import ParallelConfig

DIMS = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
DATA_DIMS = ("dp_replicate", "dp_shard")


def make(layout: ParallelConfig, device_type: str) -> DeviceMesh:
    """The mesh of a resolved layout; besides its dims it knows "cp" and "fsdp"."""
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
    mesh = init_device_mesh(device_type, sizes, mesh_dim_names=DIMS)
    mesh["ring", "ulysses"]._flatten("cp")
    mesh["dp_shard", "ring", "ulysses"]._flatten("fsdp")
    return mesh


def size(mesh: DeviceMesh | None, dim: str) -> int:
    """Ranks along a dim, of the mesh or flattened; 1 without a mesh."""
    return 1 if mesh is None else mesh[dim].size()


def place(mesh: DeviceMesh | None, dim: str) -> int:
    """This rank's index along a dim; 0 without a mesh."""
    return 0 if mesh is None else mesh[dim].get_local_rank()


def parameter_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP shards over: "fsdp", or HSDP's two dims."""
    return mesh["dp_replicate", "fsdp"] if mesh["dp_replicate"].size() > 1 else mesh["fsdp"]


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(rank, size) along the data: which share of the global batch is ours. Ranks of one sample have the same."""
    if mesh is None:
        return 0, 1
    shards = mesh["dp_shard"].size()
    return place(mesh, "dp_replicate") * shards + place(mesh, "dp_shard"), mesh["dp_replicate"].size() * shards


def speaks(mesh: DeviceMesh | None) -> bool:
    """Whether this rank's losses count: of the ranks that work on one sample, one of the last stage does."""
    last = place(mesh, "pp") == size(mesh, "pp") - 1
    return last and place(mesh, "cp") == 0 and place(mesh, "tp") == 0


def describe(mesh: DeviceMesh | None) -> str:
    """The layout in a few words: what is not 1."""
    if mesh is None:
        return "1 rank"
    names = [f"{name} {mesh[name].size()}" for name in DIMS if mesh[name].size() > 1]
    return f"{dist.get_world_size()} ranks" + (f" ({', '.join(names)})" if names else "")
