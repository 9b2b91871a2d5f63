"""``python -m mm_train --model wan2.1-t2v-1.3b …``, alone or under torchrun."""

from __future__ import annotations

import sys

from mm_train.config import load_config


def main(argv: list[str] | None = None) -> None:
    config = load_config(argv)
    from mm_train.train import train  # after the flags: torch takes seconds, a typo should not

    try:
        print(train(config))
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as stop:
        print(stop or "stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
