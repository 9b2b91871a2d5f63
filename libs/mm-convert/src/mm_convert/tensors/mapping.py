"""Lazy tensors by name, as a mapping to torch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mm_convert.tensors.views import LazyTensor

if TYPE_CHECKING:
    import torch


class Tensors(Mapping[str, "torch.Tensor"]):
    """Names to tensors that lie in files; only headers are read until a tensor is asked for.

    Attributes:
        tensors: name -> where its bytes are, in the order of the files.
    """

    def __init__(self, tensors: Mapping[str, LazyTensor]) -> None:
        self.tensors = dict(tensors)
        self._maps: Any = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:  # a Mapping would read the tensor to find out
        return name in self.tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def dtype(self, name: str) -> str:
        """As safetensors spells it: "F32", "BF16", …"""
        return self.tensors[name].dtype

    def meta(self, name: str) -> torch.Tensor:
        """Shape and dtype as a tensor on the meta device."""
        from mm_convert.tensors.torch import DTYPES, torch

        return torch.empty(self.shape(name), dtype=DTYPES[self.dtype(name)], device="meta")

    def __getitem__(self, name: str) -> torch.Tensor:
        """The tensor, mapped from the file where it lies in one piece: it takes memory only where it is read."""
        from mm_convert.tensors.torch import Maps

        self._maps = self._maps or Maps()
        return self._maps.tensor(self.tensors[name])


def lazy_tensors(tensors: Mapping[str, torch.Tensor], names: Iterable[str]) -> dict[str, LazyTensor]:
    """The reverse, of tensors on any device: each is asked for when its bytes are wanted.

    A mapping that has a method `meta(name)` is asked by it for shape and dtype; `Tensors` are lazy already.
    """
    if isinstance(tensors, Tensors):
        return {name: tensors.tensors[name] for name in names}
    return {name: _lazy(tensors, name) for name in names}


def _lazy(tensors: Mapping[str, torch.Tensor], name: str) -> LazyTensor:
    from mm_convert.tensors.torch import lazy

    meta = tensors.meta(name) if hasattr(tensors, "meta") else tensors[name]
    return lazy(meta, lambda: tensors[name], name)
