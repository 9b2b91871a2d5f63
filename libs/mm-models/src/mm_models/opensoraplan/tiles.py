"""A VAE run over a video tile by tile: as much memory as one tile needs, and the makers' numbers at the seams.

In time, windows share one frame: a window after the first starts with the last frame of the one before, of whose
result nothing is kept a second time. In space, tiles overlap by an eighth, over which one fades into the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

OVERLAP = 0.125


class Tiles(NamedTuple):
    """The largest of what is run at once."""

    pixels: int
    """Rows and columns of a tile that is encoded."""
    frames: int
    latents: int
    """Rows and columns of latents of a tile that is decoded."""
    latent_frames: int


TILES = {"inference": Tiles(512, 29, 64, 8), "training": Tiles(256, 33, 32, 16)}


def encode(run: Callable[[Tensor], Tensor], video: Tensor, tiles: Tiles) -> Tensor:
    """`run` over a video B C F H W, in tiles where it is larger than one.

    `run` may change the shape as the VAE does: F' = (F - 1) / 4 + 1, H' = H / 8, W' = W / 8.
    """
    if _fits(video, tiles.frames, tiles.pixels):
        return run(video)
    frames, height, width = video.shape[2:]
    size = ((frames - 1) // 4 + 1, height // 8, width // 8)
    return _run(run, video, size, tiles.frames, tiles.pixels, tiles.latents)


def decode(run: Callable[[Tensor], Tensor], latents: Tensor, tiles: Tiles) -> Tensor:
    """The same of latents B C F' h w, of which `run` makes 4F' - 3 frames of 8h x 8w."""
    if _fits(latents, tiles.latent_frames, tiles.latents):
        return run(latents)
    frames, height, width = latents.shape[2:]
    size = (4 * frames - 3, 8 * height, 8 * width)
    return _run(run, latents, size, tiles.latent_frames, tiles.latents, tiles.pixels)


def windows(length: int, size: int) -> Iterator[tuple[int, int]]:
    """First frame, and the one after the last, of each window of at most `size` frames; each shares one with the next.

    >>> list(windows(93, 29))
    [(0, 29), (28, 57), (56, 85), (84, 93)]
    """
    for start in range(0, max(length - 1, 1), size - 1):
        yield start, min(start + size, length)


def _fits(x: Tensor, frames: int, side: int) -> bool:
    return x.shape[2] <= frames and max(x.shape[3:]) <= side


def _run(run: Callable, x: Tensor, size: tuple[int, int, int], frames: int, side: int, side_out: int) -> Tensor:
    result, at = None, 0
    for start, stop in windows(x.shape[2], frames):
        first = int(start > 0)  # of the frames that are new; the one before is the last of the window before
        new = 0
        for row, column, tile in _plane(run, x[:, :, start:stop], side, side_out):
            if result is None:
                result = tile.new_empty(*tile.shape[:2], *size)
            new = tile.shape[2] - first
            place = result[:, :, at : at + new, row : row + tile.shape[3], column : column + tile.shape[4]]
            place.copy_(tile[:, :, first:])
        at += new
    return result


def _plane(run: Callable, x: Tensor, side: int, side_out: int) -> Iterator[tuple[int, int, Tensor]]:
    """Row and column of the result, and what stands there, tile by tile. Of a tile only its edges are kept.

    Where a tile begins within the overlap at the end, it is made all the same: so do the makers, and a plane as large
    as one tile is cut in time alone.
    """
    step = int(side * (1 - OVERLAP))
    blend = int(side_out * OVERLAP)
    keep = side_out - blend
    above: list[Tensor] = []  # the last rows of each tile of the row above
    for i, top in enumerate(range(0, x.shape[3], step)):
        below: list[Tensor] = []
        left = None  # the last columns of the tile before
        for j, begin in enumerate(range(0, x.shape[4], step)):
            tile = run(x[:, :, :, top : top + side, begin : begin + side])
            if above:
                _fade(above[j], tile, blend, dim=3)
            if left is not None:
                _fade(left, tile, blend, dim=4)
            left = tile[:, :, :, :, -blend:].clone()
            below.append(tile[:, :, :, -blend:].clone())
            yield i * keep, j * keep, tile[:, :, :, :keep, :keep]
        above = below


def _fade(before: Tensor, tile: Tensor, blend: int, dim: int) -> None:
    """The first rows or columns of a tile, made to come out of the last ones of the tile before; in place."""
    blend = min(blend, before.shape[dim], tile.shape[dim])
    shape = [blend if axis == dim else 1 for axis in range(tile.ndim)]
    weight = (torch.arange(blend, dtype=torch.float64) / blend).view(shape)
    edge = tile.narrow(dim, 0, blend)
    last = before.narrow(dim, before.shape[dim] - blend, blend)
    edge.copy_(last * (1 - weight).to(tile) + edge * weight.to(tile))
