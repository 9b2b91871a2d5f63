"""``python -m mm_train.estimate --model wan2.1-t2v-14b --world 64 --device h100 …``: what a run will take."""

from __future__ import annotations

import gc
import sys

from mm_convert.cli.terminal import escaped_output
from mm_parallel.launch import read_launch
from mm_train.command import run_alone
from mm_train.estimate.config import EstimateConfig
from mm_train.recipe import load_config


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    def work() -> None:
        config = load_config(argv, EstimateConfig, "python -m mm_train.estimate")
        gc.disable()  # it looks at millions of objects, again and again, and finds hardly any garbage
        try:
            from mm_train.estimate.report import report  # torch, only now

            for line in report(config, config.world or read_launch().world, sys.argv[1:] if argv is None else argv):
                print(line, flush=True)
        finally:
            gc.enable()

    run_alone(work)


if __name__ == "__main__":
    main()
