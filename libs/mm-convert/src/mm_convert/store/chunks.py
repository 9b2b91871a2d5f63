"""Joining the chunks of a sharded tensor: rectangles of rows and columns that must tile it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from mm_convert.tensors.views import LazyTensor, Reshaped, hstack, rows, vstack


@dataclass(frozen=True)
class _Chunk:
    top: int
    left: int
    tensor: LazyTensor

    @property
    def bottom(self) -> int:
        return self.top + self.tensor.height

    @property
    def width(self) -> int:
        return prod(self.tensor.shape[1:])


def join_chunks(where: str, shape: tuple[int, ...], chunks: Sequence[tuple[tuple[int, ...], LazyTensor]]) -> LazyTensor:
    """A tensor of its chunks, each with the offset of its first element.

    Columns are along the second side; where there are more sides, a chunk holds all of them.

    Raises ValueError, beginning with `where`, when the chunks do not cover every element exactly once.
    """
    if not shape:
        if len(chunks) != 1:
            raise ValueError(f"{where} is a single number, in {len(chunks)} chunks")
        return chunks[0][1]
    if any(any(offset[2:]) or tensor.shape[2:] != shape[2:] for offset, tensor in chunks):
        raise ValueError(f"{where} is cut along its third side or further; only rows and columns can be joined")
    if all(tensor.shape[1:] == shape[1:] and not any(offset[1:]) for offset, tensor in chunks):
        return vstack(_bands(where, shape, [_Chunk(offset[0], 0, tensor) for offset, tensor in chunks]))
    depth = prod(shape[2:])
    matrices = [_Chunk(offset[0], offset[1] * depth, _matrix(tensor)) for offset, tensor in chunks]
    whole = vstack(_bands(where, shape, matrices))
    return whole if whole.shape == shape else Reshaped(whole, shape)


def _bands(where: str, shape: tuple[int, ...], chunks: list[_Chunk]) -> list[LazyTensor]:
    """From top to bottom, the strips between two edges of chunks, each from its chunks side by side."""
    chunks = sorted(chunks, key=lambda chunk: (chunk.top, chunk.left))
    edges = {0, shape[0]} | {chunk.top for chunk in chunks} | {chunk.bottom for chunk in chunks}
    bands: list[LazyTensor] = []
    across: list[_Chunk] = []  # those that the strip passes through
    begun = 0
    for top, bottom in pairwise(sorted(edges)):
        across = [chunk for chunk in across if chunk.bottom > top]
        while begun < len(chunks) and chunks[begun].top == top:
            across.append(chunks[begun])
            begun += 1
        across.sort(key=lambda chunk: chunk.left)
        ends = [0, *(chunk.left + chunk.width for chunk in across)]
        if [chunk.left for chunk in across] != ends[:-1] or ends[-1] != prod(shape[1:]) or bottom > shape[0]:
            raise ValueError(
                f"{where} has shape {shape}, but its chunks do not cover rows {top} to {bottom} exactly once"
            )
        bands.append(hstack([rows(chunk.tensor, top - chunk.top, bottom - chunk.top) for chunk in across]))
    return bands


def _matrix(tensor: LazyTensor) -> LazyTensor:
    shape = (tensor.height, prod(tensor.shape[1:]))
    return tensor if tensor.shape == shape else Reshaped(tensor, shape)
