"""Meshes, plans and sharded data parallelism for models that are ladders."""

from mm_parallel.__about__ import __version__ as __version__
