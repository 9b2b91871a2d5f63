"""Videos on disk: mp4 files that say how they were made."""

import json
import os
from pathlib import Path

import av
import numpy as np

# Constant quality, hard to tell from the frames themselves. Without mbtree, because with it x264 (in PyAV 18.1) writes
# another file each time it is given the same frames, and the same prompt should give the same file.
X264 = {"crf": "17", "mbtree": "0"}


def write_video(path: Path | str, frames: np.ndarray, fps: int, made_with: dict | None = None) -> None:
    """Write `frames` (F H W 3, uint8) as H.264 in an mp4, with `made_with` as JSON in the container's comment.

    The file appears under its name only when it is complete: it is written beside it and renamed. ValueError for
    frames of another shape or type and for odd heights or widths (yuv420p halves both); OSError, naming the file, when
    the disk is full or the folder cannot be written.
    """
    path = Path(path)
    frames = np.ascontiguousarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(f"{path}: frames must be F H W 3 uint8, not {frames.shape} {frames.dtype}")
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ValueError(f"{path}: H.264 in yuv420p needs even sizes, not {height}x{width}")

    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _encode(part, frames, fps, json.dumps(made_with, ensure_ascii=False) if made_with is not None else None)
        os.replace(part, path)
    except OSError as error:  # PyAV's errors of the operating system are OSErrors too
        raise OSError(error.errno, f"cannot write the video: {error.strerror}", str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _encode(path: Path, frames: np.ndarray, fps: int, comment: str | None) -> None:
    _, height, width, _ = frames.shape
    with av.open(f"file:{path}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if comment is not None:
            container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options=X264)
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        # The conversion to YUV below is that of BT.601, also for large frames, so say so: players guess BT.709 there.
        stream.codec_context.colorspace = stream.codec_context.color_primaries = stream.codec_context.color_trc = 6
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def made_with(path: Path | str) -> dict:
    """What `write_video` recorded in the file. ValueError when it recorded nothing."""
    with av.open(f"file:{path}") as container:
        comment = container.metadata.get("comment")
    if comment is None:
        raise ValueError(f"{path} does not say how it was made: it has no comment")
    return json.loads(comment)
