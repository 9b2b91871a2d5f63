"""Everything that a run needs, before it is launched: ``python -m mm_train.doctor``, with the flags of the run.

It starts nothing and writes nothing. Exit code 0: all checks hold; 2: one fails.
Under torchrun every rank looks, and what differs is told with its ranks and hosts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from mm_convert.cli.arguments import flags_of
from mm_convert.cli.checks import Together, report
from mm_convert.cli.terminal import escaped_output
from mm_models.libraries import installed
from mm_parallel.launch import read_launch
from mm_train.checks import CHECKS, Asked
from mm_train.command import run
from mm_train.config import Config
from mm_train.recipe import load_config


@dataclass
class DoctorConfig(Config):
    """Look at all that a training run needs, with the flags of the run. Nothing is started, and nothing is written."""

    world: Annotated[int, ">= 1", "<= 1048576"] | None = None
    """Ranks that the run will have; by default those that torchrun has started, or one."""
    device: str = ""
    """Device that it will run on, of the table of mm_train.estimate, e.g. h100: whether its memory is enough. By
    default the one that is found here.
    """
    devices: Path | None = None
    """TOML with devices of your own, in the form of that table."""


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    def read() -> DoctorConfig:
        launch = read_launch()
        config = load_config(argv, DoctorConfig, "python -m mm_train.doctor")
        if config.world is not None and launch.joins and config.world != launch.world:
            raise ValueError(
                f"--world {config.world}, but torchrun has started {launch.world} ranks: leave it out, or start one "
                "process without torchrun"
            )
        return config

    def work(config: DoctorConfig) -> None:
        asked = Asked(config, config.world, config.device, config.devices)
        if not read_launch().joins:
            sys.exit(report(CHECKS, asked, sys.stdout))
        import torch.distributed as dist  # only now

        from mm_parallel.device import leave
        from mm_parallel.guard import join
        from mm_parallel.guard.agree import check_alike, gather
        from mm_parallel.guard.diagnosis import ranks_of
        from mm_train.contents import read_contents

        with join(deadline=config.patience) as guard:
            guard.at("looking", config.patience)
            compare = partial(check_alike, flags_of(config), installed(), lambda: read_contents(config))
            code = report(CHECKS, asked, sys.stdout, Together(dist.get_rank(), gather, ranks_of, compare))
        leave()
        sys.exit(code)

    run(read, work)


if __name__ == "__main__":
    main()
