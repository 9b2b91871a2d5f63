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
FLAT = {"cp": ("ring", "ulysses"), "fsdp": ("dp_shard", "ring", "ulysses")}


def make(layout: ParallelConfig, device_type: str) -> DeviceMesh:
    """The mesh of a resolved layout."""
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
    return init_device_mesh(device_type, sizes, mesh_dim_names=DIMS)


def along(mesh: DeviceMesh, dim: str) -> DeviceMesh:
    """The one-dimensional mesh of one of `DIMS`, of "cp" or of "fsdp"; always the same object."""
    return mesh[FLAT[dim]]._flatten(dim) if dim in FLAT else mesh[dim]  # torch has no public name for it yet


def size(mesh: DeviceMesh | None, dim: str) -> int:
    """Ranks along a dim (see `along`); 1 without a mesh."""
    return 1 if mesh is None else along(mesh, dim).size()


def place(mesh: DeviceMesh | None, dim: str) -> int:
    """This rank's index along a dim; 0 without a mesh."""
    return 0 if mesh is None else along(mesh, dim).get_local_rank()


def parameter_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP shards over: "fsdp", or HSDP's two dims."""
    sharded = along(mesh, "fsdp")
    if mesh["dp_replicate"].size() == 1:
        return sharded
    return DeviceMesh._concatenate([mesh["dp_replicate"], sharded])


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
