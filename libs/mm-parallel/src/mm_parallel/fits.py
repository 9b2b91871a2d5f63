"""Whether a model can be cut as a layout says: asked before there is a process group, and nothing is changed."""

from torch import nn

from mm_parallel import context, tensor
from mm_parallel.config import MemoryConfig, ParallelConfig
from mm_parallel.frozen import check_frozen
from mm_parallel.order import check_shards
from mm_parallel.pipeline.pipeline import check_stages
from mm_parallel.pipeline.prune import Owner, find_trained
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import find_words


def check_fits(model: nn.Module, plan: ParallelPlan, layout: ParallelConfig, memory: MemoryConfig) -> None:
    """Raise ValueError where `parallelize` or `Pipeline` would: by the same checks.

    model: whole, also on the meta device. layout: with nothing left open, see `ParallelConfig.resolve`.
    """
    plan.check(model)
    check_frozen(model, plan, memory, layout.tp)
    if layout.pp > 1:
        check_stages(model, plan, layout, memory)
    if layout.tp > 1:
        tensor.check_sizes(model, plan, layout.tp)
    if layout.ring * layout.ulysses > 1:
        context.check_tokens(plan)
    find_words(model, plan, memory)
    shards = layout.dp_replicate * layout.dp_shard * layout.ring * layout.ulysses
    check_shards(shards, memory, f"dp_replicate x dp_shard x cp is {shards}")


def find_idle(model: nn.Module, plan: ParallelPlan, layout: ParallelConfig, memory: MemoryConfig) -> list[int]:
    """The pipeline ranks that hold nothing that is trained. ValueError as `check_fits`."""
    if layout.pp == 1:
        return []
    parts = check_stages(model, plan, layout, memory)
    trained = find_trained(model, plan.last, plan.companions)
    owned: list[set[Owner]] = [set() for _ in range(layout.pp)]
    for number, part in enumerate(parts):
        owned[number % layout.pp] |= set(part)
    owned[0].add("first")
    owned[(len(parts) - 1) % layout.pp].add("last")
    return [rank for rank, owners in enumerate(owned) if not owners & trained]
