"""Model families as ladders, with what they are trained on and how they are sampled from."""

from mm_models.__about__ import __version__ as __version__
from mm_models.families import boundary as boundary
from mm_models.families import build as build
from mm_models.families import plan as plan
from mm_models.families import preset as preset
from mm_models.families import presets as presets
