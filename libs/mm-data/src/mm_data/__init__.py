"""Videos, captions and encoded features: read, cut, cache and load, exactly resumable."""

from mm_data.__about__ import __version__ as __version__
