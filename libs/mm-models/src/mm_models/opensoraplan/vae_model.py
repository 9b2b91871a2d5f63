"""The causal VAE of Open-Sora-Plan 1.2 (`CausalVAEModel`): a video to latents of 4x8x8 pixels, and back.

Parameter names are those of the released file. Dims: B videos, C channels, F frames, H rows, W columns; a convolution
that ends in 2d sees the frames one by one, as B·F images. Frames are 4k + 1, of which k + 1 remain: the first stands
alone, so an image is a video of one frame.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_models.opensoraplan.vae_config import GROUPS, OLDER, PUBLISHED, VAEConfig

LOGVAR = -30, 20
"""Between which the log of the variance is held."""
FRAMES = 4
"""Images that the flat half of the encoder holds at once; the result is that of any other number."""


class CausalVAE(nn.Module):
    """Encoder and decoder, with the 1x1x1 convolutions between them and the latents."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = CausalConv3d(2 * config.z_channels, 2 * config.embed_dim, 1)
        self.post_quant_conv = CausalConv3d(config.embed_dim, config.z_channels, 1)

    def encode(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Video B 3 F H W in [-1, 1] to mean and log of the variance of its latents, both B C F' H/8 W/8.

        F = 4k + 1, F' = k + 1; H and W are multiples of 8.
        """
        mean, logvar = self.moments(video).chunk(2, dim=1)
        return mean, logvar.clamp(*LOGVAR)

    def moments(self, video: Tensor) -> Tensor:
        """Both as they come, one after the other, B 2C F' H/8 W/8: what tiles are blended from."""
        return self.quant_conv(self.encoder(video))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents B C F' h w (not scaled) to a video B 3 4F'-3 8h 8w."""
        return self.decoder(self.post_quant_conv(latents))

    def forward(self, video: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The video made again, with mean and log of the variance: what a VAE is trained on.

        noise: of the latents' shape, N(0, 1), moves the mean by so many deviations. None: the mean is decoded.
        """
        mean, logvar = self.encode(video)
        latents = mean if noise is None else mean + torch.exp(logvar / 2) * noise
        return self.decode(latents), mean, logvar


class Encoder(nn.Module):
    """Levels 0 and 1 see images, 2 and 3 a video; each but the last halves rows and columns, 1 and 2 frames as well."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            block = ResnetBlock2d if level < 2 else ResnetBlock3d
            into = [widths[max(level - 1, 0)], *[width] * (config.num_res_blocks - 1)]
            down = nn.Module()
            down.block = nn.ModuleList([block(channels, width) for channels in into])
            if level < 3:
                down.downsample = Downsample3d(width) if level else Downsample2d(width)
            self.down.append(down)
        self.mid = Middle(widths[3], config.attention)
        self.norm_out = GroupNorm(widths[3])
        self.conv_out = CausalConv3d(widths[3], 2 * config.z_channels, 3)

    def forward(self, video: Tensor) -> Tensor:
        """B 3 F H W -> B 2Z F' H/8 W/8"""
        images = rearrange(video, "b c f h w -> (b f) c h w")
        x = torch.cat([self.flat(some) for some in images.split(FRAMES)])  # (B F) C H/2 W/2
        x = self.down[1].downsample(rearrange(x, "(b f) c h w -> b c f h w", b=len(video)))
        for block in self.down[2].block:
            x = block(x)
        x = self.down[2].downsample(x)
        for block in self.down[3].block:
            x = block(x)
        return self.conv_out(_silu(self.norm_out(self.mid(x))))

    def flat(self, images: Tensor) -> Tensor:
        """The levels that see images, N 3 H W -> N C H/2 W/2."""
        x = self.conv_in(images)
        for block in self.down[0].block:
            x = block(x)
        x = self.down[0].downsample(x)
        for block in self.down[1].block:
            x = block(x)
        return x


class Decoder(nn.Module):
    """From level 3 to level 0: each but the last doubles rows and columns, 3 and 2 frames as well."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = CausalConv3d(config.z_channels, widths[3], 3)
        self.mid = Middle(widths[3], config.attention)
        self.up = nn.ModuleList()
        for level, width in enumerate(widths):
            into = [widths[min(level + 1, 3)], *[width] * config.num_res_blocks]
            up = nn.Module()
            up.block = nn.ModuleList([ResnetBlock3d(channels, width) for channels in into])
            if level:
                up.upsample = Upsample3d(width) if level > 1 else Upsample2d(width)
            self.up.append(up)
        self.norm_out = GroupNorm(widths[0])
        self.conv_out = CausalConv3d(widths[0], 3, 3)

    def forward(self, latents: Tensor) -> Tensor:
        """B Z F' h w -> B 3 4F'-3 8h 8w"""
        x = self.mid(self.conv_in(latents))
        for level in (3, 2, 1, 0):
            for block in self.up[level].block:
                x = block(x)
            if level:
                x = self.up[level].upsample(x)
        return self.conv_out(_silu(self.norm_out(x)))


class Middle(nn.Module):
    """At the lowest resolution, where frames are attended to."""

    def __init__(self, width: int, attention: str) -> None:
        super().__init__()
        self.block_1 = ResnetBlock3d(width, width)
        self.attn_1 = {PUBLISHED: Attention, OLDER: MixedAttention}[attention](width)
        self.block_2 = ResnetBlock3d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """B C F H W, as it comes"""
        return self.block_2(self.attn_1(self.block_1(x)))


class CausalConv3d(nn.Module):
    """A convolution that looks at no later frame: before the first stand copies of it, not zeros."""

    def __init__(
        self, into: int, out: int, kernel: int | tuple[int, int, int], stride: int = 1, padding: int | None = None
    ) -> None:
        """padding: zeros around rows and columns. None: as many as keep the size."""
        super().__init__()
        kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
        around = kernel[1] // 2 if padding is None else padding
        self.before = kernel[0] - 1
        self.conv = nn.Conv3d(into, out, kernel, stride, (0, around, around))

    def forward(self, x: Tensor) -> Tensor:
        """B C F H W"""
        if self.before:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.before, -1, -1), x], dim=2)
        return self.conv(x)


class GroupNorm(nn.GroupNorm):
    """Over 32 groups of channels; of a video over all its frames at once, so a later frame changes an earlier one."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, eps=1e-6)


class ResnetBlock3d(nn.Module):
    """x + two convolutions of it; x itself through a 1x1 convolution where the channels change."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.norm1 = GroupNorm(into)
        self.conv1 = self.conv(into, out, 3)
        self.norm2 = GroupNorm(out)
        self.conv2 = self.conv(out, out, 3)
        self.nin_shortcut = self.conv(into, out, 1) if into != out else None

    @staticmethod
    def conv(into: int, out: int, kernel: int) -> nn.Module:
        """A convolution that keeps the size."""
        return CausalConv3d(into, out, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """B C F H W"""
        y = self.conv1(_silu(self.norm1(x)))
        y = self.conv2(_silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class ResnetBlock2d(ResnetBlock3d):
    """The same of images, N C H W."""

    @staticmethod
    def conv(into: int, out: int, kernel: int) -> nn.Module:
        """A convolution that keeps the size."""
        return nn.Conv2d(into, out, kernel, padding=kernel // 2)


class Attention(nn.Module):
    """Each place attends to all places of its frame, with one head. (`AttnBlock3DFix`)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = GroupNorm(width)
        self.q = CausalConv3d(width, width, 1)
        self.k = CausalConv3d(width, width, 1)
        self.v = CausalConv3d(width, width, 1)
        self.proj_out = CausalConv3d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """B C F H W"""
        y = self.norm(x)
        q, k, v = (self.rows(part(y)) for part in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)  # scaled by C ** -0.5
        return x + self.proj_out(self.video(y, x))

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """B C F H W -> (B F) 1 (H W) C"""
        return rearrange(x, "b c f h w -> (b f) 1 (h w) c")

    @staticmethod
    def video(y: Tensor, like: Tensor) -> Tensor:
        """(B F) 1 (H W) C -> B C F H W"""
        batch, _, _, height, _ = like.shape
        return rearrange(y, "(b f) 1 (h w) c -> b c f h w", b=batch, h=height)


class MixedAttention(Attention):
    """`AttnBlock3D` of the makers' older VAEs: C F is read as F C, so a row of it holds values of several frames.

    An oversight that weights were trained with. Of one frame it is the same as `Attention`.
    """

    @staticmethod
    def rows(x: Tensor) -> Tensor:
        """B C F H W -> (B F) 1 (H W) C, where C and F are not what they were"""
        batch, channels, frames, height, width = x.shape
        return x.reshape(batch * frames, channels, height * width).transpose(1, 2)[:, None]

    @staticmethod
    def video(y: Tensor, like: Tensor) -> Tensor:
        """(B F) 1 (H W) C -> B C F H W, the way back"""
        return y[:, 0].transpose(1, 2).reshape(like.shape)


class Downsample2d(nn.Module):
    """Halves rows and columns of images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """N C H W -> N C H/2 W/2"""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Downsample3d(nn.Module):
    """Halves rows and columns, and of the frames those after the first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """B C 2k+1 H W -> B C k+1 H/2 W/2"""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample2d(nn.Module):
    """Doubles rows and columns by repeating them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, (1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """B C F H W -> B C F 2H 2W"""
        return self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))


class Upsample3d(nn.Module):
    """Doubles rows and columns, and the frames after the first, which know nothing of it here."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = CausalConv3d(width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """B C k+1 H W -> B C 2k+1 2H 2W"""
        first = F.interpolate(x[:, :, :1], scale_factor=(1, 2, 2), mode="trilinear")
        if x.shape[2] > 1:
            later = F.interpolate(x[:, :, 1:], scale_factor=(2, 2, 2), mode="trilinear")
            first = torch.cat([first, later], dim=2)
        return self.conv(first)


def _silu(x: Tensor) -> Tensor:
    """Of what nobody else reads: a norm's result."""
    return F.silu(x, inplace=True)
