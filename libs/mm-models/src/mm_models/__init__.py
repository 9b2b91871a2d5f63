"""Wan and friends as ladders, with the objectives and samplers that go with them."""

from mm_models.__about__ import __version__ as __version__
from mm_models.registry import boundary as boundary
from mm_models.registry import build as build
from mm_models.registry import plan as plan
from mm_models.registry import preset as preset
from mm_models.registry import presets as presets
