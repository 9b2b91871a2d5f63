"""The command `mm-convert`: which commands there are. What they do is in `commands`, loaded when one is called."""

from __future__ import annotations

import sys
from collections.abc import Sequence

USAGE = """\
usage: mm-convert COMMAND [options]        (mm-convert COMMAND --help says more)

Checkpoints of video models, from any form into any other, streamed.

  inspect PATH                  what is this checkpoint: family, names, files, sizes; reads headers only
  convert SOURCE TARGET --to T  rewrite it; T is mm (our own files), diffusers or original (Wan-AI)

The commands of MindSpeed-MM's guides:

  WanConverter hf_to_mm --cfg.source_path S --cfg.target_path T
  WanConverter mm_to_hf --cfg.source_path S --cfg.target_path T [--cfg.hf_dir H]

options: -h, --help, --version
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exit code 0: done; 1: it could not be done; 2: it was not said rightly."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help") or (argv[1:] in (["-h"], ["--help"]) and argv[0].endswith("Converter")):
        print(USAGE, end="")
        sys.exit(0 if argv else 2)
    if argv == ["--version"]:
        from mm_convert.__about__ import __version__

        print(f"mm-convert {__version__}")
        return

    from mm_convert.commands import run

    try:
        run(argv)
    except (ValueError, OSError) as error:
        sys.exit(f"mm-convert: error: {error}")
    except KeyboardInterrupt:
        sys.stderr.write("\nmm-convert: interrupted; nothing was written\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
