"""decord, where it is installed (x86) and asked for."""

from collections.abc import Iterator

import numpy as np

from mm_data.video_pyav import VideoInfo


def frames(info: VideoInfo, order: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """As `video_pyav.frames`. Refuses a file of which decord knows another number of frames or another size."""
    try:
        import decord
    except ImportError as error:
        raise ValueError("backend decord is not installed: pip install decord (x86 only), or use pyav") from error
    if info.turns:
        raise ValueError(f"{info.path} is to be shown rotated: decord ignores that in some files, use backend pyav")
    try:
        reader = decord.VideoReader(str(info.path), ctx=decord.cpu(0), num_threads=1)
        if len(reader) != info.num_frames:
            raise ValueError(
                f"{info.path}: decord counts {len(reader)} frames, PyAV {info.num_frames}: use backend pyav"
            )
        if info.codec == "hevc":
            # decord's seek is off by some frames where key frames have leading pictures, which is x265's default
            for index in range(order[-1] + 1):
                picture = reader.next()
                if index in order:
                    yield index, picture.asnumpy()
            return
        for index in order:
            reader.seek_accurate(index)
            yield index, reader.next().asnumpy()
    except (decord.DECORDError, RuntimeError, StopIteration) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{info.path} cannot be read by decord: {reason}; try backend pyav") from error
