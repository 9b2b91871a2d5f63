"""Videos to latents and back: what every family's VAE can be asked."""

from typing import Protocol, Self

import torch
from torch import Tensor


class Codec(Protocol):
    """A video VAE, frozen, made of `(path of a diffusers directory, device, dtype, tiling)`.

    tiling: "none", "training" or "inference" (`mm_models.family.Tiling`). In tiles it takes less memory, and makes
    slightly other numbers at the seams. A VAE with one kind of tiles takes both words for it.
    """

    stride: tuple[int, int, int]
    """Frames, rows and columns of pixels per latent."""
    channels: int
    """Of the latents."""
    identity: str
    """Changes with whatever decides the latents of a video: weights, dtype, tiling."""
    device: torch.device

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights; what is encoded from then on is made there."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """C F' h w of a video of this many frames and pixels."""

    def encode(self, video: Tensor) -> Tensor:
        """B 3 F H W in [-1, 1] to normalised latents B C F' h w. ValueError for a size that does not fit."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents B C F' h w to B 3 F H W in [-1, 1], float32."""


def to_frames(codec: Codec, latents: Tensor) -> Tensor:
    """Latents of one video, 1 C F' h w, to what is written to a file: F H W 3, uint8 on the CPU."""
    video = codec.decode(latents)[0].clamp(-1, 1)
    return ((video + 1) * 127.5).round().byte().permute(1, 2, 3, 0).contiguous().cpu()


def check_video(video: Tensor, stride: tuple[int, int, int]) -> None:
    """Raises ValueError unless pixels B 3 F H W become whole latents of a VAE that packs frames after the first."""
    time, height, width = stride
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"video has shape {tuple(video.shape)}, but must be B 3 F H W")
    frames, rows, columns = video.shape[2:]
    if (frames - 1) % time:
        raise ValueError(f"{frames} frames: must be {time}k + 1, e.g. {(frames - 1) // time * time + 1}")
    if rows % height or columns % width:
        raise ValueError(
            f"frames of {rows}x{columns} pixels: both must be multiples of {height}, "
            f"e.g. {rows // height * height}x{columns // width * width}"
        )
