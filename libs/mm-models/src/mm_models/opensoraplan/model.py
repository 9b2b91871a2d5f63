"""The Open-Sora-Plan 1.2 video transformer, on one device. Parameter names are the released ones.

Letters in the comments:
    B samples   C channels   F H W latent frames, rows, columns   L tokens (F·H/2·W/2 for patches of 1x2x2)
    D width of the model     S rows of text

A model is a ladder: `stem` makes a stream, every `layer` hands it on, `head` turns it into a video.
Three seams do nothing here and let others cut the tokens over devices:

    model.split        Stream -> Stream, last thing in the stem: keep this rank's part of dim 1 of x and rope
    model.core         (q, k, v: B L H h, sequence, mask) -> B L H h, the self-attention between tokens
    model.gather       (B L C, sequence) -> (B L C), before tokens become a video again: join what `split` cut

`sequence` says how many tokens there are before the cut, and `mask`, B L of all of them, which are attended to. Linears
of q, k, v and the first of the feed-forward may give a part of their columns (some heads), if those after them take it:
no number of heads is written into the code.

Precision: linears and attention run in `model.compute_dtype` (None: the dtype of the patch embedding's weight). Time
embedding, modulation, norms, rotary positions, gates and the residual stream are at least float32 at all times.
"""

from collections.abc import Callable
from functools import partial
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_models.layers import (
    LayerNorm,
    Linear,
    Sequence,
    attention,
    core,
    gated,
    identity,
    modulate,
    remake,
    rotate,
    sinusoid,
    wide,
)
from mm_models.opensoraplan.check import check
from mm_models.opensoraplan.config import OpenSoraPlanConfig


class Stream(NamedTuple):
    """What travels from stem to head. Dim 1 of x and rope is tokens."""

    x: Tensor  # B L D, float32: the residual stream
    rope: Tensor  # 2 L h/2, float32: cosines, sines
    mod: Tensor  # B 7 D, float32: six rows for the layers, one for the head
    text: Tensor  # B S D, in the compute dtype
    grid: tuple[int, int, int]  # tokens per axis of the whole video, needed to put it together again
    sequence: Sequence  # the tokens of the whole video
    text_mask: Tensor | None = None  # B S bool: rows of text that are attended to; None: all
    mask: Tensor | None = None  # B L bool, of the whole video on every device: tokens that are attended to; None: all


class PatchEmbedding(nn.Module):
    """A convolution of single frames whose stride is its kernel, computed as a linear map. B C F H W -> B L D"""

    def __init__(self, channels: int, dim: int, side: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=side, stride=side)

    def forward(self, x: Tensor) -> Tensor:
        q, r = self.proj.kernel_size
        x = rearrange(x, "b c f (h q) (w r) -> b (f h w) (c q r)", q=q, r=r)
        return F.linear(x, self.proj.weight.flatten(1).to(x.dtype), self.proj.bias.to(x.dtype))


class Projection(nn.Module):
    """Text, or the wave of a timestep, to the width of the model. … C -> … D"""

    def __init__(self, channels: int, dim: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear_1 = Linear(channels, dim)
        self.linear_2 = Linear(dim, dim)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(self.activation(self.linear_1(x)))


class TimeModulation(nn.Module):
    """One modulation for all layers, to which each adds a table of its own (adaLN-single). B freq_dim -> B 7 D"""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": Projection(freq_dim, dim, F.silu)})
        self.linear = Linear(dim, 6 * dim)

    def forward(self, wave: Tensor) -> Tensor:
        time = self.emb["timestep_embedder"](wave)
        return torch.cat((self.linear(F.silu(time)).unflatten(-1, (6, -1)), time.unsqueeze(1)), dim=1)


# Angles need float64, and not every accelerator has it. So they are made in float64 on the CPU, where they are a few
# thousand numbers, and everything on the device is float32 without a loss that matters.


def rope_table(
    grid: tuple[int, int, int], scale: tuple[float, float, float], head_dim: int, device: torch.device
) -> Tensor:
    """Cosines and sines for every token of a grid (frames, rows, columns): 2 L h/2, float32.

    Tokens are row-major. A head is cut into three bands of h/3 channels: the first turns with the frame, the next with
    the row, the last with the column; the position on an axis is the index divided by its `scale`. Not cached: it takes
    microseconds, and a table made under a fake-tensor or inference mode must not leak out of it.
    """
    band = head_dim // 3
    frequencies = 10000.0 ** -(torch.arange(0, band, 2, dtype=torch.float64, device="cpu") / band)
    bands = []
    for axis, (length, divisor) in enumerate(zip(grid, scale, strict=True)):
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu") / divisor, frequencies)
        table = torch.stack((angles.cos(), angles.sin())).float().to(device)
        shape = [2, 1, 1, 1, band // 2]
        shape[1 + axis] = length
        bands.append(table.view(shape).expand(2, *grid, -1))
    return torch.cat(bands, dim=-1).flatten(1, 3)


def turn(x: Tensor, rope: Tensor) -> Tensor:
    """Turns, within each third of the channels of x (B L H h), the first half with the second by the angles of `rope`
    (2 L h/2).
    """
    return rotate(x, *rope.unflatten(-1, (3, -1)).unsqueeze(2), (3, 2, -1), -2)  # cos, sin: L 1 3 h/6


class Attention(nn.Module):
    """The linears of an attention, and what makes heads of channels."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.to_q = Linear(dim, dim)
        self.to_k = Linear(dim, dim)
        self.to_v = Linear(dim, dim)
        self.to_out = nn.ModuleList([Linear(dim, dim)])

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # B L D -> B L H h


class SelfAttention(Attention):
    def forward(self, x: Tensor, rope: Tensor, core: Callable, sequence: Sequence, mask: Tensor | None) -> Tensor:
        q, k = turn(self.heads(self.to_q(x)), rope), turn(self.heads(self.to_k(x)), rope)
        return self.to_out[0](core(q, k, self.heads(self.to_v(x)), sequence, mask).flatten(2))


class CrossAttention(Attention):
    def forward(self, x: Tensor, text: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = self.heads(self.to_q(x)), self.heads(self.to_k(text)), self.heads(self.to_v(text))
        return self.to_out[0](attention(q, k, v, mask=mask).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__()
        up = nn.ModuleDict({"proj": Linear(dim, ffn_dim)})
        self.net = nn.ModuleList([up, nn.Identity(), Linear(ffn_dim, dim)])  # 1 was the makers' dropout

    def forward(self, x: Tensor) -> Tensor:
        up, _, down = self.net
        return remake(partial(F.gelu, approximate="tanh"), (up["proj"](x),), down)


class Block(nn.Module):
    """One layer: self-attention, cross-attention, feed-forward; the first and last modulated and gated by the time."""

    def __init__(self, config: OpenSoraPlanConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.scale_shift_table = nn.Parameter(torch.zeros(6, dim))
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = SelfAttention(dim, heads)
        self.attn2 = CrossAttention(dim, heads)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ff = FeedForward(dim, config.ffn_dim)

    def forward(self, stream: Stream, core: Callable) -> Tensor:
        x, text = stream.x, stream.text
        modulation = wide(self.scale_shift_table) + stream.mod[:, :6]  # B 6 D
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.split(1, dim=1)

        y = modulate(self.norm1, x, shift1, scale1)
        x = gated(x, gate1, self.attn1(y.to(text.dtype), stream.rope, core, stream.sequence, stream.mask))
        x = x + self.attn2(x.to(text.dtype), text, stream.text_mask)  # not normalised, not gated
        y = modulate(self.norm2, x, shift2, scale2)
        return gated(x, gate2, self.ff(y.to(text.dtype)))


class OpenSoraPlanModel(nn.Module):
    """`model(video, t, text, text_mask, video_mask) -> video`; see `stem` for shapes and errors.

    Weights are made for loading into: `mm_models.build` fills them the way the authors did.
    """

    keep_fp32 = ("adaln_single.*", "*scale_shift_table")
    """Patterns of the names of parameters that stay at least float32, see `mm_models.layers.cast_weights`."""

    def __init__(self, config: OpenSoraPlanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.pos_embed = PatchEmbedding(config.in_channels, dim, config.patch_size[1])
        self.caption_projection = Projection(config.text_dim, dim, partial(F.gelu, approximate="tanh"))
        self.adaln_single = TimeModulation(config.freq_dim, dim)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = LayerNorm(dim, config.eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, dim))
        self.proj_out = Linear(dim, prod(config.patch_size) * config.out_channels)

        self.compute_dtype: torch.dtype | None = None
        self.split: Callable[[Stream], Stream] = identity
        self.core: Callable[[Tensor, Tensor, Tensor, Sequence, Tensor | None], Tensor] = core
        self.gather: Callable[[Tensor, Sequence], Tensor] = identity

    @property
    def layers(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.transformer_blocks

    def forward(
        self,
        video: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> Tensor:
        stream = self.stem(video, t, text, text_mask, video_mask)
        for i in range(len(self.layers)):
            stream = self.layer(i, stream)
        return self.head(stream)

    def stem(
        self,
        video: Tensor,
        t: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        video_mask: Tensor | None = None,
    ) -> Stream:
        """Makes the stream.

        Args:
            video: B C F H W, noisy latents; one frame is an image.
            t: B, 0 (almost clean) to 999 (noise).
            text: B S text_dim with S <= 512 (`config.text_tokens`).
            text_mask: B S bool, true for the rows that are attended to. None: all of them.
            video_mask: B F H W bool, true for latents that are no padding. A token with such a latent is attended to;
                the others are computed, and attended to by none. None: all; the cheaper way to say so.

        Raises:
            ValueError: a shape that does not fit, with what would; a mask that shows nothing of a sample.
        """
        check(self.config, video, t, text, text_mask, video_mask)
        dtype = self.compute_dtype or self.pos_embed.proj.weight.dtype
        sizes = zip(video.shape[2:], self.config.patch_size, strict=True)
        grid = tuple(size // patch for size, patch in sizes)
        x = wide(self.pos_embed(video.to(dtype)))

        wave = sinusoid(t, self.config.freq_dim)  # B 256
        mod = self.adaln_single(wave.to(torch.promote_types(torch.float32, self.adaln_single.linear.weight.dtype)))
        context = self.caption_projection(text.to(dtype))
        rope = rope_table(grid, self.config.interpolation_scale, self.config.head_dim, video.device)
        mask = None
        if video_mask is not None:
            q, r = self.config.patch_size[1:]
            mask = rearrange(video_mask, "b f (h q) (w r) -> b (f h w) (q r)", q=q, r=r).any(-1)
        return self.split(Stream(x, rope, mod, context, grid, Sequence(prod(grid)), text_mask, mask))

    def layer(self, i: int, stream: Stream) -> Stream:
        return stream._replace(x=self.transformer_blocks[i](stream, self.core))

    def head(self, stream: Stream) -> Tensor:
        (f, h, w), (_, q, r) = stream.grid, self.config.patch_size
        shift, scale = (wide(self.scale_shift_table) + stream.mod[:, 6:]).split(1, dim=1)
        y = modulate(self.norm_out, stream.x, shift, scale)
        tokens = self.gather(self.proj_out(y.to(stream.text.dtype)), stream.sequence)
        return rearrange(wide(tokens), "b (f h w) (q r c) -> b c f (h q) (w r)", f=f, h=h, w=w, q=q, r=r)
