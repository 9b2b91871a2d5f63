"""Encoders next to the model that is trained: on the device only while they work, and shared among ranks.

Neither knows what an encoder is: `encode` is any function from a sample (or a batch) to tensors, alone or in tuples,
lists and dicts. It runs without gradients.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._pytree import tree_leaves, tree_map_only

Raw = TypeVar("Raw")


def interleave(
    batches: Iterable[Raw],
    encode: Callable[[Raw], Any],
    every: int,
    place: Callable[[torch.device], Any],
    device: torch.device,
) -> Iterator[Any]:
    """The encoded batches, in order, `every` of them encoded at a time; between these times the encoder is on the host.

    The numbers are those of every=1; what changes is that the encoder, which may be larger than the model, moves less
    often. Encoded batches are on the CPU.

    place: moves the encoder to a device, as `module.to`. It begins and ends on the host, also when `encode` fails.

    Up to `every` batches are pulled ahead of the one that is given out: a position to resume from must be that of the
    batch, not of its source. Raises ValueError for `every` below 1.
    """
    if every < 1:
        raise ValueError(f"every={every}: must be at least 1 batch per move of the encoder")

    def generate() -> Iterator[Any]:
        source = iter(batches)
        while raw := list(islice(source, every)):
            yield from _encode_on(device, raw, encode, place)

    return generate()


@torch.no_grad()
def _encode_on(device: torch.device, raw: list, encode: Callable, place: Callable) -> list:
    try:
        place(device)
        return [tree_map_only(Tensor, Tensor.cpu, encode(batch)) for batch in raw]
    finally:
        place(torch.device("cpu"))


def ranks_of_sample(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    """The ranks that work on the same samples as this one (pp, ring, ulysses and tp); None if it is alone.

    The ranks of a pipeline help as well. Those of its middle throw away what they get, which costs them a copy.
    """
    if mesh is None:
        return None
    shared = mesh["pp", "ring", "ulysses", "tp"]._flatten("sample")  # torch has no public name for it yet
    return shared.get_group() if shared.size() > 1 else None


class _Outline(NamedTuple):
    """What is said of a tensor before it is sent."""

    shape: torch.Size
    dtype: torch.dtype
    device_type: str


@torch.no_grad()
def share_encoding(samples: Sequence[Raw], encode: Callable[[Raw], Any], group: dist.ProcessGroup | None) -> list[Any]:
    """[encode(sample) for sample in samples], the work shared: every rank of the group encodes some and has all.

    samples: the same on all ranks of the group; all call it. Rank r encodes samples r, r + size, …
    group: see `ranks_of_sample`; with None this rank encodes all.

    What is not a tensor is pickled. Raises ValueError on all ranks where they were given different numbers of samples,
    and RuntimeError on all when one fails, with its rank and its cause.
    """
    if group is None:
        return [encode(sample) for sample in samples]
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own, error = {}, None
    try:
        for i in range(rank, len(samples), size):
            own[i] = encode(samples[i])
    except Exception as raised:  # said to all below: a rank that just stopped would leave the others waiting
        error = raised

    outlines = {i: tree_map_only(Tensor, _outline, encoded) for i, encoded in own.items()}
    failure = None if error is None else f"sample {rank + len(own) * size}: {type(error).__name__}: {error}"
    said: list[Any] = [None] * size
    dist.all_gather_object(said, (len(samples), failure, outlines), group)
    counts, failures, everyone = zip(*said, strict=True)
    names = [f"rank {dist.get_global_rank(group, r)}" for r in range(size)]
    if any(failures):
        what = "; ".join(f"{name} could not encode {why}" for name, why in zip(names, failures, strict=True) if why)
        raise RuntimeError(what) from error
    if len(set(counts)) > 1:
        each = ", ".join(f"{name} has {count}" for name, count in zip(names, counts, strict=True))
        raise ValueError(f"ranks that share the encoding of samples were given different numbers of them: {each}")
    return [_exchange(own.get(i), everyone[i % size][i], i % size, group) for i in range(len(samples))]


def _outline(tensor: Tensor) -> _Outline:
    return _Outline(tensor.shape, tensor.dtype, tensor.device.type)


def _exchange(encoded: Any, outline: Any, source: int, group: dist.ProcessGroup) -> Any:
    """One sample, from the rank that has it to all."""
    ours = None if dist.get_rank(group) != source else iter([t for t in tree_leaves(encoded) if isinstance(t, Tensor)])

    def receive(outline: _Outline) -> Tensor:
        if ours is None:
            tensor = torch.empty(outline.shape, dtype=outline.dtype, device=outline.device_type)
        else:
            tensor = next(ours).contiguous()
        if tensor.numel():
            dist.broadcast(tensor, group=group, group_src=source)
        return tensor

    return tree_map_only(_Outline, receive, outline, is_leaf=lambda part: isinstance(part, _Outline))
