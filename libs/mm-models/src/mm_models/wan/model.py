"""The Wan video transformer, on one device. Parameter names are the ones Wan-AI published.

Letters in the comments:
    B samples   C channels   F H W latent frames, rows, columns   L tokens (F·H/2·W/2 for patches of 1x2x2)
    D width of the model     S rows of context: [CLIP tokens, if any | 512 rows of text]

A model is a ladder: `stem` makes a stream, every `layer` takes it one rung up, `head` turns it into a video.
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

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mm_models.layers import LayerNorm, Linear, Sequence, core, identity, modulate, wide
from mm_models.wan.blocks import Block, ControlBlock, Stream
from mm_models.wan.check import check
from mm_models.wan.config import WanConfig
from mm_models.wan.embed import ImageEmbedding, PatchEmbedding
from mm_models.wan.tables import rope_table, sinusoid


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

    With `config.vace_layers`, a second ladder is climbed in step: control block n runs just before the layer that it
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
        """The rungs, in the order in which they are climbed."""
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
            return self.blocks[i](stream, self.core)._replace(control=control)
        n = self.config.vace_layers.index(i)
        control, hint = self.vace_blocks[n](control, stream._replace(x=None), self.core, x if n == 0 else None)
        stream = self.blocks[i](stream, self.core)
        return stream._replace(x=torch.add(stream.x, hint, alpha=stream.control_scale[n]), control=control)
