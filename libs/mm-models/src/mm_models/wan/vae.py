"""Wan's codec: the VAEs of Wan2.1 and Wan2.2, of diffusers."""

from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from mm_models.encoders.codec import check_video
from mm_models.encoders.loading import check_finite, identity, load_strictly, readable
from mm_models.family import Tiling
from mm_models.folder import part_of, read_count


class WanVAE:
    """An `mm_models.encoders.Codec`, from `vae/` of a diffusers directory.

    The VAE of Wan2.1 has 4x8x8 pixels per latent and 16 channels, that of Wan2.2 4x16x16 and 48.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        tiling: Tiling = "none",
    ) -> None:
        from diffusers import AutoencoderKLWan

        folder = part_of(path, "vae")
        self.device, self.dtype = torch.device(device), dtype
        self.vae = load_strictly(AutoencoderKLWan, folder, dtype).to(self.device)
        check_finite(self.vae, folder)
        in_tiles = tiling != "none"  # diffusers has one kind
        self.identity = identity([folder], {"dtype": str(dtype), "tiling": in_tiles})
        if in_tiles:
            self.vae.enable_tiling()
        config = self.vae.config
        for key in ("patch_size", "scale_factor_spatial", "scale_factor_temporal"):  # which diffusers does not look at
            if config[key] is not None:
                read_count(folder / "config.json", key, config[key])
        with readable(folder, "Wan's VAE"):
            side = 2 ** (len(config.dim_mult) - 1) * (config.patch_size or 1)
            self.stride = (2 ** sum(config.temperal_downsample), side, side)
            """Frames, rows and columns of pixels per latent."""
            self.channels: int = config.z_dim
            shape = (1, self.channels, 1, 1, 1)
            self.mean = torch.tensor(config.latents_mean, device=self.device).view(shape)
            self.std = torch.tensor(config.latents_std, device=self.device).view(shape)
        if not (self.mean.isfinite().all() and (self.std > 0).all() and self.std.isfinite().all()):
            raise ValueError(
                f"{folder / 'config.json'}: latents_mean and latents_std must be finite, the latter positive"
            )

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights to a device, and what is encoded from then on is made there. Returns itself."""
        self.device = torch.device(device)
        self.vae.to(self.device)
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)
        return self

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """C F' h w of a video of this many frames and pixels."""
        time, rows, columns = self.stride
        return self.channels, (frames - 1) // time + 1, height // rows, width // columns

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Video B 3 F H W in [-1, 1] to normalised latents B C F' h w in float32, F' = (F - 1) / 4 + 1: the mode of the
        posterior, so no chance is involved. Raises ValueError for a size that the VAE would have to crop.
        """
        check_video(video, self.stride)
        latents = self.vae.encode(video.to(self.device, self.dtype)).latent_dist.mode()
        return (latents.float() - self.mean) / self.std

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents B C F' h w to video B 3 F H W in [-1, 1], float32."""
        latents = latents.to(self.device).float() * self.std + self.mean
        return self.vae.decode(latents.to(self.dtype), return_dict=False)[0].float()
