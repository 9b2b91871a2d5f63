"""Which of several ranks to look at."""

from mm_parallel.context.items import Grids, Items, deal


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
