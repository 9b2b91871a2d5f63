"""Prompts, images and videos to what models read, and back, from a diffusers directory.

The networks are those of transformers and diffusers (`pip install mm-models[encoders]`), imported when first used.
Nothing is downloaded and nothing is random: a missing folder, file or tensor is an error. A family's VAE lies in its
own folder; here is what it can be asked (`Codec`).
"""

from mm_models.encoders.codec import Codec as Codec
from mm_models.encoders.codec import to_frames as to_frames
from mm_models.encoders.image import ImageEncoder as ImageEncoder
from mm_models.encoders.text import TextEncoder as TextEncoder
from mm_models.encoders.text import clean as clean
