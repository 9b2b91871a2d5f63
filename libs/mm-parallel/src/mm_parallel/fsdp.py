"""FSDP2 and HSDP: every rank holds a part of each parameter, of its gradient and of its optimizer state.

A layer's parameters are gathered just before it runs and dropped after it. What the plan keeps in fp32 must be read in
fp32, but one fully_shard group is gathered in one dtype. So these parameters leave their layer's group:

- the largest modules that hold nothing else and own a matrix (a time embedding, its projection) become groups
  of their own, gathered in fp32;
- the rest (modulation tables, norm weights) is replicated: a group of a few KiB costs a collective and saves nothing.
  `finish_gradients` averages their gradients.
"""

import warnings
from itertools import takewhile
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from mm_parallel.config import MemoryConfig
from mm_parallel.mesh import parameter_mesh
from mm_parallel.plan import ParallelPlan


def shard(
    model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh, dtype: torch.dtype | None, memory: MemoryConfig
) -> None:
    """Shards `model` in place over the mesh's data and context axes: units, groups in fp32, then each
    ladder's own.

    dtype: what parameters are gathered in, but for those kept in fp32; None gathers them as they are. Gradients are
    reduced in fp32 (fp64 for fp64 parameters), or as `memory.reduce` says, but for parameters kept in fp32. Parameters
    end on the mesh's device; a meta model stays meta until `load_parameters`. Raises ValueError when ranks hold
    different values, for a prefetch below 0, and for an unknown dtype of reduction.
    """
    # A layer hands on the tensors of the stream that it does not change, and FSDP makes these views: torch warns of
    # every ladder that whoever writes into them in place gets wrong gradients. A stream is never written in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    if memory.reduce not in ("float32", "bfloat16"):
        raise ValueError(f"reduce={memory.reduce!r}: there are 'float32' and 'bfloat16'")
    data = parameter_mesh(mesh)
    check_same_values(model, data)
    groups = group(model, plan)
    for parameter in groups.replicated:
        if not parameter.is_meta:
            parameter.data = parameter.data.to(_device_of(data))
    widest = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
    narrow = torch.bfloat16 if memory.reduce == "bfloat16" else None
    host = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if memory.offload_params else OffloadPolicy()
    for name, module in groups.modules.items():
        gathered, reduced = (None, widest) if name in groups.in_fp32 else (dtype, narrow or widest)
        policy = MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=reduced, cast_forward_inputs=False)
        # The root's own are dropped after a forward, too (FSDP would keep them): or else the next evaluation would not
        # see what was written to the shards in between, say an EMA's weights.
        fully_shard(
            module,
            mesh=data,
            mp_policy=policy,
            offload_policy=host,
            ignored_params=groups.replicated,
            reshard_after_forward=memory.reshard,
        )
    for _, ladder, own in plan.ladders(model):
        _prefetch(own.units_of(ladder), list(own.units_in_order(ladder)), memory.prefetch)


class Groups(NamedTuple):
    """What is gathered and reduced together."""

    modules: dict[str, nn.Module]
    """By name, the inner first: each has the parameters that none before it has. The last is the model ("")."""
    in_fp32: frozenset[str]
    """Those of them that hold nothing but what stays in fp32."""
    replicated: set[nn.Parameter]
    """In none of them."""


def group(model: nn.Module, plan: ParallelPlan) -> Groups:
    """The groups of a model, or of a pipeline rank's part of it."""
    ladders = list(plan.ladders(model))
    in_fp32 = {p for _, ladder, own in ladders for p in own.fp32_parameters(ladder).values()}
    apart = _fp32_groups("", model, in_fp32)
    modules = {prefix.removesuffix("."): ladder for prefix, ladder, _ in ladders} | apart
    for prefix, ladder, own in ladders:
        modules |= {prefix + name: unit for name, unit in own.units_of(ladder).items()}
    return Groups(
        {name: modules[name] for name in sorted(modules, key=_depth, reverse=True)},
        frozenset(name for name, module in modules.items() if in_fp32.issuperset(module.parameters())),
        in_fp32 - {parameter for module in apart.values() for parameter in module.parameters()},
    )


def drop_gathered(model: nn.Module) -> None:
    """Makes every parameter its shard again, before it is written to between forward and backward.

    Without reshard, an evaluation leaves the weights gathered, and until the next backward they are what the model
    holds and computes with, whatever its shards say. No collective; does nothing where nothing is gathered.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _prefetch(units: dict[str, nn.Module], order: list[str], ahead: int) -> None:
    """Lets each unit gather those that come next; not those behind a gap, which another pipeline stage runs."""
    if ahead < 0:
        raise ValueError(f"prefetch={ahead}: must be 0 (as FSDP does it) or how many layers ahead weights are gathered")
    by_position = {order.index(name): unit for name, unit in units.items()}
    for position, unit in by_position.items() if ahead else ():
        for step, look_ahead in (
            (1, unit.set_modules_to_forward_prefetch),
            (-1, unit.set_modules_to_backward_prefetch),
        ):
            following = (by_position.get(position + step * n) for n in range(1, ahead + 1))
            look_ahead(list(takewhile(lambda other: other is not None, following)))


def _fp32_groups(name: str, module: nn.Module, in_fp32: set[nn.Parameter]) -> dict[str, nn.Module]:
    own = list(module.parameters())
    if own and in_fp32.issuperset(own):
        return {name: module} if any(p.ndim >= 2 for p in own) else {}
    groups = {}
    for child_name, child in module.named_children():
        groups |= _fp32_groups(f"{name}.{child_name}".lstrip("."), child, in_fp32)
    return groups


def _depth(name: str) -> int:
    return name.count(".") + bool(name)


def _device_of(mesh: DeviceMesh) -> torch.device:
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


def check_same_values(model: nn.Module, mesh: DeviceMesh) -> None:
    """Ranks that initialised with different seeds would train a patchwork of models, without any other sign."""
    named = [(name, p) for name, p in model.named_parameters() if not p.is_meta]
    if not named:
        return
    parts = [p.to_local() if isinstance(p, DTensor) else p for _, p in named]  # tensor-parallel ranks have parts
    sums = torch.stack([part.detach().contiguous().flatten().view(torch.uint8).sum() for part in parts])
    extremes = torch.stack([sums, -sums]).to(_device_of(mesh))
    for dim in range(mesh.ndim):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, group=mesh.get_group(dim))
    different = (extremes[0] != -extremes[1]).nonzero().flatten().tolist()
    if different:
        raise ValueError(
            f"{len(different)} parameters differ between ranks (first: {named[different[0]][0]}): build the model with "
            "the same seed on every rank, or on the meta device and fill it with load_parameters"
        )
