"""Extract features and train video models."""

from mm_train.__about__ import __version__ as __version__
