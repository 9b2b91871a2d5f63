"""python -m mm_train.page runs/ [more runs]"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from mm_convert.cli.arguments import parse
from mm_convert.cli.terminal import escaped_output, one_line


@dataclass(frozen=True)
class Config:
    """Curves, samples and settings of runs in the browser, while they grow. Nothing is written, nothing is fetched."""

    runs: list[Path] = field(metadata={"positional": True})
    "folders of runs (--output of mm_train), or folders of such folders"
    host: str = "127.0.0.1"
    "address to listen at: 127.0.0.1 is this machine alone, 0.0.0.0 everybody"
    port: Annotated[int, ">= 0", "<= 65535"] = 7861
    "0: any free one"


def read_config(argv: list[str] | None = None) -> Config:
    """Of a command line: the folders, and then flags."""
    words = sys.argv[1:] if argv is None else argv
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    named = [json.dumps(folders)] if folders else []
    return parse(Config, [*named, *words[len(folders) :]], prog="mm_train.page")


@escaped_output()
def main(argv: list[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work; 130 after Ctrl-C."""
    config = read_config(argv)
    try:
        from mm_train.page.runs import Runs
        from mm_train.page.server import open_server

        server = open_server(Runs(config.runs), config.host, config.port)
    except (ValueError, OSError) as error:
        print(f"mm_train.page: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    shown = f"[{config.host}]" if ":" in config.host else config.host
    print(f"open http://{shown}:{server.server_address[1]}", flush=True)
    if not server.local:
        print("note: whoever reaches this address can see these runs", file=sys.stderr)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        server.server_close()


if __name__ == "__main__":
    main()
