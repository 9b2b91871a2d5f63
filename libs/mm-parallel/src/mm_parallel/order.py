"""The order in which a model is cut, stated once: recompute, then fsdp."""

from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.config import MemoryConfig
from mm_parallel.fsdp import shard
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import recompute

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    plan: ParallelPlan,
    mesh: DeviceMesh | None = None,
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    dtype: torch.dtype | None = None,
) -> Model:
    """Cuts `model` in place as `plan` allows and `mesh` (of `ParallelConfig.mesh`) asks; returns it.

    Parameter names do not change, and neither do loss and gradients, up to rounding. With one rank (mesh None or of
    size 1) nothing is sharded and no process group is needed. Parameters are the optimizer's masters, usually fp32;
    `dtype` is what they are gathered in for the forward, islands of the plan excepted. The model itself must cast its
    weights to the dtype it computes in, so that it does the same unsharded. Call before making the optimizer.
    """
    plan.islands_of(model)  # a misspelt pattern is an error on one rank, too
    recompute(model, plan, memory.recompute)
    if mesh is not None and mesh.size() > 1:
        shard(model, plan, mesh, dtype)
    return model
