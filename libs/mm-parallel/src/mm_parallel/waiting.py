"""Layers whose frozen matrices wait in the host's memory, and come one ahead of the layer that runs.

    forward    layer 0 | layer 1 | layer 2 | …          backward   layer 2 | layer 1 | layer 0
    side       1 comes | 2 comes | 3 comes |                       1 comes | 0 comes |

The device has two buffers, each as large as the largest layer. Nothing goes back, as nothing has changed. Where a
forward turns into a backward, and a step into the next, both layers are there already.

On streams: a buffer is written again when the layer after the one that used it begins. The side stream waits for what
the compute stream has been handed by then, so for all that reads the buffer, and computing waits for the copy. Matrices
are used as soon as they are asked for, and nobody keeps them: so recompute, and backwards in any order, are right too,
though they may wait.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_ALIGNED = 256
_PIECE = 2**30
"""Bytes of pinned memory that are asked for at a time: torch rounds each up to a power of two."""


class _Buffer(NamedTuple):
    bytes: Tensor
    unit: int
    parts: tuple[Tensor, ...]
    ready: Any
    """Event at the end of the copy."""


class HostLayers:
    """The matrices of one model, or of a pipeline rank's part of it, by unit: one for each layer, in their order."""

    def __init__(self) -> None:
        self.units: list[list[Tensor]] = []
        self.copied = 0
        """Bytes that have come to the device so far."""
        self._piece: Tensor | None = None
        self._used = 0
        self._buffers: list[_Buffer | None] = [None, None]
        self._last = -1
        self._side: Any = None

    def __deepcopy__(self, memo: dict) -> "HostLayers":
        copy = HostLayers()  # what waits never changes and is shared; streams and events cannot be copied
        copy.units = [list(unit) for unit in self.units]
        return copy

    def add(self) -> int:
        """The number of one more unit, which runs after those before it."""
        self.units.append([])
        return len(self.units) - 1

    def put(self, unit: int, tensors: Sequence[Tensor]) -> slice:
        """One more matrix of it. What is on the meta device gets values by `replace`."""
        own = self.units[unit]
        own.extend(x if x.is_meta else self._pin(x) for x in tensors)
        return slice(len(own) - len(tensors), len(own))

    def replace(self, unit: int, slots: slice, tensors: Sequence[Tensor]) -> None:
        self.units[unit][slots] = [self._pin(x) for x in tensors]

    def held(self, unit: int, slots: slice) -> tuple[Tensor, ...]:
        return tuple(self.units[unit][slots])

    @property
    def largest(self) -> int:
        """Bytes of each of the two buffers."""
        return max((sum(padded(x.nbytes) for x in unit) for unit in self.units), default=0)

    def fetch(self, unit: int, device: torch.device, again: bool = False) -> tuple[Tensor, ...]:
        """A unit's tensors on the device, and the start of the way for the next. They are to be used at once.

        again: whether the last unit may be followed by the first, as no backward comes.
        """
        if device.type == "meta":
            return tuple(x.to("meta") for x in self.units[unit])
        buffer = self._find(unit) or self._bring(unit, device, besides=-1)
        if unit != self._last:
            following = unit - 1 if unit == self._last - 1 else unit + 1
            following = 0 if following == len(self.units) and again else following
            if 0 <= following < len(self.units) and self._find(following) is None:
                self._bring(following, device, besides=unit)
            self._last = unit
        if buffer.ready is not None:
            torch.get_device_module(device).current_stream().wait_event(buffer.ready)
        return buffer.parts

    def _find(self, unit: int) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer is not None and buffer.unit == unit), None)

    def _bring(self, unit: int, device: torch.device, besides: int) -> _Buffer:
        """Starts the copy into a buffer that is not that of the unit `besides`."""
        slot = 0 if self._buffers[0] is None or self._buffers[0].unit != besides else 1
        old = self._buffers[slot]
        flat = torch.empty(self.largest, dtype=torch.uint8, device=device) if old is None else old.bytes
        parts, sources, start = [], self.units[unit], 0
        for source in sources:
            part = flat[start : start + source.nbytes]
            parts.append(part.view(source.dtype).view(source.shape))
            start += padded(source.nbytes)
        module = torch.get_device_module(device)
        if self._side is None:
            self._side = module.Stream()
        self._side.wait_stream(module.current_stream())  # what reads this buffer was handed over before
        with module.stream(self._side):
            for part, source in zip(parts, sources, strict=True):
                part.view(torch.uint8).copy_(source.view(torch.uint8), non_blocking=True)
            ready = self._side.record_event()
        self.copied += sum(source.nbytes for source in sources)
        log.debug("%d comes", unit)
        self._buffers[slot] = _Buffer(flat, unit, tuple(parts), ready)
        return self._buffers[slot]

    def _pin(self, x: Tensor) -> Tensor:
        """A copy in the host's memory, which an accelerator reads by itself."""
        size = padded(x.nbytes)
        if self._piece is None or self._used + size > self._piece.numel():
            pinned = torch.accelerator.is_available()
            room = max(size, _PIECE) if pinned else size
            self._piece, self._used = torch.empty(room, dtype=torch.uint8, device="cpu", pin_memory=pinned), 0
        part = self._piece[self._used : self._used + x.nbytes].view(x.dtype).view(x.shape)
        self._used += size
        part.view(torch.uint8).copy_(x.detach().contiguous().view(torch.uint8))
        return part


def padded(size: int) -> int:
    """Bytes that a tensor of this size takes in a buffer."""
    return -(-size // _ALIGNED) * _ALIGNED
