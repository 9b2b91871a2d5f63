"""PyAV: find every frame's time stamp from the packets, seek to the key frame before the wanted one, decode forward."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

# Codecs with packets that are decoded but never shown: only decoding tells how many frames there are.
HIDDEN_FRAMES = {"vp8"}


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. Height and width are those of the frames when turned upright, in pixels as stored."""

    path: Path
    codec: str
    height: int
    width: int
    pixel_aspect: Fraction  # width of a pixel / its height
    turns: int  # quarter turns counter-clockwise that put a stored frame upright
    timestamps: np.ndarray = field(repr=False)  # seconds of each frame, float64, increasing, the first is 0
    pts: list[int] | None = field(repr=False)  # the same in the container's units; None: frames can only be counted
    keys: list[int] = field(repr=False)  # pts of the key frames, increasing

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def fps(self) -> float:
        """Frames per second on average; 25 for a single frame, which has none."""
        return (self.num_frames - 1) / float(self.timestamps[-1]) if self.num_frames > 1 else 25.0


def scan(path: Path) -> VideoInfo:
    """Read the header of every packet, and decode one frame. Raises ValueError, see `mm_data.video.probe`."""
    with _open(path) as (container, stream):
        packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
        if not packets:
            raise ValueError(f"{path} holds no frames, though its header promises {stream.frames}")
        if any(packet.is_corrupt for packet in packets):
            raise ValueError(f"{path} is cut off or damaged: it ends in the middle of a frame")
        pts = [packet.pts for packet in packets]
        keys = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
    with _open(path) as (container, stream):
        decoded = container.decode(stream)
        first = next(decoded, None)
        if first is None:
            raise ValueError(f"{path}: none of its {len(packets)} frames can be decoded: damaged or encrypted")
        if stream.codec_context.name in HIDDEN_FRAMES or not _are_distinct(pts):
            pts = [first.pts, *(frame.pts for frame in decoded)]
        if first.rotation % 90:
            raise ValueError(
                f"{path} is to be shown rotated by {first.rotation} degrees: only quarter turns are supported"
            )
        turns = first.rotation // 90 % 4
        aspect = Fraction(stream.sample_aspect_ratio or 1)
        if _are_distinct(pts):
            pts.sort()
            timestamps = np.array([float((shown - pts[0]) * stream.time_base) for shown in pts])
        else:
            timestamps = np.arange(len(pts)) / float(stream.average_rate or 25)
        return VideoInfo(
            path=path,
            codec=stream.codec_context.name,
            height=first.width if turns % 2 else first.height,
            width=first.height if turns % 2 else first.width,
            pixel_aspect=1 / aspect if turns % 2 else aspect,
            turns=turns,
            timestamps=timestamps,
            pts=pts if _are_distinct(pts) else None,
            keys=keys,
        )


def frames(info: VideoInfo, order: list[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(index, upright picture H W 3) of the frames in `order`, increasing; without those that cannot be decoded."""
    with _open(info.path) as (container, stream):
        for index, frame in _decode(container, stream, info, order):
            if frame.is_corrupt:
                raise ValueError(f"{info.path}: frame {index} of {info.num_frames} is damaged")
            yield index, np.rot90(frame.to_ndarray(format="rgb24"), info.turns)


def _decode(container, stream, info: VideoInfo, order: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) of the wanted frames, with a seek wherever a later key frame saves decoding."""
    if info.pts is None:
        wanted = set(order)
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                yield index, frame
            if index >= order[-1]:
                return
        return
    number = {pts: index for index, pts in enumerate(info.pts)}
    for run in _split_at_keys(info, order):
        left = set(run)
        start = bisect_right(info.keys, info.pts[run[0]]) - 1
        # A seek may land late where decoding order is not showing order: then one key frame earlier, then the start.
        for attempt in sorted({start, max(start - 1, -1), -1}, reverse=True):
            target = info.keys[attempt] if attempt >= 0 else min(info.pts[0], 0)
            container.seek(target, stream=stream, backward=True)
            landed = attempt < 0
            try:
                for frame in _from_key(container, stream, target if attempt >= 0 else None):
                    index = number.get(frame.pts)
                    if not landed and not (frame.key_frame and index is not None and index <= run[0]):
                        break  # late, or at what the container calls a key frame and the decoder does not
                    landed = True
                    if index in left:
                        left.remove(index)
                        yield index, frame
                    if not left:
                        break
            except av.FFmpegError:
                if attempt < 0:
                    raise
                continue  # in an open GOP pictures may refer to what lies before the key frame
            if landed:
                break


def _from_key(container, stream, key: int | None) -> Iterator[av.VideoFrame]:
    """Decode on from a key frame, without the pictures shown before it: in an open GOP they need earlier ones."""
    for packet in container.demux(stream):
        if key is None or packet.pts is None or packet.pts >= key:
            yield from packet.decode()


def _split_at_keys(info: VideoInfo, order: list[int]) -> Iterator[list[int]]:
    """Cut the wanted frames where a key frame lies in a gap between two of them: each run needs one seek."""
    run = [order[0]]
    for index in order[1:]:
        key_before, key_here = (bisect_right(info.keys, info.pts[i]) for i in (run[-1], index))
        if key_here > key_before and index > run[-1] + 1:
            yield run
            run = []
        run.append(index)
    yield run


def _are_distinct(pts: list[int | None]) -> bool:
    return None not in pts and len(set(pts)) == len(pts)


@contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its main video stream; every error of FFmpeg becomes a ValueError that names the file."""
    _check_file(path)
    try:
        with av.open(f"file:{path}", metadata_errors="ignore") as container:  # file: lest a colon be a protocol's
            kind = container.format.name
            if kind in ("image2", "gif", "apng") or kind.endswith("_pipe"):  # FFmpeg's readers of single pictures
                raise ValueError(f"{path} is a picture, not a video: leave it out, or join pictures into a video first")
            stream = container.streams.best("video")
            if stream is None:
                raise ValueError(f"{path} holds no video, only {sorted({s.type for s in container.streams})}")
            stream.codec_context.options = {"err_detect": "explode"}  # a damaged picture is an error, not a guess
            stream.codec_context.thread_count = 1  # parallelism is the business of the data workers
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read as a video: damaged, cut off, encrypted or no video at all ({error.strerror})"
        ) from error


def _check_file(path: Path) -> None:
    """ValueError for what is not even a file to open."""
    if path.is_dir():
        images = sum(p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") for p in path.iterdir())
        hint = f"it holds {images} images; join them into a video first" if images else "give a video file"
        raise ValueError(f"{path} is a folder: {hint}")
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
