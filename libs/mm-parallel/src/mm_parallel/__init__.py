"""Meshes, plans and sharded data parallelism for models that are ladders."""

from mm_parallel.__about__ import __version__ as __version__
from mm_parallel.grads import clip_grad_norm, finish_gradients
from mm_parallel.mesh import ParallelConfig, data_rank
from mm_parallel.parallelize import MemoryConfig, parallelize
from mm_parallel.plan import Ladder, ParallelPlan
from mm_parallel.weights import full_tensors, load_parameters

__all__ = [
    "Ladder",
    "MemoryConfig",
    "ParallelConfig",
    "ParallelPlan",
    "clip_grad_norm",
    "data_rank",
    "finish_gradients",
    "full_tensors",
    "load_parameters",
    "parallelize",
]
