"""The two ends of what tensor-parallel ranks compute apart (see `mm_parallel.tensor`), and gathering by rows."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import DTensor


class Enter(torch.autograd.Function):
    """The same x on all ranks, as it is; the backward sums their gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return sum_over(grad, ctx.group), None


class Leave(torch.autograd.Function):
    """The sum over the ranks, the same on all; the backward hands its gradient on as it is."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if torch.compiler.is_compiling():  # torch 2.11: behind a sum in place, the backward would be lost
        return _op(x, group.group_name)
    x = x.clone(memory_format=torch.contiguous_format)  # others may hold it
    dist.all_reduce(x, group=group)
    return x


@torch.library.custom_op("mm_parallel::sum_over", mutates_args=())
def _op(x: Tensor, group: str) -> Tensor:
    return sum_over(x, _resolve_process_group(group))


_op.register_fake(lambda x, group: x.new_empty(x.shape))


_gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor  # the old name


def gather_rows(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The x of all ranks, each of the same shape and contiguous, one behind the other along dim 0. No autograd."""
    whole = x.new_empty((group.size() * len(x), *x.shape[1:]))
    _gather(whole, x, group=group)
    return whole


def local_part(parameter: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """This rank's part of a parameter, in a dtype. To be asked at call time: FSDP exchanges the parameter."""
    if isinstance(parameter, DTensor):
        parameter = parameter.to_local()
    return parameter if dtype is None else parameter.to(dtype)
