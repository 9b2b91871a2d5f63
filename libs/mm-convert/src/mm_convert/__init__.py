"""Checkpoints of video models, from any form into any other, streamed."""

from mm_convert.__about__ import __version__
from mm_convert.checkpoint import Checkpoint, open_checkpoint
from mm_convert.convert import convert, inspect
from mm_convert.save import save_checkpoint

__all__ = ["Checkpoint", "__version__", "convert", "inspect", "open_checkpoint", "save_checkpoint"]
