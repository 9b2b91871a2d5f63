import pytest
import torch.distributed as dist

from mm_parallel import ParallelConfig, data_rank, make_mesh
from mm_parallel.testing import spawn


@pytest.mark.parametrize(
    ("config", "world", "expected"),
    [
        (ParallelConfig(), 1, (1, 1)),
        (ParallelConfig(), 6, (1, 6)),
        (ParallelConfig(2), 6, (2, 3)),
        (ParallelConfig(2, 3), 6, (2, 3)),
        (ParallelConfig(6, 1), 6, (6, 1)),
    ],
)
def test_minus_one_takes_what_is_left(config, world, expected):
    layout = config.resolve(world)
    assert (layout.dp_replicate, layout.dp_shard) == expected


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        (
            ParallelConfig(3),
            8,
            r"8 ranks .* dp_replicate=3 = 3 ranks times dp_shard: dp_replicate must divide 8 \(1, 2, 4, 8\)",
        ),
        (ParallelConfig(2, 2), 8, r"4 ranks, but 8 were started: start 4 ranks, or dp_shard=4 .*or dp_replicate=4"),
        (ParallelConfig(1, 3), 8, r"3 ranks, but 8 were started: start 3 ranks, or dp_shard=8"),
        (ParallelConfig(3, 3), 8, r"9 ranks, but 8 were started: start 9 ranks; each must divide 8 \(1, 2, 4, 8\)"),
        (ParallelConfig(0), 8, r"dp_replicate=0: must be at least 1"),
        (ParallelConfig(-1), 8, r"dp_replicate=-1: must be at least 1"),
        (ParallelConfig(1, 0), 8, r"dp_shard=0: must be at least 1, or -1"),
        (ParallelConfig(1, -2), 8, r"dp_shard=-2: must be at least 1, or -1"),
    ],
)
def test_impossible_layouts_are_refused_with_the_way_out(config, world, message):
    with pytest.raises(ValueError, match=message):
        config.resolve(world)


def test_one_process_cannot_hold_two_copies():
    with pytest.raises(ValueError, match="dp_replicate"):
        make_mesh(ParallelConfig(2), "cpu")


def mesh_of(rank: int, world: int, replicate: int) -> tuple:
    mesh = make_mesh(ParallelConfig(replicate), "cpu")
    return (
        mesh.mesh_dim_names,
        tuple(mesh.shape),
        dist.get_process_group_ranks(mesh.get_group("dp_shard")),
        data_rank(mesh),
    )


def test_neighbours_shard_and_every_rank_has_its_own_data():
    names = ("pp", "dp_replicate", "dp_shard", "ring", "ulysses", "tp")
    groups = [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert spawn(4, mesh_of, 2) == [(names, (1, 2, 2, 1, 1, 1), groups[rank], (rank, 4)) for rank in range(4)]
