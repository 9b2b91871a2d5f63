"""Gradients after the backward: the rule of scaling, averaging what is replicated, the global norm.

The rule, once: **the gradient of a step is that of the sum of its losses, divided by the total weight of the step.**
Both run over all ranks and all micro-batches. A loss counts as often as its weight says: once for a video, once for
each label token of a conversation. The total is known before the step, and is the same on every rank. So every token
counts alike, whatever the layout:

- data: FSDP and `finish_gradients` take the mean over the ranks that share a parameter's values. With D data ranks,
  each divides the sum of its own losses by total / D. The mean over the ranks is then the sum of all losses over the
  total.
- context (ring x ulysses): these ranks compute the same loss, each through its own tokens. `gather` joins the tokens,
  so each rank's loss depends on all of them; its backward keeps the gradient of the own tokens, times the number of
  context ranks. A parameter's gradient on one rank is then that number times its part, and the mean is the sum of the
  parts.
- tensor: these ranks compute the same loss from the same tokens; columns, rows and norms make what is replicated
  complete on each, so nothing is left to do.
- pipeline: a parameter lives on one stage.
- micro-batches: each divides the sum of its losses by the same number, and gradients add up.

FSDP averages what it shards (it never needs a divide factor, which gloo could not do); `finish_gradients` averages the
rest.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from mm_parallel.mesh import size, submesh

AnyTensor = TypeVar("AnyTensor", bound=Tensor)


def finish_gradients(model: nn.Module, mesh: DeviceMesh | None) -> None:
    """Averages over data and context ranks the gradients of what FSDP left replicated; once per step, before clipping.

    One collective per dtype. Does nothing on one device. A parameter without gradient on some ranks counts as zero
    there; without gradient on all, it keeps none.
    """
    meshes = [submesh(mesh, axis) for axis in ("fsdp", "dp_replicate") if size(mesh, axis) > 1]
    if not meshes:
        return
    groups: dict[tuple, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad and not is_sharded(parameter):
            groups[parameter.dtype, parameter.device].append(parameter)
    for parameters in groups.values():
        _average(parameters, meshes)


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP has it: a parameter that only tensor parallelism cuts is replicated over all other axes."""
    return isinstance(parameter, DTensor) and parameter.device_mesh.mesh_dim_names != ("tp",)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _average(parameters: list[nn.Parameter], meshes: list[DeviceMesh]) -> None:
    missing = [i for i, p in enumerate(parameters) if p.grad is None]
    used = _local(parameters[0]).new_ones(len(parameters))
    for i in missing:
        used[i] = 0.0  # on the device: for a list of numbers the host would wait until it is there
    grads = [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in parameters]
    flat = torch.cat([used, *(grad.flatten() for grad in grads)])
    for mesh in meshes:
        dist.all_reduce(flat, group=mesh.get_group())
        flat /= mesh.size()
    used, *means = flat.split([len(parameters), *(grad.numel() for grad in grads)])
    torch._foreach_copy_(grads, [mean.view_as(grad) for grad, mean in zip(grads, means, strict=True)])
    for i in missing:
        if used[i]:
            parameters[i].grad = _like(parameters[i], grads[i])


def _like(parameter: nn.Parameter, grad: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return grad
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(grad, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)


def by_layout(tensors: Iterable[AnyTensor]) -> list[list[AnyTensor]]:
    """The tensors in lists of one device, mesh and placement: kernels that take lists of tensors refuse a mix."""
    groups: dict[tuple, list[AnyTensor]] = defaultdict(list)
    for tensor in tensors:
        layout = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        groups[layout, tensor.device].append(tensor)
    return list(groups.values())


def clip_grad_norm(model: nn.Module | Iterable[Tensor], max_norm: float, mesh: DeviceMesh | None = None) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most `max_norm`; returns the norm before, a plain scalar.

    Parameters may be any mix of Tensors and of DTensors of several meshes; with `mesh` also of several pipeline stages.
    The result is that of one device. All ranks call it. `max_norm=inf` only measures. A non-finite norm is returned,
    and gradients are then useless: look at it. Raises ValueError for a `max_norm` that is not positive.
    """
    if not max_norm > 0:  # 0 would stop training in silence, less would turn every step around
        raise ValueError(f"max_norm is {max_norm}, but must be more than 0; inf does not clip")
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    groups = by_layout(p for p in parameters if p.grad is not None)
    norms = [get_total_norm([p.grad for p in group]) for group in groups]
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    # the same on all ranks, so that all reduce by the same backend: what comes first may lie on the host on some
    device = mesh.device_type if mesh is not None else norms[0].device if norms else "cpu"
    norms = [norm.to(device) for norm in norms] or [torch.zeros((), device=device)]
    total = torch.linalg.vector_norm(torch.stack(norms))
    if size(mesh, "pp") > 1:
        square = total.square()
        dist.all_reduce(square, group=mesh.get_group("pp"))
        total = square.sqrt()
    if max_norm < float("inf"):
        factor = (max_norm / (total + 1e-6)).clamp(max=1)  # torch's, to the bit
        for group in groups:  # every rank its own part: DTensor would work out the layout of each product first
            torch._foreach_mul_([_local(p.grad) for p in group], factor.to(group[0].device))
    return total
