"""Gradients of a model in any layout, and whether they are those of another."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The whole gradient of every trained parameter by name, of this rank's pipeline stages (all ranks call it).

    Raises AssertionError where there is none.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad
        whole[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return whole


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
