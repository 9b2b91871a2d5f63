"""What a Qwen2.5-VL costs: floating-point operations of a forward pass and of training, a multiply-add counted as two.

Causal attention counts half the square of each packed sample, attention of the tower the squares of windows and frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Protocol

from torch import Tensor, nn

from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.grids import Grid, read_grids
from mm_models.tokens.head import IGNORED


class Work(NamedTuple):
    """What a model is given: a conversation, or a pack of them."""

    tokens: int
    pairs: float
    """Pairs of tokens of which one sees the other: half the square of each packed sample."""
    patches: int = 0
    squares: int = 0
    """The sum, over all frames, of the square of its patches."""
    rows: int = 0
    """Rows of the head: tokens with a label in training, all tokens otherwise."""


class Flops(NamedTuple):
    """Of one forward pass, by part; products with weights, and attention, which has none."""

    tower: float
    tower_attention: float
    merger: float
    layers: float
    layers_attention: float
    head: float


def forward_flops(config: Qwen25VLConfig, work: Work) -> Flops:
    """A backward pass costs twice as much; full recompute adds one more forward (not counted in MFU)."""
    c, D, W = config, config.dim, config.vision_dim
    keys = c.num_kv_heads * c.head_dim
    layer = 2 * D * D + 2 * D * keys + 3 * D * c.ffn_dim
    full = len(c.full_attention_layers)
    window = c.window**2 * c.merged  # patches; those at the edges of an image are counted as whole ones
    merged = W * c.merged
    return Flops(
        tower=2 * work.patches * (c.patch_dim * W + c.vision_layers * (4 * W * W + 3 * W * c.vision_ffn_dim)),
        tower_attention=4 * W * ((c.vision_layers - full) * window * work.patches + full * work.squares),
        merger=2 * (work.patches // c.merged) * (merged * merged + merged * D),
        layers=2 * work.tokens * c.num_layers * layer,
        layers_attention=4 * work.pairs * c.num_layers * D,
        head=2 * work.rows * D * c.vocab_size,
    )


@dataclass(frozen=True)
class Trained:
    """Which share of the weights of each part is trained, and whether gradients flow through it at all.

    Frozen weights cost less: no gradient of their own, and where neither they nor what is before them is trained, none
    of their input. (Under adapters 0, and gradients flow; their own cost is left out, as in every MFU.)
    """

    tower: float = 1.0
    merger: float = 1.0
    layers: float = 1.0
    head: float = 1.0
    tower_flows: bool = True
    merger_flows: bool = True
    layers_flow: float = 1.0
    """The share of layers of the language model through which gradients flow: those from the first trained one on."""


def train_flops(config: Qwen25VLConfig, work: Work, trained: Trained | None = None) -> float:
    """FLOPs of forward and backward."""
    forward, t = forward_flops(config, work), trained or Trained()
    return (
        (1 + t.tower_flows + t.tower) * forward.tower
        + (1 + 2 * t.tower_flows) * forward.tower_attention
        + (1 + t.merger_flows + t.merger) * forward.merger
        + (1 + t.layers_flow + t.layers) * forward.layers
        + (1 + 2 * t.layers_flow) * forward.layers_attention
        + (2 + t.head) * forward.head
    )


def find_trained(model: nn.Module) -> Trained:
    """Of a whole model, perhaps on the meta device."""
    share, flows = {}, {}
    numbers = {name.split(".")[2] for name, _ in model.named_parameters() if name.startswith("model.layers.")}
    parts = ("visual.patch_embed.", "visual.blocks.", "visual.merger.", "model.embed_tokens.", "model.layers.")
    for part in (*parts, "lm_head.", *(f"model.layers.{number}." for number in numbers)):
        parameters = [(name, p) for name, p in model.named_parameters() if name.startswith(part)]
        own = [p for name, p in parameters if ".lora_" not in name]
        share[part] = sum(p.numel() for p in own if p.requires_grad) / max(1, sum(p.numel() for p in own))
        flows[part] = any(p.requires_grad for _, p in parameters)
    tower = flows["visual.patch_embed."] or flows["visual.blocks."]
    merger = tower or flows["visual.merger."]
    through = 0
    reached = merger or flows["model.embed_tokens."]
    for number in sorted(numbers, key=int):
        reached = reached or flows[f"model.layers.{number}."]
        through += reached
    return Trained(
        tower=share["visual.blocks."],
        merger=share["visual.merger."],
        layers=share["model.layers."],
        head=share["model.embed_tokens." if model.config.tied else "lm_head."],
        tower_flows=tower,
        merger_flows=merger,
        layers_flow=through / max(1, len(numbers)),
    )


class Size(Protocol):
    """What a conversation takes, see `mm_data.processing.Size`."""

    tokens: int
    patches: int
    label_tokens: int | None
    squares: int


class Cost:
    """`cost(tensors of a pack) -> (its tokens, FLOPs of training on it)`; `weigh` tells those of one conversation."""

    def __init__(self, model: nn.Module) -> None:
        self.config = model.config
        self.trained = find_trained(model)

    def __call__(self, tensors: Mapping[str, Tensor]) -> tuple[int, float]:
        work = measure(
            tensors["segments"][0].tolist(),
            read_grids(tensors["grid_thw"][0], self.config),
            int((tensors["labels"] != IGNORED).sum()),
        )
        return work.tokens, train_flops(self.config, work, self.trained)

    def weigh(self, size: Size) -> float:
        """FLOPs of training on a conversation of this size. Where its labels were not counted, all tokens have one."""
        rows = size.tokens if size.label_tokens is None else size.label_tokens
        work = Work(size.tokens, size.tokens**2 / 2, size.patches, size.squares, rows)
        return train_flops(self.config, work, self.trained)


def measure(segments: Iterable[int], grids: Iterable[Grid], rows: int) -> Work:
    """segments: where samples part, from 0 to all tokens."""
    lengths = [stop - start for start, stop in pairwise(segments)]
    frames = [(count, rows * columns) for count, rows, columns in grids]
    return Work(
        tokens=sum(lengths),
        pairs=sum(length * length for length in lengths) / 2,
        patches=sum(count * patches for count, patches in frames),
        squares=sum(count * patches**2 for count, patches in frames),
        rows=rows,
    )
