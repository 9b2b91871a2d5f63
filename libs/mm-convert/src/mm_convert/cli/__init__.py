"""The command `mm-convert`: which commands there are. What they do is in `commands`, loaded when one is called."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from mm_convert.cli.terminal import escaped_output, one_line

USAGE = """\
usage: mm-convert COMMAND [options]        (mm-convert COMMAND --help says more)

Checkpoints of video models, from any form into any other, streamed.

  inspect PATH                  what is this: family, preset, names, files, split, sizes; reads headers only
  convert SOURCE TARGET --to T  rewrite it as mm (ours), mindspeed (its tree), dcp (torch DCP), or under the names
                                original, diffusers, transformers; LoRA adapters and pairs of experts too
  diff A B                      how two checkpoints differ, in whatever form each is

The commands of MindSpeed-MM's guides (… METHOD --help has the options):

  WanConverter           hf_to_mm  mm_to_hf  resplit  mm_to_dcp  dcp_to_mm  layerzero_to_mm
                         merge_lora_to_base  lora_hf_to_mm  lora_mm_to_hf
  VACEConverter          hf_to_mm  mm_to_hf  resplit  mm_to_dcp  dcp_to_mm  layerzero_to_mm
                         hf_diffusers_to_mm  mm_to_hf_diffusers
  OpenSoraPlanConverter  hf_to_mm  mm_to_hf  resplit  vae_convert
  Qwen2_5_VLConverter    hf_to_mm  mm_to_hf  resplit

Every command that writes takes --dry_run, --overwrite, --dtype and --sha256.

options: -h, --help, --version
"""


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Run one command. Exit codes are those of `report_errors`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if argv else 2)
    if argv == ["--version"]:
        from mm_convert.__about__ import __version__

        print(f"mm-convert {__version__}")
        return

    from mm_convert.cli.commands import run

    report_errors("mm-convert", lambda: run(argv))


def report_errors(program: str, action: Callable[[], None]) -> None:
    """Do it; what goes wrong ends with one line on stderr, and with the exit codes of all our programs.

    0: done. 2: what was typed is wrong, a path that does not exist too. 1: it could not be done, as what lies there
    cannot be read or written (and for `diff`: the two differ). 130: interrupted.
    """
    try:
        action()
    except (ValueError, OSError, ImportError) as error:
        from mm_convert.read.source import NotThere

        message = f"{program}: error: {one_line(error)}"
        if not isinstance(error, NotThere):
            sys.exit(message)
        sys.stderr.write(f"{message}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write(f"\n{program}: interrupted; what was not finished is not there\n")
        sys.exit(130)
