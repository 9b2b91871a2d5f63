"""Which layers go where: pure arithmetic.

pp_layers ((2, 1), (1, 3)): two virtual stages on each of two ranks

           rank 0      rank 1
virtual 0  layers 0 1  layer 2         stages 0 and 1
virtual 1  layer 3     layers 4 5 6    stages 2 and 3
"""

Stages = tuple[tuple[int, ...], ...]
"""Layers of each stage, by virtual stage, then by rank; see `ParallelConfig.stages`."""


def ranges(stages: Stages, layers: int) -> list[range]:
    """The layers of every stage, in the order in which they run. Rank r of pp has the stages r, r + pp, …

    Raises ValueError when the stages are not `layers` together.
    """
    sizes = [size for row in stages for size in row]
    if sum(sizes) != layers:
        raise ValueError(
            f"pp_layers {_format(stages)} are {sum(sizes)} layers, but the model has {layers}: "
            f"{_way_out(stages, layers)}"
        )
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _way_out(stages: Stages, layers: int) -> str:
    virtual, ranks = len(stages), len(stages[0])
    if layers < virtual * ranks:
        return f"use at most {layers} stages"
    return f"split evenly, for example, they are {_format(even(layers, ranks, virtual))}"


def even(layers: int, ranks: int, virtual: int = 1) -> Stages:
    """The most even split; what is left over goes to the first stages."""
    share, more = divmod(layers, ranks * virtual)
    sizes = [share + (stage < more) for stage in range(ranks * virtual)]
    return tuple(tuple(sizes[v * ranks : (v + 1) * ranks]) for v in range(virtual))


def _format(stages: Stages) -> str:
    rows = [list(row) for row in stages]
    return str(rows if len(rows) > 1 else rows[0])
