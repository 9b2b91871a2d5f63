"""Gradients of a model in any layout, and whether they are those of another."""

from collections import defaultdict
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of every trained parameter by name, of this rank's pipeline stages (all ranks call it).

    Raises AssertionError where there is none.
    """
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, grad in grads.items():
        assert grad is not None, f"{name} has no gradient"
    return gather_whole(grads)


def gather_whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor's full values by name, as from `DTensor.full_tensor` (all ranks of its mesh call it).

    A test gathers hundreds of small ones: those cut alike are gathered together.
    """
    full = dict(tensors)
    alike: dict[tuple, list[str]] = defaultdict(list)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            cut = tuple(dim for dim, placement in enumerate(tensor.placements) if not placement.is_replicate())
            alike[tensor.device_mesh, cut, tensor.dtype, tensor.device].append(name)
    for (mesh, cut, *_), names in alike.items():
        flat = torch.cat([_among_zeros(tensors[name]).flatten() for name in names])
        for dim in cut:
            dist.all_reduce(flat, group=mesh.get_group(dim))
        parts = flat.split([tensors[name].numel() for name in names])
        full |= {name: part.view(tensors[name].shape) for name, part in zip(names, parts, strict=True)}
    return full


def _among_zeros(tensor: DTensor) -> Tensor:
    """This rank's part at its place, zeros elsewhere."""
    values = torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    (chunk,) = tensor.__create_chunk_list__()  # what torch's checkpoints ask; refuses partial sums
    place = values
    for dim, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        place = place.narrow(dim, start, length)
    place.copy_(tensor.to_local())
    return values


def assert_same_grads(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float, floor: float = 0
) -> None:
    """Compares gradients by name: |actual - expected| <= rtol max(|expected|, floor) in the 2-norm of each tensor.

    floor: what counts as no gradient at all. That of a key's bias, say, is nothing but rounding.
    """
    assert set(actual) == set(expected), f"different names: {sorted(set(actual) ^ set(expected))}"
    for name, want in expected.items():
        error, size = torch.linalg.vector_norm(actual[name] - want).item(), torch.linalg.vector_norm(want).item()
        size = max(size, floor)
        assert error <= rtol * size, f"gradient of {name}: error {error:.2e} is over {rtol:.0e} of {size:.2e}"
