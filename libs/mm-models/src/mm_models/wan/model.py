"""The Wan video transformer, on one device. Parameter names are the ones Wan-AI published.

Letters in the comments:
    B samples   C channels   F H W latent frames, rows, columns   L tokens (F·H/2·W/2 for patches of 1x2x2)
    D width of the model     S rows of context: [CLIP tokens, if any | 512 rows of text]

A model is a ladder: `stem` makes a stream, every `layer` hands it on, `head` turns it into a video.
Three seams do nothing here and let others cut the tokens over devices:

    model.split        Stream -> Stream, last thing in the stem: keep this rank's part of dim 1 of x, rope, noisy and
                       control
    model.core         (q, k, v: B L H h, sequence) -> B L H h, the self-attention between tokens
    model.head.gather  (B L C, sequence) -> (B L C), before tokens become a video again: join what `split` cut

`sequence` says how many tokens there are before the cut. Linears of q, k, v and the first of the feed-forward may give
a part of their columns (some heads), if those after them take it: no number of heads is written into the code.

Precision: linears and attention run in `model.compute_dtype` (None: the dtype of the patch embedding's weight). Time
embedding, modulation, norms, rotary positions, gates and the residual stream are at least float32 at all times.
"""

from collections.abc import Callable, Iterable
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_models.layers import (
    LayerNorm,
    Linear,
    RMSNorm,
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
from mm_models.wan.check import check
from mm_models.wan.config import WanConfig


class Stream(NamedTuple):
    """What travels from stem to head. Dim 1 of x, rope, noisy and control is tokens."""

    x: Tensor  # B L D, float32: the residual stream
    rope: Tensor  # 2 L h/2, float32: cosines, sines
    mod: Tensor  # B 1 7 D, or B 2 7 D with a timestep per token, float32: six rows for the layers, one for the head
    text: Tensor  # B S D, in the compute dtype
    grid: tuple[int, int, int]  # tokens per axis of the whole video, needed to put it together again
    sequence: Sequence  # the tokens of the whole video
    noisy: Tensor | None = None  # B L 1, with a timestep per token: 1 for the second row of mod, 0 for the first
    control: Tensor | None = None  # B L D: the residual stream of the control ladder
    control_scale: tuple[float, ...] = ()  # for each of its blocks


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


# Angles need float64, and not every accelerator has it. So frequencies are made in float64 on the CPU, where they are a
# few hundred numbers, and everything on the device is float32 without a loss that matters.


def rope_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines for every token of a grid (frames, rows, columns): 2 L h/2, float32.

    Tokens are row-major. The channel pairs of a head are shared out in three bands: the first turn with the frame, the
    next with the row, the last with the column. Not cached: it takes microseconds, and a table made under a fake-tensor
    or inference mode must not leak out of it.
    """
    side = 2 * (head_dim // 6)
    bands = []
    for axis, (length, band) in enumerate(zip(grid, (head_dim - 2 * side, side, side), strict=True)):
        frequencies = 10000.0 ** -(torch.arange(0, band, 2, dtype=torch.float64, device="cpu") / band)
        angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
        table = torch.stack((angles.cos(), angles.sin())).float().to(device)
        shape = [2, 1, 1, 1, band // 2]
        shape[1 + axis] = length
        bands.append(table.view(shape).expand(2, *grid, -1))
    return torch.cat(bands, dim=-1).flatten(1, 3)


def turn(x: Tensor, rope: Tensor) -> Tensor:
    """Turns channel couples (2k, 2k+1) of x (B L H h) by the angles of `rope` (2 L h/2)."""
    return rotate(x, *rope.unsqueeze(2), (-1, 2), -1)  # cos, sin: L 1 h/2


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)  # over all heads together
        self.norm_k = RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # B L D -> B L H h

    def forward(self, x: Tensor, rope: Tensor, core: Callable, sequence: Sequence) -> Tensor:
        q = turn(self.heads(self.norm_q(self.q(x))), rope)
        k = turn(self.heads(self.norm_k(self.k(x))), rope)
        return self.o(core(q, k, self.heads(self.v(x)), sequence).flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the context: to the text, and separately to the image if there is one; the results are added."""

    def __init__(self, config: WanConfig) -> None:
        dim, eps = config.dim, config.eps
        super().__init__(dim, config.num_heads, eps)
        self.text_tokens = config.text_tokens
        self.image = config.image_dim is not None and config.image_kv
        if self.image:
            self.k_img = Linear(dim, dim)
            self.v_img = Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        image, text = None, context
        if self.image:
            image, text = context.split((context.shape[1] - self.text_tokens, self.text_tokens), 1)
        q = self.heads(self.norm_q(self.q(x)))
        out = attention(q, self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)))
        if self.image:
            k, v = self.norm_k_img(self.k_img(image)), self.v_img(image)
            out = out + attention(q, self.heads(k), self.heads(v))
        return self.o(out.flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, ffn_dim: int) -> None:
        super().__init__(Linear(dim, ffn_dim), nn.GELU("tanh"), Linear(ffn_dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        up, act, down = self
        return remake(act, (up(x),), down)


class Block(nn.Module):
    """One layer: self-attention, cross-attention, feed-forward; the first and last modulated and gated by the time."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = FeedForward(dim, config.ffn_dim)

    def forward(self, stream: Stream, core: Callable) -> Tensor:
        return self.run(stream.x, stream, core)

    def run(self, x: Tensor, stream: Stream, core: Callable) -> Tensor:
        """x: the residual stream of the ladder that this block is in."""
        text, noisy = stream.text, stream.noisy
        modulation = wide(self.modulation) + stream.mod[:, :, :6]  # B 1|2 6 D
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)

        y = modulate(self.norm1, x, shift1, scale1, noisy)
        x = gated(x, gate1, self.self_attn(y.to(text.dtype), stream.rope, core, stream.sequence), noisy)
        x = x + self.cross_attn(self.norm3(x).to(text.dtype), text)
        y = modulate(self.norm2, x, shift2, scale2, noisy)
        return gated(x, gate2, self.ffn(y.to(text.dtype)), noisy)


class ControlBlock(Block):
    """One layer of VACE's control ladder: a block, and a projection to the hint that it gives to one of the other's."""

    def __init__(self, config: WanConfig, first: bool) -> None:
        super().__init__(config)
        if first:
            self.before_proj = Linear(config.dim, config.dim)
        self.after_proj = Linear(config.dim, config.dim)
        self.first = first

    def forward(
        self, control: Tensor, stream: Stream, core: Callable, x: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(control, hint), both B L D. The first block adds the control to the video's own residual stream x."""
        dtype = stream.text.dtype
        if self.first:
            control = x + self.before_proj(control.to(dtype))
        control = self.run(control, stream, core)
        return control, self.after_proj(control.to(dtype))


class Head(nn.Module):
    """Stream to video."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, patch * config.out_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.gather: Callable[[Tensor, Sequence], Tensor] = identity

    def forward(self, stream: Stream) -> Tensor:
        (f, h, w), (p, q, r) = stream.grid, self.patch_size
        shift, scale = (wide(self.modulation) + stream.mod[:, :, 6:]).unbind(2)
        y = modulate(self.norm, stream.x, shift, scale, stream.noisy)
        tokens = self.gather(self.head(y.to(stream.text.dtype)), stream.sequence)
        return rearrange(wide(tokens), "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r)


class WanModel(nn.Module):
    """`model(video, t, text, image, control, control_scale) -> video`; see `stem` for shapes and errors.

    With `config.vace_layers`, a second ladder runs in step: control block n runs just before the layer that it
    feeds, and its hint is added behind that layer. So no list of hints is held, and a pipeline can cut both.

    Weights are made for loading into: `mm_models.build` fills them the way the authors did.
    """

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.in_channels, dim, config.patch_size)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        if config.image_dim is not None:
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_tokens, config.two_images)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        if config.vace_layers:
            self.vace_patch_embedding = PatchEmbedding(config.control_channels, dim, config.patch_size)
            self.vace_blocks = nn.ModuleList(ControlBlock(config, i == 0) for i in range(len(config.vace_layers)))
        self.head = Head(config)

        self.compute_dtype: torch.dtype | None = None
        self.split: Callable[[Stream], Stream] = identity
        self.core: Callable[[Tensor, Tensor, Tensor, Sequence], Tensor] = core

    @property
    def layers(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.blocks

    @property
    def keep_fp32(self) -> tuple[str, ...]:
        """Patterns of the names of parameters that stay at least float32, see `mm_models.layers.cast_weights`."""
        image = ("img_emb.proj.0.*", "img_emb.proj.4.*") if self.config.image_dim is not None else ()
        return ("time_*", "*.modulation", "*.norm3.*", *image)

    def forward(
        self,
        video: Tensor,
        t: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        control: Tensor | None = None,
        control_scale: float | Iterable[float] = 1.0,
    ) -> Tensor:
        stream = self.stem(video, t, text, image, control, control_scale)
        for i in range(len(self.layers)):
            stream = self.layer(i, stream)
        return self.head(stream)

    def stem(
        self,
        video: Tensor,
        t: Tensor,
        text: Tensor,
        image: Tensor | None = None,
        control: Tensor | None = None,
        control_scale: float | Iterable[float] = 1.0,
    ) -> Stream:
        """Makes the stream.

        Args:
            video: B C F H W, noisy latents, the condition channels behind them where the model has them.
            t: B, or B L for a timestep per token, of which each sample has at most two; 0 (clean) to 1000 (noise).
            text: B S text_dim with S <= 512 (`config.text_tokens`), rows beyond the true length of a prompt zero. They
                are attended to, as in training: 20 rows are the same as 20 rows and 492 zeros.
            image: B image_tokens image_dim, CLIP features, if and only if `config.image_dim` is set.
            control: B control_channels F H W, if and only if `config.vace_layers` are set.
            control_scale: strength of the control, one for all or one for each of `config.vace_layers`.

        Raises:
            ValueError: a shape that does not fit, with what would.
        """
        check(self.config, video, t, text, image, control, control_scale)
        dtype = self.compute_dtype or self.patch_embedding.weight.dtype
        sizes = zip(video.shape[2:], self.config.patch_size, strict=True)
        grid = tuple(size // patch for size, patch in sizes)
        x = wide(self.patch_embedding(video.to(dtype)))

        noisy = None
        if t.ndim == 2:  # by the two that there are: modulation for every token would be the largest tensor of all
            both = torch.stack((t.amin(1), t.amax(1)), dim=1)  # B 2
            noisy, t = (t == both[:, 1:]).to(x.dtype).unsqueeze(-1), both
        wave = sinusoid(t, self.config.freq_dim)  # B|B2 256
        time = self.time_embedding(wave.to(torch.promote_types(torch.float32, self.time_embedding[0].weight.dtype)))
        mod = torch.cat((self.time_projection(time).unflatten(-1, (6, -1)), time.unsqueeze(-2)), dim=-2)
        mod = mod if t.ndim == 2 else mod.unsqueeze(1)  # B 1|2 7 D

        context = self.text_embedding(F.pad(text.to(dtype), (0, 0, 0, self.config.text_tokens - text.shape[1])))
        if image is not None:
            context = torch.cat((self.img_emb(image.to(dtype)), context), dim=1)
        rope = rope_table(grid, self.config.head_dim, video.device)

        scales: tuple[float, ...] = ()
        if control is not None:
            control = wide(self.vace_patch_embedding(control.to(dtype)))
            count = len(self.config.vace_layers)
            scales = (float(control_scale),) * count if isinstance(control_scale, int | float) else tuple(control_scale)
        return self.split(Stream(x, rope, mod, context, grid, Sequence(prod(grid)), noisy, control, scales))

    def layer(self, i: int, stream: Stream) -> Stream:
        # A block that recomputes keeps what it is called with: so it is called with no residual stream but its own.
        x, control, stream = stream.x, stream.control, stream._replace(control=None)
        if i not in self.config.vace_layers:
            return stream._replace(x=self.blocks[i](stream, self.core), control=control)
        n = self.config.vace_layers.index(i)
        control, hint = self.vace_blocks[n](control, stream._replace(x=None), self.core, x if n == 0 else None)
        x = torch.add(self.blocks[i](stream, self.core), hint, alpha=stream.control_scale[n])
        return stream._replace(x=x, control=control)
