"""Writing mp4 files that say how they were made."""

import json
import os
import uuid
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from mm_data.files import parse_json
from mm_data.video_pyav import open_container


def write_video(
    path: str | Path, frames: np.ndarray, fps: float, made_with: dict | None = None, *, crf: int = 17
) -> None:
    """Write frames (F H W 3 uint8 RGB) as H.264 in an mp4, with `made_with` as JSON in the container's comment.

    The file appears under its name only when it is complete. The same frames give the same bytes. `crf` is x264's
    constant quality: 17 is hard to tell from the frames themselves, lower is better and larger. Odd sizes are written
    without colour subsampling, which halves both sides. ValueError for other shapes or types; OSError, naming the file,
    when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
        raise ValueError(f"{path}: frames must be F H W 3 uint8 with F > 0, not {frames.shape} {frames.dtype}")
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}.mp4")
    try:
        _encode(temporary, frames, fps, crf, made_with)
        os.replace(temporary, path)
    except OSError as error:  # PyAV's errors of the operating system are OSErrors too
        raise OSError(error.errno, f"cannot write the video: {error.strerror}", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def made_with(path: str | Path) -> dict:
    """What `write_video` recorded in the file. ValueError when it recorded nothing."""
    with open_container(path) as container:
        comment = container.metadata.get("comment")
    if comment is None:
        raise ValueError(f"{path} does not say how it was made: it has no comment")
    return parse_json(comment, path)


def _encode(path: Path, frames: np.ndarray, fps: float, crf: int, made_with: dict | None) -> None:
    height, width = frames.shape[1:3]
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if made_with is not None:
            container.metadata["comment"] = json.dumps(made_with, ensure_ascii=False)
        # Without mbtree, because with it x264 (in PyAV 18.1) writes another file each time it is given the same frames.
        options = {"crf": str(crf), "mbtree": "0"}
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        # The conversion to YUV below is that of BT.601, also for large frames, so say so: players guess BT.709 there.
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 6
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
