"""The dims of the mesh, and this rank's place in them."""

from torch.distributed.device_mesh import DeviceMesh

DATA_DIMS = ("dp_replicate", "dp_shard")


def data_rank(mesh: DeviceMesh | None) -> tuple[int, int]:
    """(rank, size) along the data: which share of the global batch is ours. Every rank of both dims has its own."""
    if mesh is None:
        return 0, 1
    rank = 0
    for dim in DATA_DIMS:
        rank = rank * mesh[dim].size() + mesh.get_local_rank(dim)
    return rank, mesh[DATA_DIMS].size()
