"""Prompts, images and videos to what Wan reads, and back: UMT5, CLIP and the Wan VAEs, from a diffusers directory.

The networks are those of transformers and diffusers (`pip install mm-models[encoders]`), imported when first used.
Nothing is downloaded and nothing is random: a missing folder, file or tensor is an error.
"""

from mm_models.encoders.image import ImageEncoder as ImageEncoder
from mm_models.encoders.text import TextEncoder as TextEncoder
from mm_models.encoders.text import clean as clean
from mm_models.encoders.video import VideoVAE as VideoVAE
