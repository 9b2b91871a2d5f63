"""How a Wan model may be cut, as data."""

from mm_models.wan.model import WanModel
from mm_parallel.plan import ParallelPlan


def plan(model: WanModel) -> ParallelPlan:
    return ParallelPlan(rungs=("blocks.*",), fp32=model.islands)
