"""Wan and friends as ladders, with the objectives and samplers that go with them."""

from mm_models.__about__ import __version__ as __version__
