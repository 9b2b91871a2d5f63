"""python -m mm_infer --weights W --prompt "a cat" --output out/"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from mm_convert.cli.arguments import parse
from mm_convert.cli.terminal import escaped_output, explain, one_line
from mm_infer.checks import CHECKS, Asked, read_contents, tell
from mm_infer.config import Config
from mm_infer.lists import Request
from mm_infer.weights import Weights
from mm_parallel.absence import absence_told
from mm_parallel.launch import read_launch


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work, found before anything is loaded; 130 after Ctrl-C."""
    try:
        with absence_told():  # of several ranks, the others end, too
            config = parse(Config, argv, prog="mm_infer")
            with _exit_code(2, ValueError, OSError):
                read_launch()
                requests, weights = ([], None) if config.check else _check(config)
        if config.check:
            with _exit_code(1, OSError):
                sys.exit(tell(CHECKS, Asked(config), config, lambda: read_contents(config)))
        _generate(config, requests, weights)
    except KeyboardInterrupt:
        made = "the videos named above are complete, the same command makes the others"
        print(f"mm_infer: stopped; {made}", file=sys.stderr)
        sys.exit(130)


def _generate(config: Config, requests: list[Request], weights: Weights) -> None:
    from mm_infer import generate  # torch, only now that the command makes sense
    from mm_infer.ranks import distributed, share

    with (
        _exit_code(2, ValueError),
        _exit_code(1, OSError, FloatingPointError, MemoryError),  # a full disk, broken weights, a huge video
        distributed(config.deadline) as (rank, guard),
        ExitStack() as held,
    ):
        guard.at("preparing", config.patience)
        with _refusing():
            job = generate.prepare(config, requests, weights, share(config.parallel), rank, held)
        generate.run(job, guard, config.patience)


def _check(config: Config) -> tuple[list[Request], Weights]:
    """What is asked for, and the weights, with all that can be known of both without torch, which takes seconds."""
    asked = Asked(config)
    for one in CHECKS:
        if one.when == "at once":
            one.run(asked)
    return asked.requests, asked.weights


@contextmanager
def _exit_code(code: int, *errors: type[Exception]) -> Iterator[None]:
    """Ends the program with this code and one line for errors that are not a mistake of ours."""
    try:
        yield
    except errors as error:
        print(f"mm_infer: error: {one_line(error)}", file=sys.stderr)
        sys.exit(code)


@contextmanager
def _refusing() -> Iterator[None]:
    """An OSError before the work has begun is a command that cannot work."""
    try:
        yield
    except OSError as error:
        raise ValueError(explain(error)) from error


if __name__ == "__main__":
    main()
