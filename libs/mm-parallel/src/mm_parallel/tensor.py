"""Tensor parallelism: every rank holds some columns of a layer's first linears and the same rows of those after them.

    x ─► enter ─► column: x W_r + b_r ─► norm, attention, activation of these heads ─► row: y_r W_r ─► leave ─► + b

`enter` is the identity, and sums gradients over the ranks in the backward; `leave` sums over the ranks, and is the
identity in the backward. What is outside of the two is computed alike on every rank, gradients included. Between them a
rank knows only its heads, so a norm over all heads takes its mean of squares over the ranks. A vocabulary is cut by the
same two, see `mm_parallel.vocabulary`.

Parameters become DTensors on the mesh's "tp": names and global shapes stay, checkpoints and norms see whole tensors,
and FSDP shards them once more. The computation is local, by another `forward` on the instance.

Cost per layer, in sums of activations over the ranks: one for each row in the forward, one for each column in the
backward (Megatron has one for q, k and v together, which share an input), and for each norm a number per token in both.
"""

import logging
from collections.abc import Mapping
from functools import partial
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from mm_parallel.collectives import Enter, Leave, local_part
from mm_parallel.fsdp import check_same_values
from mm_parallel.plan import ParallelPlan
from mm_parallel.vocabulary import cut_embedding, cut_head, token_logits, token_losses


def cut(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh) -> None:
    """Cuts the plan's columns, rows, norms and vocabulary over mesh["tp"], in place.

    The rest stays whole on every rank, also an inner ladder whose plan has no columns. Works on a meta model; a real
    one must have the same values on every rank, of which each keeps its part. A linear with LoRA adapters (as peft
    makes them) is cut together with them. What is between a column and a row must take the number of heads from what
    it is given.

    Raises ValueError, before anything is cut, for a plan without columns, sizes that tp does not divide, a module that
    is of another class than it must be, adapters that drop out or are on a vocabulary, and ranks with different values.
    """
    # The norm of what tp and fsdp cut takes two collectives, of which torch warns again and again, on every rank.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    ranks = mesh["tp"]
    check_sizes(model, plan, ranks.size())
    parts = [[list(modules.values()) for modules in _modules_of(ladder, own)] for _, ladder, own in plan.ladders(model)]
    check_same_values(model, ranks)
    for (_, ladder, own), (columns, rows, norms, vocabulary) in zip(list(plan.ladders(model)), parts, strict=True):
        _cut(columns, rows, norms, ranks)
        if own.vocabulary:
            _cut_vocabulary(ladder, own, vocabulary, ranks)


def _cut_vocabulary(model: nn.Module, plan: ParallelPlan, parts: list[nn.Module], ranks: DeviceMesh) -> None:
    group = ranks.get_group()
    for module in parts:
        _keep(module, "weight", 0, ranks)
        (cut_embedding if isinstance(module, nn.Embedding) else cut_head)(module, group)
    plan.set_seam(model, plan.losses, partial(token_losses, group=group))
    plan.set_seam(model, plan.logits, partial(token_logits, group=group))


def _cut(columns: list[nn.Module], rows: list[nn.Module], norms: list[nn.Module], ranks: DeviceMesh) -> None:
    for linear in columns:
        base, adapters = _parts(linear)
        _column(base, ranks)
        for _, b in adapters:  # A makes the same few numbers on every rank
            _column(b, ranks)
    for linear in rows:
        base, adapters = _parts(linear)
        _row(base, ranks)
        for a, _ in adapters:  # B takes their sum, the same on every rank
            _row(a, ranks)
    for norm in norms:
        _norm(norm, ranks)


def _column(linear: nn.Linear, ranks: DeviceMesh) -> None:
    _keep(linear, "weight", 0, ranks)
    _keep(linear, "bias", 0, ranks)
    group = ranks.get_group()

    def forward(x: Tensor) -> Tensor:
        return F.linear(Enter.apply(x, group), _local(linear.weight, x), _local(linear.bias, x))

    linear.forward = forward


def _row(linear: nn.Linear, ranks: DeviceMesh) -> None:
    _keep(linear, "weight", 1, ranks)
    group = ranks.get_group()

    def forward(x: Tensor) -> Tensor:
        y = Leave.apply(F.linear(x, _local(linear.weight, x)), group)
        return y if linear.bias is None else y + _local(linear.bias, x)

    linear.forward = forward


def _norm(norm: nn.RMSNorm, ranks: DeviceMesh) -> None:
    _keep(norm, "weight", 0, ranks)
    group, width = ranks.get_group(), norm.normalized_shape[0]

    def forward(x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()  # as torch's, and as all of it before the last rounding
        squares = Leave.apply(wide.square().sum(-1, keepdim=True), group)
        squares = Enter.apply(squares, group)  # each rank's heads use the sum, so each has a part of its gradient
        eps = torch.finfo(x.dtype).eps if norm.eps is None else norm.eps
        y = wide * torch.rsqrt(squares / width + eps)
        return (y if norm.weight is None else y * _local(norm.weight, x).to(y.dtype)).to(x.dtype)

    norm.forward = forward


def check_sizes(model: nn.Module, plan: ParallelPlan, tp: int) -> None:
    """Raise ValueError where `tp` ranks cannot share the matrices of this model; needs no process group."""
    if not plan.columns:
        raise ValueError(f"tp={tp}: this model's plan declares no tensor parallelism; use tp=1")
    for _, ladder, own in plan.ladders(model):
        kinds = _modules_of(ladder, own)
        if own.columns:
            _check_sizes(own.heads, *kinds, tp)


def _modules_of(ladder: nn.Module, plan: ParallelPlan) -> list[dict[str, nn.Module]]:
    return [plan.modules_of(ladder, kind) for kind in ("columns", "rows", "norms", "vocabulary")]


def _local(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else local_part(parameter, x.dtype)


def _keep(module: nn.Module, name: str, dim: int, ranks: DeviceMesh) -> None:
    """Replaces a parameter by a DTensor whose local part is this rank's chunk of `dim`."""
    whole = getattr(module, name)
    if whole is None:
        return
    part = whole.detach().chunk(ranks.size(), dim)[ranks.get_local_rank()]
    cut = part.clone(memory_format=torch.contiguous_format)  # so that the whole can be freed
    if isinstance(ranks, DeviceMesh):  # and not `mm_parallel.meta`
        cut = DTensor.from_local(cut, ranks, [Shard(dim)], run_check=False)
    setattr(module, name, nn.Parameter(cut, requires_grad=whole.requires_grad))


def _parts(linear: nn.Module) -> tuple[nn.Module, list[tuple[nn.Linear, nn.Linear]]]:
    """A linear and its pairs of adapters A, B; without peft, whose layer is known by its attributes."""
    if not hasattr(linear, "lora_A"):
        return linear, []
    return linear.base_layer, [(linear.lora_A[name], linear.lora_B[name]) for name in linear.lora_A]


def _check_sizes(
    heads: int | Mapping[str, int], columns: dict, rows: dict, norms: dict, vocabulary: dict, tp: int
) -> None:
    sizes = dict(heads) if isinstance(heads, Mapping) else {"heads": heads} if heads else {}
    for name, module in columns.items():
        sizes[f"columns of {name}"] = _require(name, module, nn.Linear).out_features
    for name, module in rows.items():
        sizes[f"rows of {name}"] = _require(name, module, nn.Linear).in_features
    for name, module in norms.items():
        sizes[f"weights of {name}"] = _require(name, module, nn.RMSNorm).normalized_shape[0]
    for name, module in vocabulary.items():
        if hasattr(module, "lora_A"):
            raise ValueError(f"{name} has adapters, and its vocabulary cannot be cut over tp={tp} with them: use tp=1")
        sizes[f"tokens of {name}"] = len(_require(name, module, nn.Linear, nn.Embedding).weight)
    if len({module.weight for module in vocabulary.values()}) < len(vocabulary):
        raise ValueError(f"plan.vocabulary: {' and '.join(vocabulary)} share a weight; name the embedding alone")
    largest = gcd(*sizes.values())
    legal = ", ".join(str(n) for n in range(1, largest + 1) if largest % n == 0)
    for name, size in sizes.items():
        if size % tp:
            raise ValueError(f"{size} {name} cannot be cut over tp={tp}: for this model tp can be {legal}")


def _require(name: str, module: nn.Module, *kinds: type[nn.Module]) -> Any:
    base, _ = _parts(module)
    if not isinstance(base, kinds):
        able = " and ".join(kind.__name__ for kind in kinds)
        raise ValueError(f"plan: {name} is of type {type(base).__name__}; tp can only cut {able} there")
    if any(drop.p for drop in getattr(module, "lora_dropout", nn.Module()).modules() if isinstance(drop, nn.Dropout)):
        raise ValueError(f"the adapter of {name} has dropout, which tp ranks would draw apart: use dropout 0, or tp=1")
    return base
