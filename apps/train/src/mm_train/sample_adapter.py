"""An adapter that acts while samples are made, and at no other time: a distilled one, for samples in a few steps.

It is added to the weights as they lie, whatever the layout: of a sharded weight each rank adds to its own part. Before,
the part is copied to the host, and put back afterwards: so training goes on with the same bits. What is held in 8 or 4
bits, or waits on the host, is left as it is: there the factors run beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_convert import open_experts, open_lora
from mm_convert.lora.base import check_base
from mm_models.layers import wide
from mm_models.lora import Weighted, check_fit
from mm_parallel.frozen import FrozenLinear, frozen_linears
from mm_parallel.fsdp import drop_gathered
from mm_train.adapter import describe_base
from mm_train.config import Config
from mm_train.objective import architecture


def open_sample_adapter(config: Config, model: nn.Module) -> Weighted | None:
    """The adapter of --sample.lora; only headers are read. model: whole, on the meta device.

    ValueError for what is no adapter, or is that of another model or of two experts.
    """
    path = config.sample.lora
    if path is None:
        return None
    if not path.exists():
        raise ValueError(f"--sample.lora {path} does not exist")
    if open_experts(path) is not None:
        raise ValueError(
            f"--sample.lora {path} is for two experts, and samples are made by one model: name one of its folders"
        )
    try:
        adapter = open_lora(path)
    except ValueError as error:
        way = f"; `mm-convert convert {path} TARGET --lora_alpha …` writes it down" if "alpha" in str(error) else ""
        raise ValueError(f"--sample.lora: {error}{way}") from error
    family = architecture(config)[0]
    if adapter.family.name not in family.checkpoints:
        raise ValueError(f"--sample.lora {path} is for {adapter.family.name}, and the model is of {family.name}")
    check_base(adapter.trained_on, describe_base(config), f"--sample.lora {path}")
    found = Weighted(adapter, adapter.alphas, adapter.differences, config.sample.lora_strength)
    shapes = {_published(name): p.shape for name, p in model.named_parameters()}
    try:
        check_fit(found, shapes, all_there=True)
    except ValueError as error:
        raise ValueError(f"--sample.lora {path} is for another model: {error}") from error
    return found


@contextmanager
def acting(adapter: Weighted | None, model: nn.Module) -> Iterator[None]:
    """Inside the block the weights that this rank holds have the adapter in them; without one, nothing happens."""
    if adapter is None:
        yield
        return
    drop_gathered(model)  # of an evaluation, which may keep them
    changed, held = {*adapter.parameters}, list[tuple[Tensor, Tensor]]()
    with ExitStack() as hooks, torch.no_grad():
        try:
            for name, linear in frozen_linears(model).items():
                if (published := _published(name)) in changed:
                    hooks.callback(linear.register_forward_hook(_beside(adapter, published)).remove)
            for name, parameter in model.named_parameters():
                if (published := _published(name)) in changed:
                    for local, part in _parts(parameter.detach()):
                        held.append((local, local.to("cpu", copy=True)))
                        local.copy_(wide(local) + adapter.added(published, part, local.device))
            yield
        finally:
            drop_gathered(model)
            for local, before in held:
                local.copy_(before)


def _published(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _parts(parameter: Tensor) -> Iterator[tuple[Tensor, tuple[slice, ...]]]:
    """What this rank holds of a parameter, and where that is in it."""
    if not isinstance(parameter, DTensor):
        yield parameter, ()
        return
    for chunk in parameter.__create_chunk_list__():  # as `load_parameters` fills it
        if 0 not in chunk.sizes:
            part = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            yield parameter.to_local(), part


def _beside(adapter: Weighted, parameter: str) -> Callable[[FrozenLinear, tuple[Any, ...], Tensor], Tensor]:
    """A forward hook that adds what the adapter makes of the input of a linear."""
    factors, whole = adapter.factors(parameter), adapter.whole(parameter)

    def add(linear: FrozenLinear, inputs: tuple[Any, ...], out: Tensor) -> Tensor:
        (x,) = inputs
        move = partial(torch.Tensor.to, device=x.device, dtype=x.dtype)
        if factors is not None:
            out = out + F.linear(F.linear(x, move(factors[0])), move(factors[1]))
        return out if whole is None else out + F.linear(x, move(whole))

    return add
