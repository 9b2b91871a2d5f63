"""How many bytes a rank holds in training, to be compared with what an estimate says."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.estimate.peak import PeakMemory
from mm_parallel.frozen import count_frozen
from mm_parallel.grads import finish_gradients
from mm_parallel.step import forward_backward


def measure_memory(
    run: Any,
    model: nn.Module,
    count: int,
    inputs: Callable[[int], Mapping[str, Any]],
    losses: Callable[[Tensor, int], Tensor],
    mesh: DeviceMesh | None,
    outlines: Callable[[int], Mapping[str, Any]] | None = None,
) -> dict[str, int]:
    """Trains some steps on the CPU; returns bytes by name: parameters, gradients, moments (of AdamW), and `peak`: the
    most that forward and backward of a step make.

    model: holds this rank's parameters. All else is as in `forward_backward`.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=False)
    memory, peaks = PeakMemory("cpu"), []
    with memory:  # from the beginning: FSDP gives back and takes again what it made in the first step
        for _ in range(7):
            moments = sum(held(state.values()) for state in optimizer.state.values())
            memory.peak = memory.now
            forward_backward(run, count, inputs, losses, 1.0, mesh, outlines)
            peaks.append(memory.peak - moments + 4 * len(optimizer.state))  # whose numbers of steps are not seen
            finish_gradients(model, mesh)
            gradients = held(p.grad for p in trained)
            optimizer.step()
            optimizer.zero_grad()
    return {
        "parameters": held(model.parameters()) + count_frozen(model),
        "gradients": gradients,
        "moments": moments,
        "peak": min(peaks[1:]),  # a thread of gloo may let a buffer go late, on a busy machine often
    }


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of memory of this rank's parts, also where FSDP pads them."""
    parts = [x.to_local() if hasattr(x, "to_local") else x for x in tensors if x is not None]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in parts if x.numel()}
    return sum(storages.values())
