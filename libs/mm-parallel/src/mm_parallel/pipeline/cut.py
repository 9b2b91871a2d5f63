"""Which rungs go where: pure arithmetic.

pp_layers ((2, 1), (1, 3)): two virtual stages on each of two ranks

           rank 0      rank 1
virtual 0  rungs 0 1   rung 2        stages 0 and 1
virtual 1  rung 3      rungs 4 5 6   stages 2 and 3
"""

Stages = tuple[tuple[int, ...], ...]
"""Rungs of each stage, by virtual stage, then by rank; see `ParallelConfig.stages`."""


def ranges(stages: Stages, rungs: int) -> list[range]:
    """The rungs of every stage, in the order in which they are climbed. Rank r of pp has the stages r, r + pp, …

    Raises ValueError when the stages do not have `rungs` rungs together.
    """
    sizes = [size for row in stages for size in row]
    if sum(sizes) != rungs:
        raise ValueError(
            f"pp_layers {_written(stages)} are {sum(sizes)} rungs, but the model has {rungs}: {_way_out(stages, rungs)}"
        )
    starts = [sum(sizes[:stage]) for stage in range(len(sizes))]
    return [range(start, start + size) for start, size in zip(starts, sizes, strict=True)]


def _way_out(stages: Stages, rungs: int) -> str:
    virtual, ranks = len(stages), len(stages[0])
    if rungs < virtual * ranks:
        return f"use at most {rungs} stages"
    return f"split evenly, for example, they are {_written(even(rungs, ranks, virtual))}"


def even(rungs: int, ranks: int, virtual: int = 1) -> Stages:
    """The most even split; what is left over goes to the first stages."""
    share, more = divmod(rungs, ranks * virtual)
    sizes = [share + (stage < more) for stage in range(ranks * virtual)]
    return tuple(tuple(sizes[v * ranks : (v + 1) * ranks]) for v in range(virtual))


def _written(stages: Stages) -> str:
    rows = [list(row) for row in stages]
    return str(rows if len(rows) > 1 else rows[0])
