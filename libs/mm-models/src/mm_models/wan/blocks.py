"""What travels up a Wan, and the rungs it climbs. The letters are those of `mm_models.wan.model`."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mm_models.layers import LayerNorm, Linear, RMSNorm, Sequence, attention, gated, modulate, wide
from mm_models.wan.config import WanConfig
from mm_models.wan.tables import rotate


class Stream(NamedTuple):
    """What travels up the ladder. Dim 1 of x, rope, noisy and control is tokens."""

    x: Tensor  # B L D, float32: the residual stream
    rope: Tensor  # 2 L h/2, float32: cosines, sines
    mod: Tensor  # B 1 7 D, or B 2 7 D with a timestep per token, float32: six rows for the layers, one for the head
    text: Tensor  # B S D, in the compute dtype
    grid: tuple[int, int, int]  # tokens per axis of the whole video, needed to put it together again
    sequence: Sequence  # the tokens of the whole video
    noisy: Tensor | None = (
        None  # B L 1, with a timestep per token: 1 for tokens of the second row of mod, 0 of the first
    )
    control: Tensor | None = None  # B L D: the residual stream of the control ladder
    control_scale: tuple[float, ...] = ()  # for each of its blocks


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
        q = rotate(self.heads(self.norm_q(self.q(x))), rope)
        k = rotate(self.heads(self.norm_k(self.k(x))), rope)
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
        rows = self.text_tokens if self.image else context.shape[1]
        image, text = context[:, :-rows], context[:, -rows:]
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
        x, text, noisy = stream.x, stream.text, stream.noisy
        modulation = wide(self.modulation) + stream.mod[:, :, :6]  # B 1|2 6 D
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)

        y = modulate(self.norm1, x, shift1, scale1, noisy)
        x = gated(x, gate1, self.self_attn(y.to(text.dtype), stream.rope, core, stream.sequence), noisy)
        x = x + self.cross_attn(self.norm3(x).to(text.dtype), text)
        y = modulate(self.norm2, x, shift2, scale2, noisy)
        x = gated(x, gate2, self.ffn(y.to(text.dtype)), noisy)
        return stream._replace(x=x)


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
        control = super().forward(stream._replace(x=control), core).x
        return control, self.after_proj(control.to(dtype))
