"""The choice of a kernel put into a model's seams, and told in words."""

from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor, nn

from mm_parallel.attention.backends import pick
from mm_parallel.attention.op import core, named
from mm_parallel.config import AttentionName, ParallelConfig
from mm_parallel.plan import ParallelPlan, Sequence


def choose_core(model: nn.Module, plan: ParallelPlan, name: AttentionName = "auto") -> None:
    """Lets every attention between tokens be computed by the kernel of this name, of inner ladders, too.

    "auto" takes our op on CUDA, which picks one for each call. Elsewhere there is one kernel, which a model that calls
    torch has already, and it is left as it is.
    Raises ValueError for a name that there is not.
    """
    named(name)
    for _, ladder, own in plan.ladders(model):
        owner, _, seam = own.core.rpartition(".")
        module = ladder.get_submodule(owner)
        if (own.tokens or own.share) and getattr(module, seam, None) is not None:
            setattr(module, seam, chosen(getattr(module, seam)) if name == "auto" else named_core(name))


def named_core(name: AttentionName) -> Callable[..., Tensor]:
    """Our op as a seam, by the kernel of this name."""
    return core if name == "auto" else partial(core, backend=name)


def chosen(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A seam that is `plain`, but on CUDA our op."""

    @wraps(plain)
    def choose(q: Tensor, k: Tensor, v: Tensor, sequence: Sequence, mask: Tensor | None = None) -> Tensor:
        if q.device.type == "cuda":
            return core(q, k, v, sequence, mask)
        return plain(q, k, v, sequence) if mask is None else plain(q, k, v, sequence, mask)

    return choose


def describe_choice(
    name: AttentionName,
    plan: ParallelPlan,
    device: torch.device,
    dtype: torch.dtype,
    parallel: ParallelConfig = ParallelConfig(),  # noqa: B008 (frozen)
) -> str:
    """The kernels of a run in a few words: of long sequences, and of packs and masks where that is another.

    parallel: resolved. Raises ValueError for a name that cannot run here: see `mm_parallel.attention.choose`.
    """
    counts = list(plan.heads.values()) if isinstance(plan.heads, dict) else [plan.heads]
    cut = parallel.tp * (parallel.ulysses or 1)
    heads, kv_heads = (max(1, count // cut) for count in (max(counts), min(counts)))  # of a rank
    asked = partial(pick, device, dtype, plan.head_dim, heads=heads, kv_heads=kv_heads, name=name)
    long, uneven = asked(), asked(packed=True)
    where = f" (compute capability {'.'.join(map(str, _capability(device)))})" if device.type == "cuda" else ""
    return long + where + (f"; of packs, masks and short sequences {uneven}" if uneven != long else "")


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
