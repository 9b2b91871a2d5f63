"""python -m mm_infer --weights W --prompt "a cat" --output out/"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mm_convert.cli.arguments import parse
from mm_convert.cli.terminal import escaped_output, one_line
from mm_infer.config import Config
from mm_infer.inputs import Given
from mm_infer.lists import Request, read_requests
from mm_infer.settle import check
from mm_infer.weights import Weights


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work, found before anything is loaded; 130 after Ctrl-C."""
    config = parse(Config, argv, prog="mm_infer")
    try:
        with _exit_code(2, ValueError, OSError):
            requests, weights = _check(config)
        from mm_infer import generate  # torch, only now that the command makes sense
        from mm_infer.ranks import distributed, share

        with distributed() as rank, _exit_code(2, ValueError):
            with _exit_code(2, ValueError, OSError):
                job = generate.prepare(config, requests, weights, share(config.parallel), rank)
            with _exit_code(1, OSError, FloatingPointError, MemoryError):  # a full disk, broken weights, a huge video
                generate.run(job)
    except KeyboardInterrupt:
        print(
            "mm_infer: stopped; the videos named above are complete, the same command makes the others", file=sys.stderr
        )
        sys.exit(130)


def _check(config: Config) -> tuple[list[Request], Weights]:
    """What is asked for, and the weights, with all that can be known of both without torch, which takes seconds."""
    requests = read_requests(config)
    blocked = next((path for path in (config.output, *config.output.parents) if path.exists()), config.output)
    if blocked.exists() and not blocked.is_dir():
        raise ValueError(f"output {config.output}: {blocked} is a file, not a folder")
    weights = Weights(
        config.weights,
        config.encoders,
        model=config.model,
        lora=config.lora,
        boundary=config.boundary,
        text_tokens=config.text_tokens,
    )
    for request in requests:
        check(config.options, Given(**request.given), weights.facts)
    return requests, weights


@contextmanager
def _exit_code(code: int, *errors: type[Exception]) -> Iterator[None]:
    """Ends the program with this code and one line for errors that are not a mistake of ours."""
    try:
        yield
    except errors as error:
        print(f"mm_infer: error: {one_line(error)}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
