"""Images to the tokens of CLIP, which Wan2.1's image-to-video models attend to."""

from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_models.encoders.loading import identity, load_strictly
from mm_models.folder import part_of

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images, red green blue in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)


class ImageEncoder:
    """CLIP's vision tower from `image_encoder/` of a diffusers directory."""

    def __init__(
        self, path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        from transformers import CLIPVisionModel

        folder = part_of(path, "image_encoder")
        self.device, self.dtype = torch.device(device), dtype
        self.model = load_strictly(CLIPVisionModel, folder, dtype).to(self.device)
        self.identity = identity([folder], {"dtype": str(dtype)})
        self.size: int = self.model.config.image_size
        """Rows and columns of pixels that an image is scaled to."""

    def to(self, device: torch.device | str) -> Self:
        """Moves the weights to a device, and what is encoded from then on is made there. Returns itself."""
        self.device = torch.device(device)
        self.model.to(self.device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor, crop: bool = False) -> Tensor:
        """Images B 3 H W in [-1, 1] to tokens B S D, for Wan's CLIP B 257 1280: the output of the last block but one.

        An image of any shape is squashed to the square that CLIP sees, by plain bicubic interpolation: so Wan was
        trained. crop: the middle square instead, antialiased, as diffusers' pipelines prepare it.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images have shape {tuple(images.shape)}, but must be B 3 H W")
        images = images.to(self.device).float()
        if crop:
            side = min(images.shape[-2:])
            top, left = ((size - side) // 2 for size in images.shape[-2:])
            images = images[..., top : top + side, left : left + side]
        images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=crop)
        mean, std = (torch.tensor(of_clip, device=self.device).view(3, 1, 1) for of_clip in (MEAN, STD))
        pixels = ((images + 1) / 2 - mean) / std
        return self.model(pixels.to(self.dtype), output_hidden_states=True).hidden_states[-2]
