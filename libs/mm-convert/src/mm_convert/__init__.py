"""Checkpoints of video models, from any form into any other, streamed."""

from mm_convert.__about__ import __version__ as __version__
