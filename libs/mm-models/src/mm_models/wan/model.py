"""The Wan video transformer, on one device. Parameter names are the ones Wan-AI published.

Letters in the comments:
    B samples   C channels   F H W latent frames, rows, columns   L tokens (F·H/2·W/2 for patches of 1x2x2)
    D width of the model     S rows of context: [CLIP tokens, if any | 512 rows of text]

A model is a ladder: `stem` makes a stream, every `layer` takes it one rung up, `head` turns it into a video.
Three seams do nothing here and let others cut the tokens over devices:

    model.split        Stream -> Stream, last thing in the stem: keep this rank's part of dim 1 of x, rope (and mod, if
                       there is one per token)
    model.core         (q, k, v: B L H h) -> B L H h, the self-attention between tokens
    model.head.gather  (B L C) -> (B L C), before tokens become a video again: join what `split` cut

Precision: linears and attention run in `model.compute_dtype` (None: the dtype of the patch embedding's weight). Time
embedding, modulation, norms, rotary positions, gates and the residual stream are at least float32 at all times.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_models.layers import LayerNorm, Linear, RMSNorm, attention, wide
from mm_models.wan.config import WanConfig
from mm_models.wan.embed import rope_table, rotate, sinusoid


class Stream(NamedTuple):
    """What travels up the ladder. Dim 1 of x, rope and mod is tokens."""

    x: Tensor  # B L D, float32: the residual stream
    rope: Tensor  # 2 L h/2, float32: cosines, sines
    mod: Tensor  # B 1 7 D, or B L 7 D with a timestep per token, float32: six rows for the layers, one for the head
    text: Tensor  # B S D, in the compute dtype
    grid: tuple[int, int, int]  # tokens per axis of the whole video, needed to put it together again


def identity(x):
    """A seam that nobody uses."""
    return x


class SelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)  # over all heads together
        self.norm_k = RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # B L D -> B L H h

    def forward(self, x: Tensor, rope: Tensor, core: Callable) -> Tensor:
        q = rotate(self.heads(self.norm_q(self.q(x))), rope)
        k = rotate(self.heads(self.norm_k(self.k(x))), rope)
        return self.o(core(q, k, self.heads(self.v(x))).flatten(2))


class CrossAttention(SelfAttention):
    """Attention to the context: to the text, and separately to the image if there is one; the results are added."""

    def __init__(self, config: WanConfig) -> None:
        dim, eps = config.dim, config.eps
        super().__init__(dim, config.num_heads, eps)
        self.text_tokens = config.text_tokens
        self.image = config.image_dim is not None
        if self.image:
            self.k_img = Linear(dim, dim)
            self.v_img = Linear(dim, dim)
            self.norm_k_img = RMSNorm(dim, eps)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        image, text = context[:, : -self.text_tokens], context[:, -self.text_tokens :]
        q = self.heads(self.norm_q(self.q(x)))
        out = attention(q, self.heads(self.norm_k(self.k(text))), self.heads(self.v(text)))
        if self.image:
            k, v = self.norm_k_img(self.k_img(image)), self.v_img(image)
            out = out + attention(q, self.heads(k), self.heads(v))
        return self.o(out.flatten(2))


class Block(nn.Module):
    """One rung: self-attention, cross-attention, feed-forward; the first and last modulated and gated by the time."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim, heads, eps = config.dim, config.num_heads, config.eps
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(dim, heads, eps)
        self.norm3 = LayerNorm(dim, eps)
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(Linear(dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, dim))

    def forward(self, stream: Stream, core: Callable) -> Stream:
        x, rope, mod, text, _ = stream
        modulation = wide(self.modulation) + mod[:, :, :6]  # B 1|L 6 D
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)

        y = torch.addcmul(shift1, self.norm1(x), 1 + scale1)
        x = torch.addcmul(x, gate1, self.self_attn(y.to(text.dtype), rope, core))
        x = x + self.cross_attn(self.norm3(x).to(text.dtype), text)
        y = torch.addcmul(shift2, self.norm2(x), 1 + scale2)
        x = torch.addcmul(x, gate2, self.ffn(y.to(text.dtype)))
        return stream._replace(x=x)


class Head(nn.Module):
    """Stream to video."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = Linear(config.dim, patch * config.out_channels)
        self.modulation = nn.Parameter(torch.zeros(1, 2, config.dim))
        self.gather: Callable[[Tensor], Tensor] = identity

    def forward(self, stream: Stream) -> Tensor:
        (f, h, w), (p, q, r) = stream.grid, self.patch_size
        shift, scale = (wide(self.modulation) + stream.mod[:, :, 6:]).unbind(2)
        y = torch.addcmul(shift, self.norm(stream.x), 1 + scale)
        tokens = self.gather(self.head(y.to(stream.text.dtype)))
        return rearrange(wide(tokens), "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=f, h=h, w=w, p=p, q=q, r=r)


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

    def __init__(self, image_dim: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            LayerNorm(image_dim), Linear(image_dim, image_dim), nn.GELU(), Linear(image_dim, dim), LayerNorm(dim)
        )
        if tokens > 257:  # two images: say which token is whose
            self.emb_pos = nn.Parameter(torch.zeros(1, tokens, image_dim))

    def forward(self, image: Tensor) -> Tensor:
        if hasattr(self, "emb_pos"):
            image = image + self.emb_pos.to(image.dtype)
        return self.proj(image)


class WanModel(nn.Module):
    """`model(video, t, text, image) -> video`; see `stem` for shapes and errors, and the top of this file.

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
            self.img_emb = ImageEmbedding(config.image_dim, dim, config.image_tokens)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

        self.compute_dtype: torch.dtype | None = None
        self.split: Callable[[Stream], Stream] = identity
        self.core: Callable[[Tensor, Tensor, Tensor], Tensor] = attention

    @property
    def layers(self) -> nn.ModuleList:
        """The rungs, in the order in which they are climbed."""
        return self.blocks

    @property
    def islands(self) -> tuple[str, ...]:
        """Patterns of the names of parameters that stay at least float32, see `mm_models.layers.cast_weights`."""
        image = ("img_emb.proj.0.*", "img_emb.proj.4.*") if self.config.image_dim is not None else ()
        return ("time_*", "*.modulation", "*.norm3.*", *image)

    def forward(self, video: Tensor, t: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        stream = self.stem(video, t, text, image)
        for i in range(len(self.layers)):
            stream = self.layer(i, stream)
        return self.head(stream)

    def stem(self, video: Tensor, t: Tensor, text: Tensor, image: Tensor | None = None) -> Stream:
        """Makes the stream.

        Args:
            video: B C F H W, noisy latents, the condition channels behind them where the model has them.
            t: B, or B L for a timestep per token; 0 (clean) to 1000 (noise).
            text: B S text_dim with S <= 512 (`config.text_tokens`), rows beyond the true length of a prompt zero. They
                are attended to, as in training: 20 rows are the same as 20 rows and 492 zeros.
            image: B image_tokens image_dim, CLIP features, if and only if `config.image_dim` is set.

        Raises:
            ValueError: a shape that does not fit, with what would.
        """
        self._check(video, t, text, image)
        dtype = self.compute_dtype or self.patch_embedding.weight.dtype
        sizes = zip(video.shape[2:], self.config.patch_size, strict=True)
        frames, rows, columns = (size // patch for size, patch in sizes)
        x = wide(self.patch_embedding(video.to(dtype)))

        wave = sinusoid(t, self.config.freq_dim)  # B|BL 256
        time = self.time_embedding(wave.to(torch.promote_types(torch.float32, self.time_embedding[0].weight.dtype)))
        mod = torch.cat((self.time_projection(time).unflatten(-1, (6, -1)), time.unsqueeze(-2)), dim=-2)

        context = self.text_embedding(F.pad(text.to(dtype), (0, 0, 0, self.config.text_tokens - text.shape[1])))
        if image is not None:
            context = torch.cat((self.img_emb(image.to(dtype)), context), dim=1)

        grid = (frames, rows, columns)
        rope = rope_table(grid, self.config.head_dim, video.device)
        return self.split(Stream(x, rope, mod if t.ndim == 2 else mod.unsqueeze(1), context, grid))

    def layer(self, i: int, stream: Stream) -> Stream:
        return self.blocks[i](stream, self.core)

    def _check(self, video: Tensor, t: Tensor, text: Tensor, image: Tensor | None) -> None:
        c = self.config
        if video.ndim != 5 or video.shape[1] != c.in_channels:
            raise ValueError(
                f"video has shape {tuple(video.shape)}, but this model takes B {c.in_channels} F H W"
                + (": noisy latents with the channels of the condition behind them" if c.in_channels > 16 else "")
            )
        batch, _, *size = video.shape
        if any(s % p or s == 0 for s, p in zip(size, c.patch_size, strict=True)):
            raise ValueError(
                f"latents of {size[0]} frames, {size[1]} rows and {size[2]} columns cannot be cut into patches of "
                f"{c.patch_size}: each must be a multiple (with the Wan2.1 VAE: height and width of 16 pixels)"
            )
        tokens = size[0] * size[1] * size[2] // (c.patch_size[0] * c.patch_size[1] * c.patch_size[2])
        if t.shape not in ((batch,), (batch, tokens)):
            raise ValueError(
                f"t has shape {tuple(t.shape)}, but must be ({batch},), or ({batch}, {tokens}) for one per token"
            )
        if text.ndim != 3 or text.shape[0] != batch or text.shape[2] != c.text_dim:
            raise ValueError(f"text has shape {tuple(text.shape)}, but must be {batch} S {c.text_dim}")
        if text.shape[1] > c.text_tokens:
            raise ValueError(f"text has {text.shape[1]} rows, but at most {c.text_tokens} are read: truncate it")
        if image is None and c.image_dim is not None:
            raise ValueError(f"this model needs image, the CLIP features {batch} {c.image_tokens} {c.image_dim}")
        if image is not None and c.image_dim is None:
            raise ValueError("image was given, but this model has no CLIP branch (image_dim is None): leave it out")
        if image is not None and image.shape != (batch, c.image_tokens, c.image_dim):
            raise ValueError(
                f"image has shape {tuple(image.shape)}, but must be {batch} {c.image_tokens} {c.image_dim}"
            )
