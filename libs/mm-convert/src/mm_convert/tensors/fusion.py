"""Tensors that one dialect keeps whole and another keeps as one: q, k and v; gate and up.

The fused tensor is made of groups of rows. In each group come the rows of the first part, then of the second, …:

    groups = number of key-value heads:  q of group 0, k 0, v 0, q of group 1, k 1, v 1, …     (Megatron's linear_qkv)
    groups = 1:                          all of gate, all of up                                 (Megatron's linear_fc1)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mm_convert.tensors.views import LazyTensor, Rows, rows, vstack

Counts = Mapping[str, int]


@dataclass(frozen=True)
class Fusion:
    """How one name of a dialect is made of several tensors, by names of counts (`num_heads`, or a plain number).

    `parts`: part -> its share of the rows, for example {"q": "num_heads", "k": "num_kv_heads", "v": "num_kv_heads"}.
    The parts are called `name#part` in the table. If `stacked`, our tensor is one too, its parts simply one below the
    other, and it is called `name#whole`.
    """

    name: str
    parts: Mapping[str, str]
    groups: str = "1"
    stacked: bool = False

    @property
    def names(self) -> list[str]:
        """What the table calls the parts."""
        return [f"{self.name}#whole"] if self.stacked else [f"{self.name}#{part}" for part in self.parts]

    def join(self, ours: Sequence[LazyTensor], counts: Counts) -> LazyTensor:
        """Our tensors, in the order of `names`, as the one of the dialect."""
        parts = list(ours)
        if self.stacked:
            heights = self._heights(ours[0].height, counts)
            tops = [sum(heights[:n]) for n in range(len(heights))]
            parts = [rows(ours[0], top, top + height) for top, height in zip(tops, heights, strict=True)]
        heights = self._heights(sum(part.height for part in parts), counts)
        if [part.height for part in parts] != heights:
            found = ", ".join(f"{part} {p.height}" for part, p in zip(self.parts, parts, strict=True))
            raise ValueError(f"{self.name} is to be made of rows {found}, by its numbers of heads they are {heights}")
        groups = _count(self.groups, counts)
        if groups == 1:
            return vstack(parts)
        strips = [part.height // groups for part in parts]
        return Rows(
            tuple((p, g * s, (g + 1) * s) for g in range(groups) for p, s in zip(parts, strips, strict=True)),
        )

    def cut(self, whole: LazyTensor, counts: Counts) -> list[LazyTensor]:
        """The reverse: our tensors, in the order of `names`."""
        groups = _count(self.groups, counts)
        strips = [height // groups for height in self._heights(whole.height, counts)]
        group = sum(strips)
        tops = [sum(strips[:n]) for n in range(len(strips))]
        ours: list[LazyTensor] = [
            Rows(tuple((whole, g * group + top, g * group + top + strip) for g in range(groups)))
            for top, strip in zip(tops, strips, strict=True)
        ]
        return [vstack(ours)] if self.stacked else ours

    def _heights(self, height: int, counts: Counts) -> list[int]:
        """The rows of each part in a fused tensor of so many rows."""
        shares = [_count(count, counts) for count in self.parts.values()]
        groups = _count(self.groups, counts)
        if height % sum(shares) or any(share % groups for share in shares):
            said = ", ".join(f"{part} {share}" for part, share in zip(self.parts, shares, strict=True))
            raise ValueError(f"{self.name} has {height} rows; they cannot be {groups} groups of {said} heads")
        return [height // sum(shares) * share for share in shares]


def _count(name: str, counts: Counts) -> int:
    if not name.isdecimal() and name not in counts:
        raise ValueError(
            f"{name} is unknown, by which tensors are fused; a config.json beside the tensors could say it"
        )
    return int(name) if name.isdecimal() else counts[name]
