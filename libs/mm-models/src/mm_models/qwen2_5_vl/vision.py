"""The vision tower of Qwen2.5-VL, on one device: a ladder that runs in the stem of the language model.

Letters in the comments:
    N patches of all images and videos   D width of the tower   H heads   M images and videos

`tower(pixel_values, grids) -> features`: N 1176 -> N/4 width of the language model, in the order of tokens. It takes
any number of images and videos in one call, none as well: then all has zero rows, and every gradient is zero. Linears
and attention run in the dtype of pixel_values; statistics of norms and rotary positions are at least float32.

    tower.share      (pixel_values, grids) -> (pixel_values, grids), first: keep this rank's part of the frames
    tower.core       (q, k, v: B L H h, sequence, mask) -> B L H h, one of the few attentions of a layer
    tower.collect    (features, grids) -> features, last: those of all images

No frame is ever cut: `share` leaves out whole ones, and `core` is given whole windows or frames.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_models.layers import Linear, RMSNorm, Sequence, core, identity
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.grids import Grid
from mm_models.qwen2_5_vl.layers import GatedMLP, turn
from mm_models.qwen2_5_vl.windows import Grouping, lay_out

EPS = 1e-6  # of all norms here, whatever config.json says of the language model's
THETA = 1e4


def keep_all(pixel_values: Tensor, grids: tuple[Grid, ...]) -> tuple[Tensor, tuple[Grid, ...]]:
    """The seam `share` that nobody uses."""
    return pixel_values, grids


class Call(NamedTuple):
    """A group of windows or frames on the device, see `windows.Group`."""

    count: int
    size: int
    patches: int
    fill: Tensor | None
    real: Tensor | None
    kept: Tensor | None


class Calls(NamedTuple):
    """All of one kind on the device, see `windows.Grouping`."""

    order: Tensor | None
    back: Tensor | None
    groups: tuple[Call, ...]


class VisionStream(NamedTuple):
    """What travels up the tower. Patches are in the order of their windows."""

    x: Tensor  # N D, in the compute dtype: the residual stream
    rope: Tensor  # 2 N h/2, float32: cosines, sines
    windows: Calls
    frames: Calls
    back: Tensor  # N/4: where each token is in this order


class PatchEmbedding(nn.Module):
    """A convolution whose stride is its kernel, and whose patches are cut out already: a linear map. N 1176 -> N D"""

    def __init__(self, config: Qwen25VLConfig) -> None:
        super().__init__()
        kernel = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nn.Conv3d(config.channels, config.vision_dim, kernel_size=kernel, stride=kernel, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.proj.weight.flatten(1).to(x.dtype))


class VisionAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor, attend: Callable) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).unbind(1)  # N H h
        # a copy of v, or what the backward keeps of it would hold q and k before they are turned, too
        q, k, v = turn(q, rope), turn(k, rope), v.contiguous()
        return self.proj(attend(q, k, v).flatten(1))


def attend(q: Tensor, k: Tensor, v: Tensor, calls: Calls, core: Callable) -> Tensor:
    """Attention within each window or frame, N H h: a call of `core` for each group of them."""
    if not calls.groups:
        return v  # N is 0; so the gradient goes on, and is zero
    outs, sizes = [], [group.patches for group in calls.groups]
    qkv = [choose(x, calls.order) for x in (q, k, v)]
    # the backward of a split is one cat, where slices would each fill a whole
    parts = [x.split(sizes) if len(sizes) > 1 else (x,) for x in qkv]
    for own, (count, size, _, fill, real, kept) in zip(zip(*parts, strict=True), calls.groups, strict=True):
        own = [choose(x, fill).unflatten(0, (count, size)) for x in own]
        out = core(*own, Sequence(size)) if real is None else core(*own, Sequence(size), real)
        outs.append(choose(out.flatten(0, 1), kept))
    return choose(outs[0] if len(outs) == 1 else torch.cat(outs), calls.back)


def choose(x: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of x, or x itself. By number, as a mask makes the host wait, and `x[rows]` sorts in its backward."""
    return x if rows is None else x.index_select(0, rows)


class VisionBlock(nn.Module):
    def __init__(self, config: Qwen25VLConfig, full_attention: bool) -> None:
        super().__init__()
        dim = config.vision_dim
        self.full_attention = full_attention
        self.norm1 = RMSNorm(dim, EPS)
        self.norm2 = RMSNorm(dim, EPS)
        self.attn = VisionAttention(dim, config.vision_heads)
        self.mlp = GatedMLP(dim, config.vision_ffn_dim, bias=True)

    def forward(self, stream: VisionStream, attend: Callable) -> Tensor:
        x = stream.x + self.attn(self.norm1(stream.x), stream.rope, attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nn.Module):
    """Neighbouring patches to one token of the language model. N D -> N/4 width"""

    def __init__(self, config: Qwen25VLConfig) -> None:
        super().__init__()
        self.width = config.vision_dim * config.merged
        self.ln_q = RMSNorm(config.vision_dim, EPS)
        self.mlp = nn.Sequential(Linear(self.width, self.width), nn.GELU(), Linear(self.width, config.dim))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.numel() // self.width
        return self.mlp(self.ln_q(x).reshape(tokens, self.width))


class VisionTower(nn.Module):
    """`tower(pixel_values, grids) -> features`, see the top of this file."""

    def __init__(self, config: Qwen25VLConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbedding(config)
        full = config.full_attention_layers
        self.blocks = nn.ModuleList(VisionBlock(config, i in full) for i in range(config.vision_layers))
        self.merger = PatchMerger(config)

        self.share: Callable[[Tensor, tuple[Grid, ...]], tuple[Tensor, tuple[Grid, ...]]] = keep_all
        self.core: Callable[[Tensor, Tensor, Tensor, Sequence, Tensor | None], Tensor] = core
        self.collect: Callable[[Tensor, tuple[Grid, ...]], Tensor] = identity

    @property
    def layers(self) -> nn.ModuleList:
        """In the order in which they run."""
        return self.blocks

    def forward(self, pixel_values: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """pixel_values: N 1176, in the dtype to compute in. grids: of each image or video, N patches in all."""
        stream = self.stem(*self.share(pixel_values, grids))
        for i in range(len(self.layers)):
            stream = self.layer(i, stream)
        return self.collect(self.head(stream), grids)

    def stem(self, pixel_values: Tensor, grids: tuple[Grid, ...]) -> VisionStream:
        config, device = self.config, pixel_values.device
        layout = lay_out(grids, config.spatial_merge_size, config.window)
        order, back = put(layout.order, device), put(layout.back, device)
        cells = pixel_values.unflatten(0, (len(layout.order), config.merged))
        x = self.patch_embed(choose(cells, order).flatten(0, 1))
        rope = rope_table(layout.places, config.vision_head_dim, device)
        return VisionStream(x, rope, put_calls(layout.windows, device), put_calls(layout.frames, device), back)

    def layer(self, i: int, stream: VisionStream) -> VisionStream:
        calls = stream.frames if self.blocks[i].full_attention else stream.windows
        return stream._replace(x=self.blocks[i](stream, partial(attend, calls=calls, core=self.core)))

    def head(self, stream: VisionStream) -> Tensor:
        return choose(self.merger(stream.x), stream.back)


def rope_table(places: np.ndarray, head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines for patches at places (N 2: row, column): 2 N h/2, float32. The first half of the angles is the
    row's, the other the column's.
    """
    quarter = head_dim // 4
    frequencies = THETA ** -(np.arange(quarter) / quarter)
    most = int(places.max(initial=0))
    angles = np.outer(np.arange(most + 1), frequencies)
    table = put(np.stack((np.cos(angles), np.sin(angles))).astype(np.float32), device)
    return table[:, put(places, device)].flatten(2)


def put(array: np.ndarray, device: torch.device) -> Tensor:
    """Not kept by device: a tensor made under a fake-tensor or inference mode must not leak out of it."""
    return torch.from_numpy(array).to(device)


def put_calls(grouping: Grouping, device: torch.device) -> Calls:
    def move(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else put(array, device)

    groups = tuple(Call(*group[:3], *map(move, group[3:])) for group in grouping.groups)
    return Calls(move(grouping.order), move(grouping.back), groups)
