"""Clips whose every frame carries its number, to tell one frame from its neighbour."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

BITS = 9


def barcode(number: int, height: int = 48, width: int = 80) -> np.ndarray:
    """H W 3: the number as black and white stripes, the most significant bit on the left."""
    frame = np.zeros((height, width, 3), np.uint8)
    stripe = width // BITS
    for bit in range(BITS):
        if number >> (BITS - 1 - bit) & 1:
            frame[:, bit * stripe : (bit + 1) * stripe] = 255
    return frame


def read_barcode(frame: np.ndarray) -> int:
    stripe = frame.shape[1] // BITS
    middle = frame.shape[0] // 2
    bits = [frame[middle, bit * stripe + stripe // 2].mean() > 127 for bit in range(BITS)]
    return sum(on << (BITS - 1 - bit) for bit, on in enumerate(bits))


def write_clip(
    path: Path,
    frames: int = 30,
    *,
    codec: str = "libx264",
    size: tuple[int, int] = (48, 80),
    fps: int = 24,
    gop: int = 12,
    times: list[float] | None = None,
    options: dict[str, str] | None = None,
) -> Path:
    """`times` (seconds) makes the rate variable. Odd sizes are stored as 4:4:4."""
    with av.open(str(path), "w", options={"movflags": "+faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=fps, options={"g": str(gop), **(options or {})})
        stream.height, stream.width = size
        stream.pix_fmt = "yuv444p" if size[0] % 2 or size[1] % 2 else "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 24000)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(barcode(number, *size), format="rgb24")
            seconds = times[number] if times else number / fps
            frame.pts, frame.time_base = round(seconds * 24000), Fraction(1, 24000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
