"""Every way to cut a model that is a ladder, with the numbers of one device."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mm_parallel.__about__ import __version__ as __version__
from mm_parallel.config import MemoryConfig, ParallelConfig

if TYPE_CHECKING:
    from mm_parallel.grads import clip_grad_norm, finish_gradients
    from mm_parallel.mesh import data_rank, make_mesh
    from mm_parallel.order import parallelize
    from mm_parallel.pipeline import Pipeline
    from mm_parallel.plan import Ladder, ParallelPlan
    from mm_parallel.step import forward_backward
    from mm_parallel.weights import full_tensors, load_parameters

__all__ = [
    "Ladder",
    "MemoryConfig",
    "ParallelConfig",
    "ParallelPlan",
    "Pipeline",
    "clip_grad_norm",
    "data_rank",
    "finish_gradients",
    "forward_backward",
    "full_tensors",
    "load_parameters",
    "make_mesh",
    "parallelize",
]

# What needs torch is imported when it is asked for: a command line made of the two configurations is read without it.
_HOMES = {
    "grads": ("clip_grad_norm", "finish_gradients"),
    "mesh": ("data_rank", "make_mesh"),
    "order": ("parallelize",),
    "pipeline": ("Pipeline",),
    "plan": ("Ladder", "ParallelPlan"),
    "step": ("forward_backward",),
    "weights": ("full_tensors", "load_parameters"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mm_parallel.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
