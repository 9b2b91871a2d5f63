"""decord, where it is installed (x86) and asked for.

Its seek is not exact: in HEVC it is off by some frames where key frames have leading pictures, which is x265's default,
and everywhere where the container marks no key frames. So frames are counted from the start: exact, but slow far into a
long video.
"""

from collections.abc import Iterator

import numpy as np

from mm_data.files import open_file
from mm_data.video_pyav import Orientation, VideoInfo

UPSIDE_DOWN = Orientation(mirrored=True, upside_down=True)
NO_INDEX = ("mpegts", "mpeg")  # decord seeks to the start, and lands some frames after it


def frames(info: VideoInfo, order: list[int], on_white: bool = True) -> Iterator[tuple[int, np.ndarray]]:
    """As `video_pyav.frames`. Refuses what decord shows otherwise."""
    try:
        import decord
    except ImportError as error:
        raise ValueError("backend decord is not installed: pip install decord (x86 only), or use pyav") from error
    for refused, what in (
        (info.has_alpha, "transparent frames"),
        (info.orientation not in (Orientation(), UPSIDE_DOWN), "frames that are mirrored or on their side"),
        (info.pts is None, "frames whose time stamps do not tell their order"),
        (not info.is_best, "the main video of several"),
        (info.container in NO_INDEX, f"files without an index ({info.container}) from their start"),
    ):
        if refused:
            raise ValueError(f"{info.path}: decord does not read {what}: use backend pyav")
    wanted = set(order)
    with open_file(info.path) as file:  # by its number: a name may mean something else to FFmpeg
        try:
            reader = decord.VideoReader(f"/dev/fd/{file.fileno()}", ctx=decord.cpu(0), num_threads=1)
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
