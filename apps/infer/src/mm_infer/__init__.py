"""Generate videos."""

from mm_infer.__about__ import __version__ as __version__
