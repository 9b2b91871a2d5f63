"""The order in which a model is cut, stated once: tensor, frozen matrices, context, compile, recompute and offload,
fsdp.

A pipeline comes before all of it: see `mm_parallel.pipeline`.
"""

from typing import TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel import context, tensor
from mm_parallel.attention import choose_core
from mm_parallel.config import AttentionName, MemoryConfig, ParallelConfig
from mm_parallel.frozen import check_frozen, hold_frozen
from mm_parallel.fsdp import shard
from mm_parallel.mesh import describe, parameter_mesh, size
from mm_parallel.plan import ParallelPlan
from mm_parallel.recompute import recompute

Model = TypeVar("Model", bound=nn.Module)


def parallelize(
    model: Model,
    plan: ParallelPlan,
    mesh: DeviceMesh | None = None,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
    memory: MemoryConfig = MemoryConfig(),  # noqa: B008 (frozen)
    dtype: torch.dtype | None = None,
    attention: AttentionName = "auto",
    compile: bool | str = False,
) -> Model:
    """Cuts `model` in place as `plan` allows and `mesh = make_mesh(parallel, …)` says; returns it.

    Parameter names do not change, and neither do loss and gradients, up to rounding. With one rank (mesh None or of
    size 1) nothing is sharded and no process group is needed. Parameters are the optimizer's masters, usually fp32;
    `dtype` is what they are gathered in for the forward, but for what the plan keeps in fp32. The model itself must
    cast its weights to the dtype it computes in, so that it does the same unsharded. Call before making the optimizer.
    `attention` names the kernel of attention between tokens; "auto" takes one by device, dtype and shapes, see
    `mm_parallel.attention.choose`.
    compile: each layer by itself, see `mm_parallel.compile`; the name of a backend of torch.compile, or True for
    its default.

    Raises ValueError for what the plan or the sizes of the model do not allow, and for a layout with a pipeline: that
    is made by `Pipeline`.
    """
    if size(mesh, "pp") > 1:
        raise ValueError(f"pp_layers {parallel.pp_layers}: a model is cut into stages by mm_parallel.Pipeline")
    plan.check(model)
    check_frozen(model, plan, memory, size(mesh, "tp"))
    cut(model, plan, mesh, memory, dtype, attention, compile)
    return model


def cut(
    model: nn.Module,
    plan: ParallelPlan,
    mesh: DeviceMesh | None,
    memory: MemoryConfig,
    dtype: torch.dtype | None,
    attention: AttentionName = "auto",
    compile: bool | str = False,
) -> None:
    """All but the pipeline; `model` may be some stages of one, and `plan` what is left of the plan there."""
    if size(mesh, "tp") > 1:
        tensor.cut(model, plan, mesh)
    hold_frozen(model, plan, memory)
    cuts_tokens = size(mesh, "cp") > 1
    choose_core(model, plan, attention)
    if cuts_tokens:
        context.cut(model, plan, mesh, attention)
    if compile:
        from mm_parallel.compile import compile_layers  # with torch's compiler, which takes seconds to import

        compile_layers(model, plan, "inductor" if compile is True else compile)
    recompute(model, plan, memory, cuts_tokens, attention)
    shards = 1 if mesh is None else parameter_mesh(mesh).size()
    check_shards(shards, memory, describe(mesh))
    if mesh is not None and shards > 1:
        shard(model, plan, mesh, dtype, memory)


def check_shards(shards: int, memory: MemoryConfig, layout: str) -> None:
    """Raise ValueError where FSDP's shards are to move to the host, and there are none."""
    if memory.offload_params and shards == 1:
        raise ValueError(
            f"offload_params moves what FSDP shards, but nothing is sharded here ({layout}): leave it out, or "
            "let dp_shard, dp_replicate or cp be 2 or more"
        )
