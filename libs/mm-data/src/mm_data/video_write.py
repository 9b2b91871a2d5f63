"""Writing mp4."""

import json
import os
import uuid
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_video(path: str | Path, frames: np.ndarray, fps: float, metadata: dict | None = None) -> None:
    """Write frames (F H W 3 uint8 RGB) as H.264 in mp4; `metadata` goes into the container's comment as JSON.

    Complete or not there. Odd sizes are written without colour subsampling, which halves both sides.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"{path}: frames must be F H W 3 uint8 with F > 0, not {frames.shape} {frames.dtype}")
    height, width = frames.shape[1:3]
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}.mp4")
    try:
        with av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
            if metadata is not None:
                container.metadata["comment"] = json.dumps(metadata, ensure_ascii=False)
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options={"crf": "17"})
            stream.height, stream.width = height, width
            stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
            container.mux(stream.encode())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
