"""Tensor parallelism: being written."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.plan import ParallelPlan


def cut(model: nn.Module, plan: ParallelPlan, mesh: DeviceMesh) -> None:
    raise NotImplementedError
