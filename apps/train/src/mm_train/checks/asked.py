"""A run that is asked for, as checks look at it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_models.family import Family
from mm_parallel.launch import read_launch
from mm_train.config import Config
from mm_train.objective import architecture
from mm_train.resume import find_checkpoint

if TYPE_CHECKING:
    from torch import nn


class Asked:
    """A run that is asked for, and what several checks look at, opened once."""

    def __init__(self, config: Config, world: int | None = None, device: str = "", devices: Path | None = None) -> None:
        """world: ranks; by default those that were started. device: its name in the table of `mm_train.estimate`, or in
        the file `devices`; by default that which is found.
        """
        self.config, self.device, self.devices = config, device, devices
        self.world = read_launch().world if world is None else world

    @property
    def family(self) -> Family:
        return architecture(self.config)[0]

    @property
    def shape(self) -> Any:
        """The model's configuration."""
        return architecture(self.config)[1]

    @cached_property
    def model(self) -> nn.Module:
        """Whole, on the meta device."""
        from mm_train.start import outline  # torch, only now

        return outline(self.config)

    @cached_property
    def continued(self) -> tuple[Path | None, list[str]]:
        """The checkpoint that the run goes on from, and what was changed since. ValueError for one of another run."""
        return find_checkpoint(self.config)
