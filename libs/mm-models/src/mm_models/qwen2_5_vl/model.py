"""Qwen2.5-VL, on one device. Parameter names are those of the files on the hub.

Letters in the comments:
    B rows   L tokens of a row   D width of the model   V tokens of the vocabulary   H heads, K of keys and values
    N patches of all images and videos   M images and videos

The model is a ladder: `stem` makes a stream, every `layer` hands it on, `head` makes logits of it, or the loss of each
token. In its stem runs another ladder, the vision tower (vision.py), exactly once, also where there is no image.

Seams that do nothing here, and let others cut tokens and vocabulary over devices:

    model.split          Stream -> Stream, last thing in the stem: keep this rank's part of the tokens
    model.core           (q: B L H h, k and v: B L K h, sequence) -> B L H h, the attention between tokens
    model.gather         (B L …, sequence) -> (B L …), at the end of the head: join what `split` cut
    model.token_losses   (x: B L D, weight: V D, labels: B L) -> B L: the cross entropy of each label
    model.token_logits   (x: B L D, weight: V D) -> B L V; where a rank has some rows of weight, these two join them

Precision: all runs in `model.compute_dtype` (None: the dtype of the embedding's weight), the residual stream too, as
the makers have it. Statistics of norms, rotary positions and the losses are at least float32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_models.layers import Linear, RMSNorm, Sequence, core, identity
from mm_models.qwen2_5_vl.check import check, check_tokens
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.grids import Grid, read_grids
from mm_models.qwen2_5_vl.layers import GatedMLP, turn
from mm_models.qwen2_5_vl.vision import VisionTower
from mm_models.tokens.head import token_losses


class Stream(NamedTuple):
    """What travels from stem to head."""

    x: Tensor  # B L D, in the compute dtype: the residual stream
    rope: Tensor  # 2 B L h/2, float32: cosines, sines
    sequence: Sequence  # the tokens of the whole row
    labels: Tensor | None = None  # B L int64: the token that each position must predict, -100 for none


class Attention(nn.Module):
    def __init__(self, config: Qwen25VLConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        keys = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(config.dim, config.dim)
        self.k_proj = Linear(config.dim, keys)
        self.v_proj = Linear(config.dim, keys)
        self.o_proj = Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, core: Callable, sequence: Sequence) -> Tensor:
        linears = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in linears)  # B L H h, B L K h
        return self.o_proj(core(turn(q, rope), turn(k, rope), v, sequence).flatten(2))


class Block(nn.Module):
    """One layer: causal attention, gated feed-forward."""

    def __init__(self, config: Qwen25VLConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.eps)
        self.post_attention_layernorm = RMSNorm(config.dim, config.eps)
        self.self_attn = Attention(config)
        self.mlp = GatedMLP(config.dim, config.ffn_dim, bias=False)

    def forward(self, stream: Stream, core: Callable) -> Tensor:
        x = stream.x + self.self_attn(self.input_layernorm(stream.x), stream.rope, core, stream.sequence)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen25VLModel(nn.Module):
    """`model(input_ids, position_ids, pixel_values, grid_thw, sequence) -> logits`; with `labels` -> the loss of each
    token. See `stem` for shapes and errors.

    Weights are made for loading into: `mm_models.build` fills them the way the authors did.
    """

    keep_fp32 = ()
    """Patterns of the names of parameters that stay at least float32: none, the makers round them all."""

    def __init__(self, config: Qwen25VLConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding(config.vocab_size, config.dim),
                "layers": nn.ModuleList(Block(config) for _ in range(config.num_layers)),
                "norm": RMSNorm(config.dim, config.eps),
            }
        )
        self.lm_head = None if config.tied else Linear(config.dim, config.vocab_size, bias=False)

        self.compute_dtype: torch.dtype | None = None
        self.split: Callable[[Stream], Stream] = identity
        self.core: Callable[[Tensor, Tensor, Tensor, Sequence], Tensor] = core
        self.gather: Callable[[Tensor, Sequence], Tensor] = identity
        self.token_losses: Callable[[Tensor, Tensor, Tensor], Tensor] = token_losses
        self.token_logits: Callable[[Tensor, Tensor], Tensor] = token_logits

    @property
    def layers(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.model.layers

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Any = None,
        sequence: Sequence | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        stream = self.stem(input_ids, position_ids, pixel_values, grid_thw, sequence, labels)
        for i in range(len(self.layers)):
            stream = self.layer(i, stream)
        return self.head(stream)

    def stem(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        pixel_values: Tensor | None = None,
        grid_thw: Any = None,
        sequence: Sequence | None = None,
        labels: Tensor | None = None,
    ) -> Stream:
        """Makes the stream.

        Args:
            input_ids: B L, int64; L may be 0.
            position_ids: 3 B L, integers: time, row and column of each token (`mm_models.qwen2_5_vl.positions`).
            pixel_values: N 1176, patches of all images and videos in the order of their tokens. None: there are none.
            grid_thw: M 3, frames, rows and columns of each: a tensor of any device, or tuples. On an accelerator it
                costs a wait; tuples cost none.
            sequence: L tokens, and where packed samples part. None: each row is one sample.
            labels: B L, int64: the token that each position must predict, -100 where it need not. So they are the
                input_ids moved by one, and a sequence may be cut anywhere.

        Raises:
            ValueError: shapes, tokens and grids that do not fit each other, with what would.
        """
        config = self.config
        dtype = self.compute_dtype or self.model.embed_tokens.weight.dtype
        if pixel_values is None:
            pixel_values = torch.zeros(0, config.patch_dim, dtype=dtype, device=input_ids.device)
        grids = find_grids(config, pixel_values, grid_thw)
        sequence = sequence or Sequence(input_ids.shape[-1], causal=True)
        check(config, input_ids, position_ids, pixel_values, grids, sequence, labels)

        features = self.visual(pixel_values.to(dtype), grids)  # also of no image: every rank gathers its parameters
        seen = (input_ids == config.image_token) | (input_ids == config.video_token)  # B L
        check_tokens(config, seen, len(pixel_values))
        x = self.model.embed_tokens(input_ids).to(dtype)
        x = x.masked_scatter(seen.unsqueeze(-1), features.to(dtype))
        rope = rope_table(position_ids, config)
        return self.split(Stream(x, rope, sequence, labels))

    def layer(self, i: int, stream: Stream) -> Stream:
        return stream._replace(x=self.layers[i](stream, self.core))

    def head(self, stream: Stream) -> Tensor:
        """Logits, B L V in the compute dtype; where the stream has labels, losses, B L float32, 0 where there is no
        label.
        """
        x = self.model.norm(stream.x)
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        if stream.labels is None:
            return self.gather(self.token_logits(x, head.weight), stream.sequence)
        return self.gather(self.token_losses(x, head.weight, stream.labels), stream.sequence)


def token_logits(x: Tensor, weight: Tensor) -> Tensor:
    """The seam of that name on one device."""
    return F.linear(x, weight.to(x.dtype))


def rope_table(position_ids: Tensor, config: Qwen25VLConfig) -> Tensor:
    """Cosines and sines for every token: 2 B L h/2, float32. Of the pairs of channels the first turn with the time, the
    next with the row, the last with the column. The product is float32, as the makers'.
    """
    pairs = config.head_dim // 2
    frequencies = torch.arange(pairs, dtype=torch.float64, device="cpu").neg().div(pairs)
    frequencies = torch.pow(config.rope_theta, frequencies).float().to(position_ids.device)
    bands = zip(position_ids, frequencies.split(config.mrope_section), strict=True)
    angles = torch.cat([place.float().unsqueeze(-1) * frequency for place, frequency in bands], -1)  # B L h/2
    return torch.stack((angles.cos(), angles.sin()))


def find_grids(config: Qwen25VLConfig, pixel_values: Tensor, grid_thw: Any) -> tuple[Grid, ...]:
    """The grids as facts of the host."""
    if isinstance(grid_thw, Tensor) and grid_thw.is_meta:  # a pipeline asks for shapes, and any grid has them
        merge, patches = config.spatial_merge_size, pixel_values.shape[0]
        return ((1, merge, patches // merge),) if patches else ()
    return read_grids(grid_thw, config)
