"""Numbers of ranks in place of ranks."""

from collections.abc import Mapping

from mm_parallel.config import ParallelConfig
from mm_parallel.context.items import Grids, Items, deal
from mm_parallel.mesh import AXES


class AbsentRanks:
    """What `mm_parallel` asks of a mesh and of a group, of which the first rank alone is there.

    Enough to cut a model on the meta device and to run it there: tensors without values are sent to nobody.
    """

    ndim = 1

    def __init__(self, sizes: Mapping[str, int], name: str = "") -> None:
        self.sizes, self.group_name = sizes, name

    def __getitem__(self, axes: str | tuple[str, ...]) -> "AbsentRanks":
        axes = (axes,) if isinstance(axes, str) else axes
        return AbsentRanks({axis: self.sizes[axis] for axis in axes}, "x".join(axes))

    def _flatten(self, name: str) -> "AbsentRanks":
        return AbsentRanks({name: self.size()}, name)

    def size(self) -> int:
        product = 1
        for size in self.sizes.values():
            product *= size
        return product

    def rank(self) -> int:
        return 0

    def get_local_rank(self) -> int:
        return 0

    def get_group(self) -> "AbsentRanks":
        return self


def absent_mesh(layout: ParallelConfig) -> AbsentRanks:
    """In place of `make_mesh`, for a resolved layout."""
    sizes = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.ring, layout.ulysses, layout.tp)
    return AbsentRanks(dict(zip(AXES, sizes, strict=True)))


class FullestItems(Items):
    """The items of the rank that has most rows of them, whichever that is."""

    def _fullest(self, grids: Grids) -> Items:
        pieces, _ = deal(tuple(map(tuple, grids)), self.group.size())
        rows = [sum(stop - start for start, stop in own) for own in pieces]
        return Items(rows.index(max(rows)), self.group, self.merge)

    def share(self, x, grids):
        return self._fullest(grids).share(x, grids)

    def collect(self, y, grids):
        return self._fullest(grids).collect(y, grids)
