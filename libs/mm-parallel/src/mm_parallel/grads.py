"""Gradients after the backward: the rule of scaling, averaging what is replicated, the global norm.

The rule, once: **every rank's loss is the mean over its samples, all ranks have equally many, and a gradient is the
mean over the data ranks.** Then it is the gradient of the mean over the global batch, as on one device. With n
micro-batches per step the loss is divided by n before each backward, and gradients add up. FSDP averages what it shards
(it never needs a divide factor, which gloo could not do); `finish_gradients` averages the rest.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mm_parallel.mesh import DATA_DIMS


def finish_gradients(model: nn.Module) -> None:
    """Averages over the data ranks the gradients of what FSDP left replicated; once per step, before clipping.

    One collective per dtype and data dim. Does nothing on one device. A parameter without gradient on some ranks counts
    as zero there; without gradient on all, it keeps none.
    """
    mesh = next((p.device_mesh for p in model.parameters() if isinstance(p, DTensor)), None)
    if mesh is None:
        return
    replicated = [p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)]
    for dtype in dict.fromkeys(p.dtype for p in replicated):
        _average([p for p in replicated if p.dtype == dtype], mesh)


def _average(parameters: list[nn.Parameter], mesh: DeviceMesh) -> None:
    used = parameters[0].new_tensor([p.grad is not None for p in parameters])
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([used, *(grad.flatten() for grad in grads)])
    for dim in mesh.mesh_dim_names or ():
        if dim in DATA_DIMS:
            dist.all_reduce(flat, group=mesh.get_group(dim))
            flat /= mesh[dim].size()
    used, *means = flat.split([len(parameters), *(grad.numel() for grad in grads)])
    for parameter, grad, mean, use in zip(parameters, grads, means, used.tolist(), strict=True):
        parameter.grad = grad.copy_(mean.view_as(grad)) if use else None


def clip_grad_norm(model: nn.Module | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales all gradients so that their global 2-norm is at most `max_norm`; returns the norm before, a plain scalar.

    Parameters may be any mix of Tensors and of DTensors of several meshes; the result is that of one device. All ranks
    call it. `max_norm=inf` only measures. A non-finite norm is returned, and gradients are then useless: look at it.
    Raises ValueError for a `max_norm` that is not positive.
    """
    if not max_norm > 0:  # 0 would stop training in silence, less would turn every step around
        raise ValueError(f"max_norm is {max_norm}, but must be more than 0; inf does not clip")
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    groups: dict[DeviceMesh | None, list[Tensor]] = defaultdict(list)  # foreach ops refuse a mix
    for parameter in parameters:
        if parameter.grad is not None:
            groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    norms = [get_total_norm([p.grad for p in group]) for group in groups.values()]
    if not norms:
        return torch.zeros(())
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        clip_grads_with_norm_(group, max_norm, total)
    return total
