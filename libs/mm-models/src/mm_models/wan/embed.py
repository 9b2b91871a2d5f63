"""Video and images to tokens of the width of the model."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_models.layers import LayerNorm, Linear


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel: a linear map of patches, and computed as one. B C F H W -> B L D"""

    def __init__(self, channels: int, dim: int, patch: tuple[int, int, int]) -> None:
        super().__init__(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = self.kernel_size
        x = rearrange(x, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(x, self.weight.flatten(1).to(x.dtype), self.bias.to(x.dtype))


class ImageEmbedding(nn.Module):
    """CLIP tokens of one or two images to the width of the model. B S' C -> B S' D"""

    def __init__(self, image_dim: int, dim: int, tokens: int, positions: bool) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim), Linear(image_dim, image_dim), nn.GELU(), Linear(image_dim, dim), LayerNorm(dim)
        )
        if positions:  # two images: say which token is whose
            self.emb_pos = nn.Parameter(torch.zeros(1, tokens, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            image = image + self.emb_pos.to(image.dtype)
        return self.proj(image)
