"""Whole tensors into a model that may be sharded or not, and out of it; one tensor at a time."""

from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mm_parallel.frozen import frozen_linears
from mm_parallel.grads import is_sharded


def load_parameters(
    model: nn.Module,
    source: Mapping[str, Any],
    device: torch.device,
    elsewhere: Collection[str] = (),
    offload_params: bool = False,
) -> None:
    """Fills every parameter and persistent buffer of `model` from `source`, which has exactly their names and shapes.

    source: whole tensors by name, or anything with `.shape` that slices to tensors. It is read one name at a time, and
        of a sharded parameter only this rank's rows: what is mmapped stays on disk, and no rank holds the whole model.
        Any floating dtype for a floating parameter; it is cast to the parameter's.
    device: where a meta model's shards are allocated and where an unsharded model is moved to.
    elsewhere: names that other pipeline stages hold: `source` must have them, and they are not read.
    offload_params: see `allocate`.

    Call after `parallelize` and before making the optimizer. Raises ValueError with the nearest names for missing and
    unexpected names, and with both shapes or dtypes for a misfit; after an error the model's values are undefined.
    """
    frozen = frozen_linears(model)
    check_names(set(model.state_dict()) | set(frozen) | set(elsewhere), set(source))
    allocate(model, device, offload_params)
    with torch.no_grad():
        for name, linear in frozen.items():
            whole = source[name]
            check_shape(name, whole, linear.outline)
            linear.fill(same_kind(name, whole[...], linear.outline), device)
        for name, target in model.state_dict().items():
            whole = source[name]
            check_shape(name, whole, target)
            if not isinstance(target, DTensor):
                target.copy_(same_kind(name, whole[...], target))
                continue
            for chunk in target.__create_chunk_list__():  # what DCP asks, too: right for every placement
                rows = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                if 0 not in chunk.sizes:
                    target.to_local().copy_(same_kind(name, whole[rows], target))


def full_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, whole tensor on the CPU) for every parameter and persistent buffer, gathered one at a time.

    Gathering is a collective: all ranks iterate to the end, also those that throw the tensors away.
    """
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        yield name, whole.detach().to("cpu", copy=True)


def check_shape(name: str, given: Any, target: Tensor) -> None:
    """Raise ValueError unless what is given has the shape that is wanted."""
    if tuple(given.shape) != tuple(target.shape):
        raise ValueError(f"{name} has shape {tuple(given.shape)}, but the model needs {tuple(target.shape)}")


def same_kind(name: str, values: Tensor, target: Tensor) -> Tensor:
    """The values, unless integers stand where fractions belong: quantised weights, or another tensor by mistake. Only
    their dtype counts, so they may be on the meta device.
    """
    if target.is_floating_point() and not values.is_floating_point():
        raise ValueError(f"{name} is {values.dtype}, but the model needs floating numbers, as {target.dtype}")
    return values


def allocate(model: nn.Module, device: torch.device, offload_params: bool = False) -> None:
    """Gives a meta model memory without values (its real buffers keep theirs), or moves one that is not sharded.

    offload_params: FSDP's shards lie on the host, as `MemoryConfig.offload_params` says.
    """
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    if not any(t.is_meta for t in tensors.values()):
        if not any(isinstance(t, DTensor) for t in tensors.values()):  # else parallelize has placed it
            model.to(device)
        return
    lost = [name for name, t in tensors.items() if t.is_meta and name not in model.state_dict()]
    if lost:
        raise ValueError(f"{', '.join(lost)}: a buffer that no checkpoint holds cannot be built on the meta device")
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    # as to_empty does it
    model._apply(lambda t: torch.empty_like(t, device="cpu" if offload_params and is_sharded(t) else device))
    for name, buffer in model.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])


def check_names(wanted: set[str], given: set[str]) -> None:
    """Raise ValueError with the nearest names unless the names are the same."""
    missing, unexpected = sorted(wanted - given), sorted(given - wanted)
    if not missing and not unexpected:
        return
    said = [f"the weights do not fit the model: {len(missing)} missing, {len(unexpected)} unexpected"]
    for kind, names, others in (("missing", missing, unexpected), ("unexpected", unexpected, missing)):
        for name in names[:5]:
            near = get_close_matches(name, others, n=1)
            said.append(f"{kind}: {name}" + (f" (is it {near[0]}?)" if near else ""))
        if len(names) > 5:
            said.append(f"{kind}: … and {len(names) - 5} more")
    raise ValueError("; ".join(said))
