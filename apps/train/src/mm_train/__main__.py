"""``python -m mm_train --model wan2.1-t2v-1.3b …``, alone or under torchrun."""

from __future__ import annotations

import os
import sys

from mm_convert.cli.terminal import escaped_output, one_line
from mm_parallel.launch import read_launch
from mm_train.checks import check
from mm_train.command import run
from mm_train.config import Config
from mm_train.recipe import load_config


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    def read() -> Config:
        read_launch()
        config = load_config(argv)
        check(config)
        return config

    def work(config: Config) -> None:
        from mm_parallel.device import leave  # only now: torch takes seconds, a typo or a missing path should not
        from mm_train.train import train

        written = train(config)
        if os.environ.get("RANK", "0") == "0":
            print(f"done: {one_line(written)}", file=sys.stderr)
        leave()

    run(read, work)


if __name__ == "__main__":
    main()
