"""Where what a layer keeps for its backward waits: on the device, or on the host.

To the host and back, on a side stream while the device computes:

    forward    layer 0 | layer 1  | layer 2  | …          backward   layer 2   | layer 1   | layer 0
    side               | 0 leaves | 1 leaves | …                     1 returns | 0 returns

The last layer of a forward is still here when its backward begins at once, and is then used as it is. Each call of a
layer has a `Sent` of its own, so that a pipeline may have several micro-batches on their way.

On memory and streams. The device's allocator gives memory back when the last reference goes, for whatever is put on
the *compute* stream next. So a tensor that the side stream reads or writes is referenced until the compute stream has
been told to wait for that. (`record_stream` would be shorter, but frees only what the device has finished when the
host asks, and the host is many layers ahead: nothing would be saved.)
"""

import logging
import weakref

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Run = tuple[str, int]
"""Layers that follow each other in one forward: the ladder's prefix, and a number."""


class Kept:
    """What one call of a layer keeps: tuples of tensors, in the order in which they were made. Here: as they are."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Tensor, ...]] = []

    @property
    def count(self) -> int:
        return len(self._tensors)

    def put(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors.append(tensors)

    def fetch(self) -> None:
        """Called when the layer's backward begins, before `get`."""

    def get(self, i: int) -> tuple[Tensor, ...]:
        return self._tensors[i]


class Host:
    """The traffic between the device and the host of one model, or of a pipeline rank's part of it."""

    def __init__(self) -> None:
        self.side = None  # made when the first tensor says what the device is
        self._leaving: weakref.ref[Parcel] | None = None
        self._runs: dict[Run, dict[str, weakref.ref[Sent]]] = {}

    def __deepcopy__(self, memo: dict) -> "Host":
        return Host()  # a copy of the model has its own traffic, and streams cannot be copied

    def begin_call(self, name: str, run: Run) -> "Sent":
        """For one call of the layer `name`; layers of one run follow each other in one forward."""
        calls = self._runs.setdefault(run, {})
        if name in calls:  # the next micro-batch
            calls.clear()
        before = next(reversed(calls.values()), None)
        sent = Sent(self, name, before)
        calls[name] = weakref.ref(sent)
        return sent

    def send(self, name: str, tensors: tuple[Tensor, ...]) -> "Parcel":
        device = tensors[0].device
        if self.side is None:
            self.side = torch.get_device_module(device).Stream()
        if self._leaving is not None and (last := self._leaving()) is not None:
            last.leave()  # so at most one copy is on its way, and one parcel's memory with it
        parcel = Parcel(name, tensors, self.side)
        self._leaving = weakref.ref(parcel)
        return parcel


class Sent(Kept):
    """The same, on the host."""

    def __init__(self, host: Host, name: str, before: "weakref.ref[Sent] | None") -> None:
        self._host, self._name, self._before = host, name, before
        self._parcels: list[Parcel] = []

    @property
    def count(self) -> int:
        return len(self._parcels)

    def put(self, tensors: tuple[Tensor, ...]) -> None:
        self._parcels.append(self._host.send(self._name, tensors))

    def fetch(self) -> None:
        """Starts this call's return, unless it was started one layer ago, and that of the layer before."""
        before = None if self._before is None else self._before()
        for sent in (self, before):
            for parcel in sent._parcels if sent is not None else ():
                parcel.fetch()

    def get(self, i: int) -> tuple[Tensor, ...]:
        return self._parcels[i].get()


class Parcel:
    """Tensors that go to the host and come back together."""

    copied = None  # event at the end of the last copy, until the compute stream waits for it

    def __init__(self, name: str, tensors: tuple[Tensor, ...], side) -> None:
        self.name, self.side, self.device = name, side, tensors[0].device
        self.module = torch.get_device_module(self.device)
        self.here: tuple[Tensor, ...] | None = tensors
        self.compute = self.module.current_stream()
        side.wait_stream(self.compute)  # what is copied has been computed
        with self.module.stream(side):
            self.host = tuple(_to_host(tensor) for tensor in tensors)
            self.copied = side.record_event()
        log.debug("%s leaves", name)

    def leave(self) -> None:
        """Gives back the device's memory."""
        self._settle()  # what is computed into that memory next comes after the copy
        self.here = None

    def _settle(self) -> None:
        if self.copied is not None:
            self.compute.wait_event(self.copied)
            self.copied = None

    def fetch(self) -> None:
        """Starts the way back."""
        if self.here is not None:
            return
        self.compute = self.module.current_stream()
        # Allocated on the compute stream, where it will be used and given back. Kernels that had this memory before
        # may still run: the copy comes after them.
        self.here = tuple(torch.empty_like(t, device=self.device) for t in self.host)
        self.side.wait_stream(self.compute)
        with self.module.stream(self.side):
            for tensor, source in zip(self.here, self.host, strict=True):
                tensor.copy_(source, non_blocking=True)
            self.copied = self.side.record_event()
        log.debug("%s returns", self.name)

    def get(self) -> tuple[Tensor, ...]:
        self.fetch()
        assert self.here is not None
        self._settle()  # for the copy that brought it; what never left could do without
        log.debug("%s is used", self.name)
        return self.here

    def __del__(self) -> None:
        self._settle()  # a graph that is thrown away half-way must not free what is being copied


def _to_host(tensor: Tensor) -> Tensor:
    # Pinned memory is what a device copies on its own; its allocator knows which copies are pending.
    pinned = tensor.device.type != "cpu"
    return torch.empty_like(tensor, device="cpu", pin_memory=pinned).copy_(tensor, non_blocking=True)
