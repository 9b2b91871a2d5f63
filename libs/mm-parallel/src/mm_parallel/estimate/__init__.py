"""What a layout needs, before anything is launched: no device, no process group, no weights.

*Counted* is what the model's own code does on the meta device, where tensors have shapes and no values. *Modelled* is
what is computed of that by a rule that is written here. *Constant* is a number of a device, from a table.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mm_parallel.estimate.memory import estimate_memory
    from mm_parallel.estimate.sizes import RankMemory, UnitMemory
    from mm_parallel.estimate.traces import UnitTrace
    from mm_parallel.estimate.units import Units

__all__ = ["RankMemory", "UnitMemory", "UnitTrace", "Units", "estimate_memory"]

_HOMES = {
    "memory": ("estimate_memory",),
    "sizes": ("RankMemory", "UnitMemory"),
    "traces": ("UnitTrace",),
    "units": ("Units",),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"mm_parallel.estimate.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
