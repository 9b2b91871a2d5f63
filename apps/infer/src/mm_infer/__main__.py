"""python -m mm_infer --weights W --prompt "a cat" --output out/"""

import sys
from collections.abc import Sequence

from mm_convert.cli.arguments import parse
from mm_infer.config import Config


def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work, found before anything is loaded; 130 after Ctrl-C."""
    config = parse(Config, argv, prog="mm_infer")
    from mm_infer import generate  # torch, only now that the command line makes sense
    from mm_infer.ranks import distributed, place

    try:
        with distributed() as rank:
            try:
                job = generate.prepare(config, place(config.parallel), rank)
            except (ValueError, OSError) as error:
                sys.exit(_fail(error, 2))
            try:
                generate.run(job)
            except (OSError, FloatingPointError, MemoryError) as error:  # a full disk, broken weights, a huge video
                sys.exit(_fail(error, 1))
    except KeyboardInterrupt:
        print(
            "mm_infer: stopped; the videos named above are complete, the same command makes the others", file=sys.stderr
        )
        sys.exit(130)


def _fail(error: Exception, code: int) -> int:
    print(f"mm_infer: error: {error}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
