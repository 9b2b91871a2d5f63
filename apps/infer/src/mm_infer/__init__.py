"""Generate videos: `python -m mm_infer --help`, or `mm_infer.load(path)` and call what it returns."""

from typing import TYPE_CHECKING

from mm_infer.__about__ import __version__ as __version__

if TYPE_CHECKING:
    from mm_infer.sample import Result as Result
    from mm_infer.sample import Sampler as Sampler
    from mm_infer.sample import load as load


def __getattr__(name: str):
    if name in ("load", "Sampler", "Result"):  # on demand: torch takes seconds to import, --help should not
        from mm_infer import sample

        return getattr(sample, name)
    raise AttributeError(f"module 'mm_infer' has no attribute {name!r}")
