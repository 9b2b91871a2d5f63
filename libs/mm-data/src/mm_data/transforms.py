"""Pixels: cut and scale a frame, and bring a clip into the range that the VAE was trained on."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mm_data.geometry import crop_box


def crop_resize(frame: np.ndarray, box: tuple[int, int, int, int], size: tuple[int, int]) -> np.ndarray:
    """H W C uint8 -> h w C uint8: cut out `box` (top, left, height, width), scale to `size` (bilinear, antialiased).

    Pixel centres are kept in place (align_corners=False): MindSpeed-MM's align_corners stretches the picture by
    (n-1)/n, differently for every source size. Also unlike there, one crop serves the clip and its condition frames.
    """
    top, left, height, width = box
    piece = frame[top : top + height, left : left + width]
    if (height, width) == size:
        return np.ascontiguousarray(piece)
    # numpy's negative strides (turned frames) have no counterpart in torch
    planes = torch.from_numpy(np.ascontiguousarray(piece)).permute(2, 0, 1)[None]  # 1 C H W
    planes = F.interpolate(planes, size=size, mode="bilinear", antialias=True, align_corners=False)
    return planes[0].permute(1, 2, 0).contiguous().numpy()


def to_model_range(frames: np.ndarray) -> Tensor:
    """F H W 3 uint8 -> 3 F H W float32 in [-1, 1]."""
    return (
        torch.from_numpy(frames)
        .permute(3, 0, 1, 2)
        .to(torch.float32, memory_format=torch.contiguous_format)
        .div_(127.5)
        .sub_(1.0)
    )


def to_mask(frames: np.ndarray) -> Tensor:
    """F H W 1 uint8 -> 1 F H W float32 in 0..1."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).to(torch.float32, memory_format=torch.contiguous_format) / 255


def crop_to(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """H W 3 uint8 -> 3 h w in [-1, 1]: the largest centred piece of that shape, scaled, as a clip's frames are."""
    box = crop_box(*image.shape[:2], size)
    return to_model_range(crop_resize(image, box, size)[None])[:, 0]


def pad_to(image: np.ndarray, size: tuple[int, int]) -> Tensor:
    """H W 3 uint8 -> 3 h w in [-1, 1]: the whole picture, scaled to fit, centred on white."""
    height, width = image.shape[:2]
    scale = min(size[0] / height, size[1] / width)
    inner = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
    padded = torch.ones(3, *size)
    scaled = crop_resize(image, (0, 0, height, width), inner)
    padded[:, top : top + inner[0], left : left + inner[1]] = to_model_range(scaled[None])[:, 0]
    return padded


def to_uint8(video: Tensor) -> np.ndarray:
    """3 F H W in [-1, 1] (clipped) -> F H W 3 uint8: the inverse, exact for what came from uint8."""
    return (
        video.float()
        .clamp(-1, 1)
        .add(1)
        .mul(127.5)
        .round()
        .to(torch.uint8)
        .permute(1, 2, 3, 0)
        .cpu()
        .contiguous()
        .numpy()
    )
