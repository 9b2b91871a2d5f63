"""decord, where it is installed (x86) and asked for.

Its seek is not exact: in HEVC it is off by some frames where key frames have leading pictures, which is x265's default,
and everywhere where the container marks no key frames. So frames are counted from the start: exact, but slow far into a
long video.
"""

from collections.abc import Iterator

import numpy as np

from mm_data.video_pyav import VideoInfo


def frames(info: VideoInfo, order: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """As `video_pyav.frames`. Refuses a file of which decord knows another number of frames."""
    try:
        import decord
    except ImportError as error:
        raise ValueError("backend decord is not installed: pip install decord (x86 only), or use pyav") from error
    wanted = set(order)
    try:
        reader = decord.VideoReader(str(info.path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != info.num_frames:
            raise ValueError(
                f"{info.path}: decord counts {len(reader)} frames, PyAV {info.num_frames}: use backend pyav"
            )
        for index in range(order[-1] + 1):
            picture = reader.next()
            if index in wanted:
                yield index, picture.asnumpy()
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        reason = (str(error).strip() or "it ends early").splitlines()[0]
        raise ValueError(f"{info.path} cannot be read by decord: {reason}; try backend pyav") from error
