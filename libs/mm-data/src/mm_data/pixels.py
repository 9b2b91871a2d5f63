"""What stored pixels mean, alike for pictures and for frames of videos: colours on white, grey values of a mask."""

import numpy as np
from PIL import Image


def lay_on_white(rgba: np.ndarray) -> np.ndarray:
    """H W 4 uint8 (alpha not multiplied in) -> H W 3 uint8, as a viewer with a white background shows it."""
    picture = Image.fromarray(np.ascontiguousarray(rgba))
    return np.array(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


def to_grey(rgb: np.ndarray) -> np.ndarray:
    """... 3 uint8 -> ... 1 uint8: luma of BT.601, rounded; of grey pixels their very value. As Pillow's mode L."""
    weights = np.array([19595, 38470, 7471], np.uint32)  # of 65536
    return ((rgb @ weights + 32768) >> 16).astype(np.uint8)[..., None]
