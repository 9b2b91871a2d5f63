"""The choice of a kernel put into a model's seams, and told in words."""

from collections.abc import Callable, Mapping
from functools import partial, wraps

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mm_parallel.attention.backends import LONG, pick
from mm_parallel.attention.op import core, named
from mm_parallel.config import AttentionName
from mm_parallel.mesh import size
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
    mesh: DeviceMesh | None = None,
) -> str:
    """The kernel of a run in a few words: of long sequences, and of others where that is another one.

    Raises ValueError for a name that cannot run here: see `mm_parallel.attention.choose`.
    """
    counts = plan.heads.values() if isinstance(plan.heads, Mapping) else (plan.heads,)
    ranks = size(mesh, "tp") * size(mesh, "ulysses")
    heads, kv_heads = (max(1, count // ranks) for count in (max(counts), min(counts)))
    asked = partial(pick, device, dtype, plan.head_dim, heads=heads, kv_heads=kv_heads, name=name)
    long, uneven = asked(), asked(packed=True)
    short = asked(queries=LONG - 1)
    others = f"packs, masks and fewer than {LONG:,} tokens" if short == uneven else "packs and masks"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        long += f" (compute capability {major}.{minor})"
    return long if long.startswith(uneven) else f"{long}, of {others} {uneven}"
