"""The axes of the mesh, and this rank's index in them.

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

AXES = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
FLAT = {"cp": ("ring", "ulysses"), "fsdp": ("dp_shard", "ring", "ulysses")}


def make_mesh(parallel: ParallelConfig, device_type: str) -> DeviceMesh | None:
    """The mesh of a layout over all ranks; None for one process without process group.

    Raises ValueError for a layout that does not fit the number of ranks.
    """
    if not dist.is_initialized():
        parallel.resolve(1)
        return None
    layout = parallel.resolve(dist.get_world_size())
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
    return init_device_mesh(device_type, sizes, mesh_dim_names=AXES)


def submesh(mesh: DeviceMesh, axis: str) -> DeviceMesh:
    """The one-dimensional mesh of one of `AXES`, of "cp" or of "fsdp"; always the same object."""
    return mesh[FLAT[axis]]._flatten(axis) if axis in FLAT else mesh[axis]  # torch has no public name for it yet


def size(mesh: DeviceMesh | None, axis: str) -> int:
    """Ranks along an axis (see `submesh`); 1 without a mesh."""
    return 1 if mesh is None else submesh(mesh, axis).size()


def rank_in(mesh: DeviceMesh | None, axis: str) -> int:
    """This rank's index along an axis; 0 without a mesh."""
    return 0 if mesh is None else submesh(mesh, axis).get_local_rank()


def parameter_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """What FSDP shards over: "fsdp", or HSDP's two axes."""
    sharded = submesh(mesh, "fsdp")
    if mesh["dp_replicate"].size() == 1:
        return sharded
    return DeviceMesh._concatenate([mesh["dp_replicate"], sharded])


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(rank, size) along the data: which share of the global batch is ours. Ranks of one sample have the same."""
    if mesh is None:
        return 0, 1
    shards = mesh["dp_shard"].size()
    return rank_in(mesh, "dp_replicate") * shards + rank_in(mesh, "dp_shard"), mesh["dp_replicate"].size() * shards


def reports_loss(mesh: DeviceMesh | None) -> bool:
    """Whether this rank's losses count: of the ranks that work on one sample, one of the last stage does."""
    last = rank_in(mesh, "pp") == size(mesh, "pp") - 1
    return last and rank_in(mesh, "cp") == 0 and rank_in(mesh, "tp") == 0


def describe(mesh: DeviceMesh | None) -> str:
    """The layout in a few words: what is not 1."""
    if mesh is None:
        return "1 rank"
    names = [f"{name} {mesh[name].size()}" for name in AXES if mesh[name].size() > 1]
    return f"{dist.get_world_size()} ranks" + (f" ({', '.join(names)})" if names else "")
