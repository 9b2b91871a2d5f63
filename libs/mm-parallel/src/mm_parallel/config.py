"""What a user asks for, as data; every layout that cannot be is refused here, with numbers.

This file imports no torch, so that a command line can be read, and a typo answered, without waiting for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Literal

_Count = Annotated[int, ">= 1"]
Layers = tuple[_Count, ...] | tuple[tuple[_Count, ...], ...]
"""Layers of each pipeline stage: flat, or nested (outer: virtual stages, inner: ranks)."""
Forgotten = Literal["none", "full", "but_attention"]
"""What a layer forgets in the forward."""
Base = Literal["dtype", "fp8", "int8", "nf4"]
"""In what frozen matrices are held, see `mm_parallel.quantise`."""
AttentionName = Literal["auto", "cpu", "flash", "cudnn", "efficient", "npu", "math", "flash3", "flash4"]
"""The kernel of attention between tokens, see `mm_parallel.attention.backends`."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the ranks are laid out: pp x dp_replicate x dp_shard x ring x ulysses x tp, neighbours in the last."""

    dp_replicate: Annotated[int, ">= 1"] = 1
    """Copies of the model. More than 1 with dp_shard > 1 is HSDP."""
    dp_shard: Literal[-1] | Annotated[int, ">= 1"] = -1
    """Ranks over which one copy is sharded (FSDP), each with samples of its own. -1 takes what is left."""
    cp: Annotated[int, ">= 1"] | None = None
    """Ranks that share the tokens of a sample: ulysses x ring of them. What is not given of the three is what fits; cp
    alone is Ulysses.
    """
    ulysses: Annotated[int, ">= 1"] | None = None
    """Of these, ranks that exchange tokens for heads in every attention. Any number of heads and tokens."""
    ring: Annotated[int, ">= 1"] | None = None
    """Of these, ranks that pass keys and values around. For more ranks than heads, and between hosts."""
    tp: Annotated[int, ">= 1"] = 1
    """Ranks that share every matrix of a layer. Must divide the heads (of keys, where they are fewer)."""
    pp_layers: Layers = ()
    """Layers of each pipeline stage: [8, 8, 7, 7], or [[4, 4], [4, 4]] for two virtual stages on each of two ranks.
    Empty: no pipeline.
    """
    schedule: Literal["1f1b", "zero_bubble"] = "1f1b"
    """Of the pipeline. zero_bubble fills the bubble with weight gradients, and cannot recompute."""

    @property
    def pp(self) -> int:
        """Pipeline ranks; 1 without a pipeline."""
        return len(self.stages[0]) if self.pp_layers else 1

    @property
    def splits(self) -> bool:
        """Whether the backwards of a pipeline are in halves."""
        return self.pp > 1 and self.schedule == "zero_bubble"

    @property
    def stages(self) -> tuple[tuple[int, ...], ...]:
        """`pp_layers` nested: layers by virtual stage, then by rank. Raises ValueError for a shape that is neither."""
        nested = [isinstance(part, (list, tuple)) for part in self.pp_layers]
        if any(nested) != all(nested):
            raise ValueError(f"pp_layers {self.pp_layers}: give one list, or a list of lists, not a mix of the two")
        rows = tuple(map(tuple, self.pp_layers)) if any(nested) else (tuple(self.pp_layers),)
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"pp_layers {self.pp_layers}: every virtual stage must name the same number of ranks")
        if self.pp_layers and min(min(row, default=0) for row in rows) < 1:
            raise ValueError(
                f"pp_layers {self.pp_layers}: a stage needs at least one layer; leave the stage out instead"
            )
        if self.pp_layers and len(rows[0]) == 1:
            raise ValueError(f"pp_layers {self.pp_layers}: one rank is no pipeline; leave pp_layers out")
        return rows

    def resolve(self, world: int) -> "ParallelConfig":
        """The same layout for `world` ranks, nothing left open. Raises ValueError where it does not fit."""
        for name in ("dp_replicate", "tp", "cp", "ulysses", "ring"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1 (1 is none of it)")
        if self.dp_shard < 1 and self.dp_shard != -1:
            raise ValueError(f"dp_shard={self.dp_shard}: must be at least 1, or -1 for what is left")
        if self.schedule not in ("1f1b", "zero_bubble"):
            raise ValueError(f"schedule={self.schedule!r}: there are '1f1b' and 'zero_bubble'")
        whole = self._with_context()
        sizes = {
            "pp_layers": whole.pp,
            "dp_replicate": whole.dp_replicate,
            "dp_shard": whole.dp_shard,
            "ring": whole.ring,
            "ulysses": whole.ulysses,
            "tp": whole.tp,
        }
        asked = {name: size for name, size in sizes.items() if size != 1 and name != "dp_shard"}
        rest = prod(asked.values())
        if self.dp_shard == -1:
            if world % rest:
                raise ValueError(
                    f"{world} ranks cannot be laid out as {_product(asked)} = {rest} ranks times dp_shard: "
                    f"{_way_out(asked, world)}, or start {-(-world // rest) * rest} ranks"
                )
            whole = replace(whole, dp_shard=world // rest)
        elif rest * self.dp_shard != world:
            asked["dp_shard"] = self.dp_shard
            needed = rest * self.dp_shard
            fits = [f"start {needed} ranks"]
            if world % rest == 0:
                fits.append(f"dp_shard={world // rest} (or -1: what is left)")
            others = needed // self.dp_replicate
            if world % others == 0 and world != others:
                fits.append(f"dp_replicate={world // others}")
            raise ValueError(
                f"{_product(asked)} is a layout of {needed} ranks, but {world} were started: {', or '.join(fits)}; "
                f"each must divide {world} ({_divisors(world)})"
            )
        return whole

    def _with_context(self) -> "ParallelConfig":
        cp, ulysses, ring = self.cp, self.ulysses, self.ring
        if cp is None:
            return replace(self, cp=(ulysses or 1) * (ring or 1), ulysses=ulysses or 1, ring=ring or 1)
        if ulysses is None:
            if cp % (ring or 1):
                raise ValueError(f"cp={cp} cannot be ulysses x ring={ring}: ring must divide {cp} ({_divisors(cp)})")
            ulysses = cp // (ring or 1)
        if ring is None:
            if cp % ulysses:
                raise ValueError(f"cp={cp} cannot be ulysses={ulysses} x ring: must divide {cp} ({_divisors(cp)})")
            ring = cp // ulysses
        if ulysses * ring != cp:
            raise ValueError(
                f"cp={cp} is not ulysses={ulysses} x ring={ring} = {ulysses * ring}: leave one of them out"
            )
        return replace(self, ulysses=ulysses, ring=ring)


@dataclass(frozen=True)
class MemoryConfig:
    """What is paid in time for memory."""

    recompute: Forgotten | Annotated[int, ">= 0"] | tuple[Forgotten, ...] = "none"
    """What a layer forgets in the forward and computes again in the backward: "none", "full" (all but its input) or
    "but_attention" (all but its input and what core attention made). One word for all layers, or one for each layer of
    the whole model. Or a number: the first k layers of each pipeline rank (all, if it has fewer) in full.
    """
    but_attention: Annotated[int, ">= 0"] = 0
    """With a number (or alone): so many layers after those recompute all but core attention."""
    offload: Literal["none", "attention", "inputs"] = "none"
    """What goes to the host until the backward: what "but_attention" keeps of attention, or the inputs of recomputed
    layers.
    """
    reshard: bool = True
    """Whether FSDP drops a layer's gathered weights after its forward (and gathers them again for the backward)."""
    prefetch: Annotated[int, ">= 0"] = 0
    """How many layers ahead FSDP gathers weights. 0 leaves it to FSDP: one in the backward, and in the forward as far
    as the host is ahead of the device.
    """
    offload_params: bool = False
    """FSDP's shards, their gradients and their optimizer states live on the host."""
    reduce: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which FSDP sends and sums gradients over ranks. bfloat16 sends half the bytes, and rounds every sum to 8
    bits. What is kept in fp32 is reduced in fp32 all the same.
    """
    base: Base = "dtype"
    """In what the matrices of layers that are not trained are held: dtype (that of the computation), fp8 or int8 (a
    byte for each number, and a scale for each row), or nf4 (half a byte, and a scale for 64 numbers). They become
    matrices of the computation's dtype for each product, and are made so while the weights are read.
    """
    host_layers: Annotated[int, ">= 0"] = 0
    """How many layers, of each ladder on each pipeline rank (all, if it has fewer), have these matrices in the host's
    memory. The device holds those of two layers: of the one that runs, and of the one that comes next.
    """

    @property
    def holds_frozen(self) -> bool:
        """Whether frozen matrices are held apart from the other parameters, see `mm_parallel.frozen`."""
        return self.base != "dtype" or self.host_layers > 0


def check_in_stem(layers: Sequence[int] | Sequence[Sequence[int]], flag: str) -> None:
    """Whether a ladder in the stem (a vision tower) is on the first pipeline stage, where it runs as a whole.

    layers: how many of its layers are on each stage, as others' scripts say it: [32, 0, 0, 0]; nested like `pp_layers`
        with virtual stages. flag: its name, for the message. Raises ValueError for layers behind the first stage.
    """
    first, *later = (count for row in layers for count in (row if isinstance(row, (list, tuple)) else (row,)))
    if any(later):
        raise ValueError(
            f"{flag} {list(layers)}: {sum(later)} of {first + sum(later)} layers are behind the first stage, but a "
            "ladder in the stem runs there as a whole. Put all of them first, and let that stage have fewer layers of "
            "pp_layers"
        )


def _product(sizes: dict[str, int]) -> str:
    return " x ".join(f"{name}={size}" if name != "pp_layers" else f"{size} stages" for name, size in sizes.items())


def _way_out(sizes: dict[str, int], world: int) -> str:
    """For each size the values that would fit, the others as they are."""
    rest, ways = prod(sizes.values()), []
    for name, size in sizes.items():
        others = rest // size
        if world % others == 0:
            fitting = _divisors(world // others)
            ways.append(
                f"{name} must divide {world // others} ({fitting})" if name != "pp_layers" else f"use {fitting} stages"
            )
    return ", or ".join(ways) or f"their product must divide {world} ({_divisors(world)})"


def _divisors(n: int) -> str:
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)
