"""Operations on the meta device, each worked out once for the same shapes.

What an operation makes there follows from shapes, strides and dtypes alone. torch finds it in Python, which takes up to
a millisecond. A layer runs hundreds of them, many alike, and once more where its backward recomputes it.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mm_parallel.estimate.kernels import Kernel, describe, moves_nothing
from mm_parallel.estimate.peak import tensors_in


def perform(op: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Kernel | None]:
    """(what an operation makes of these, the kernel that it is, if something runs)."""
    if moves_nothing(op):
        return op(*args, **kwargs), None
    given = {id(x): x for x in tensors_in((args, *kwargs.values()))}
    if not given or not all(x.is_meta for x in given.values()):
        result = op(*args, **kwargs)
        return result, describe(op, args, kwargs, result)
    numbers = {key: number for number, key in enumerate(given)}
    made, kernel = _work_out(op, _freeze(args, numbers), tuple(kwargs), _freeze(tuple(kwargs.values()), numbers))
    tensors = list(given.values())
    return _thaw(made, lambda like: like.make() if like.number is None else tensors[like.number]), kernel


class _Like(NamedTuple):
    """A tensor."""

    number: int | None
    """Among those that an operation is given; None: it is new."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


class _Many(NamedTuple):
    """A list, or a tuple."""

    kind: type
    values: tuple


class _Plain(NamedTuple):
    """Anything else: 1, 1.0 and True are three."""

    kind: type
    value: Any


@cache
def _work_out(op: Any, args: _Many, names: tuple[str, ...], values: _Many) -> tuple[Any, Kernel | None]:
    """The same, of frozen values."""
    tensors: dict[int, Tensor] = {}

    def make(like: _Like) -> Tensor:
        if like.number not in tensors:
            tensors[like.number] = like.make()
        return tensors[like.number]

    args, kwargs = _thaw(args, make), dict(zip(names, _thaw(values, make), strict=True))
    result = op(*args, **kwargs)
    return _freeze(result, {id(x): number for number, x in tensors.items()}), describe(op, args, kwargs, result)


def _freeze(value: Any, numbers: Mapping[int, int]) -> _Like | _Many | _Plain:
    """numbers: of tensors, by id."""
    if isinstance(value, Tensor):
        return _Like(numbers.get(id(value)), value.shape, value.stride(), value.dtype)
    if isinstance(value, (list, tuple)):
        return _Many(type(value), tuple([_freeze(one, numbers) for one in value]))
    return _Plain(type(value), value)


def _thaw(value: _Like | _Many | _Plain, make: Callable[[_Like], Tensor]) -> Any:
    if isinstance(value, _Like):
        return make(value)
    if isinstance(value, _Many):
        return value.kind([_thaw(one, make) for one in value.values])
    return value.value
