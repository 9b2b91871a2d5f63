"""What a layout may be, as arithmetic: no ranks are started here."""

from itertools import product
from math import prod

import pytest

from mm_parallel import ParallelConfig
from mm_parallel.config import check_in_stem


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (1, 1, 1)),
        ({"cp": 6}, (6, 6, 1)),
        ({"cp": 6, "ring": 3}, (6, 2, 3)),
        ({"cp": 6, "ulysses": 3}, (6, 3, 2)),
        ({"ring": 3}, (3, 1, 3)),
        ({"ulysses": 2, "ring": 3}, (6, 2, 3)),
        ({"cp": 6, "ulysses": 2, "ring": 3}, (6, 2, 3)),
    ],
)
def test_context_ranks_are_ulysses_times_ring(asked, expected):
    layout = ParallelConfig(**asked).resolve(12)
    assert (layout.cp, layout.ulysses, layout.ring) == expected
    assert layout.dp_shard == 12 // layout.cp


SIZES = {"dp_replicate": (1, 2, 3), "dp_shard": (-1, 1, 2), "cp": (None, 2, 3), "tp": (1, 2), "pp_layers": ((), (1, 2))}


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12])
def test_a_layout_is_resolved_or_refused_and_then_its_ranks_are_all_there(world):
    refused = 0
    for values in product(*SIZES.values()):
        config = ParallelConfig(**dict(zip(SIZES, values, strict=True)))
        rest = config.dp_replicate * (config.cp or 1) * config.tp * config.pp
        fits = world % rest == 0 if config.dp_shard == -1 else rest * config.dp_shard == world
        if fits:
            layout = config.resolve(world)
            dims = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
            assert prod(dims) == world
            assert layout.resolve(world) == layout
        else:
            with pytest.raises(ValueError, match=rf"{world} (ranks|were started)"):
                config.resolve(world)
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("config", "world", "message"),
    [
        ({"cp": 6, "ring": 4}, 12, r"cp=6 cannot be ulysses x ring=4: ring must divide 6 \(1, 2, 3, 6\)"),
        ({"cp": 6, "ulysses": 4}, 12, r"cp=6 cannot be ulysses=4 x ring: must divide 6 \(1, 2, 3, 6\)"),
        ({"cp": 6, "ulysses": 2, "ring": 2}, 12, r"cp=6 is not ulysses=2 x ring=2 = 4: leave one of them out"),
        ({"cp": 0}, 8, r"cp=0: must be at least 1"),
        ({"tp": -2}, 8, r"tp=-2: must be at least 1"),
        ({"cp": 3, "tp": 2}, 8, r"8 ranks .* ulysses=3 x tp=2 = 6 ranks .* ulysses must divide 4 \(1, 2, 4\)"),
        ({"cp": 3, "tp": 3}, 8, r"their product must divide 8 \(1, 2, 4, 8\), or start 9 ranks"),
        ({"pp_layers": (1, 2, 3)}, 8, r"8 ranks .* 3 stages .* use 1, 2, 4, 8 stages, or start 9 ranks"),
        ({"pp_layers": (1, 0)}, 2, r"pp_layers \(1, 0\): a stage needs at least one layer"),
        ({"pp_layers": ((1, 2), (3,))}, 2, r"every virtual stage must name the same number of ranks"),
        ({"pp_layers": ((1, 2), 3)}, 2, r"give one list, or a list of lists"),
        ({"pp_layers": (4,)}, 2, r"pp_layers \(4,\): one rank is no pipeline; leave pp_layers out"),
        ({"schedule": "gpipe"}, 2, r"schedule='gpipe': there are '1f1b' and 'zero_bubble'"),
    ],
)
def test_impossible_layouts_name_the_numbers_and_the_way_out(config, world, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**config).resolve(world)


@pytest.mark.parametrize("layers", [(32,), (32, 0, 0, 0), [[32, 0], [0, 0]], (0, 0)])
def test_a_tower_on_the_first_stage_is_as_it_runs(layers):
    check_in_stem(layers, "vit_pp_layers")


@pytest.mark.parametrize("layers", [(16, 16), [[16, 0], [16, 0]]])
def test_a_tower_over_stages_is_refused(layers):
    message = r"vit_pp_layers \[.*16.*\]: 16 of 32 layers are behind the first stage, .* runs there as a whole"
    with pytest.raises(ValueError, match=message):
        check_in_stem(layers, "vit_pp_layers")
