"""How many bytes tensors take, counted as they come and go; on any device, also of fake tensors."""

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, UntypedStorage
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Within it, `now` is the bytes of what was made and still lives, and `peak` the most that this has been.

    What was there before does not count, nor what an op uses while it runs. What FSDP gives back and takes again does.

    device_type: only tensors of this type of device count; by default all.
    """

    def __init__(self, device_type: str | None = None) -> None:
        super().__init__()
        self.device_type, self.now, self.peak = device_type, 0, 0
        self._bytes: weakref.WeakKeyDictionary[UntypedStorage, list[int]] = weakref.WeakKeyDictionary()

    def __enter__(self) -> "PeakMemory":
        self._resize, resize = UntypedStorage.resize_, UntypedStorage.resize_

        def counted(storage: UntypedStorage, size: int) -> Any:  # FSDP frees a gathered weight like this
            result = resize(storage, size)
            if storage in self._bytes:
                self._count(self._bytes[storage], size)
            return result

        UntypedStorage.resize_ = counted
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        UntypedStorage.resize_ = self._resize
        super().__exit__(*error)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again as its local part
        kwargs = kwargs or {}
        if is_view(op):
            return self.perform(op, args, kwargs)
        before = {tensor.untyped_storage() for tensor in tensors_in((args, *kwargs.values()))}
        result = self.perform(op, args, kwargs)
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            if storage in self._bytes or storage in before:
                continue
            if self.device_type in (None, tensor.device.type):
                self._bytes[storage] = counted = [0]
                self._count(counted, storage.nbytes())
                weakref.finalize(storage, self._count, counted, 0)
        return result

    def perform(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return op(*args, **kwargs)

    def _count(self, counted: list[int], size: int) -> None:
        self.now += size - counted[0]
        counted[0] = size
        self.peak = max(self.peak, self.now)


def is_view(op: Any) -> bool:
    """Whether an operation only gives another name to memory that is there."""
    return getattr(op, "is_view", False)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Of what an operation is given, or makes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors_in(each)
