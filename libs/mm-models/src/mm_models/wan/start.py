"""What a Wan begins with: one rule for each parameter name, as its authors published, and what it may grow from.

A parameter depends on (seed, name) alone, so every rank can draw its own part of a model that fits on none of them.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from mm_models.initial import generator
from mm_models.wan.config import WanConfig

ZERO = ("head.head.weight", "*.after_proj.weight")
"""Patterns of the projections that begin at zero: while they are frozen, nothing is learned through them."""
GROWN = "a control ladder on the weights of a plain Wan: it begins as a copy that changes nothing"
"""What a person should know of weights from which the rest has grown."""


def initial(name: str, shape: Sequence[int], seed: int) -> Tensor:
    """The starting value of one parameter: float32, on the CPU.

    Linears and the patch embedding are Xavier-uniform, text and time embedding N(0, 0.02), modulation tables
    N(0, 1)/√dim; biases, positions and the last projection are zero, norms one. The projections before and behind
    VACE's control blocks are zero, so that control changes nothing at first.
    """
    random = generator(seed, name)
    weight = torch.empty(tuple(shape), device="cpu")
    zero = (".bias", ".emb_pos", "head.head.weight", ".before_proj.weight", ".after_proj.weight")
    if name.endswith(zero):
        return weight.zero_()
    if name.endswith("modulation"):
        return weight.normal_(0, weight.shape[-1] ** -0.5, generator=random)
    if weight.ndim == 1:  # the weight of a norm
        return weight.fill_(1)
    if name.startswith(("text_embedding.", "time_embedding.")):
        return weight.normal_(0, 0.02, generator=random)
    nn.init.xavier_uniform_(weight.flatten(1), generator=random)
    return weight


def missing(names: Collection[str], there: Collection[str]) -> set[str]:
    """Of a model's parameters, those that can grow from the ones that are there: a control ladder on a plain Wan."""
    control = {name for name in names if name.startswith("vace_")}
    return set() if control & set(there) else control


def grow(config: WanConfig, base: Callable[[str], Tensor], name: str, shape: Sequence[int]) -> Tensor:
    """The starting value of a parameter of VACE's control ladder on a Wan without one, whose parameters `base` gives.

    A control block begins as the layer that it feeds; the patch embedding of the control as the video's, for both sets
    of latents, blind to the mask; the projections at zero. So the model computes exactly what the base does, and what
    is learned first is how much of the control to let in. (As MindSpeed-MM and Wan-AI begin.)
    """
    if name.startswith("vace_patch_embedding."):
        own = base(name.removeprefix("vace_"))
        if name.endswith(".bias"):
            return own
        weight = own.new_zeros(tuple(shape))
        channels = own.shape[1]
        weight[:, :channels] = weight[:, channels : 2 * channels] = own
        return weight
    block, _, rest = name.removeprefix("vace_blocks.").partition(".")
    if rest.startswith(("before_proj.", "after_proj.")):
        return torch.zeros(tuple(shape), device="cpu")
    return base(f"blocks.{config.vace_layers[int(block)]}.{rest}")
