"""PyAV: FFmpeg as a library. The frames of a file from its packets, and their pixels."""

from bisect import bisect_right
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, pairwise
from math import atan2, degrees
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition

from mm_data.files import find_fault, open_file
from mm_data.pixels import lay_on_white

# Codecs with packets that are decoded but never shown: only decoding tells how many frames there are.
HIDDEN_FRAMES = {"vp8", "libvpx"}
# FFmpeg's own decoders of these leave out the alpha that Matroska stores beside each frame.
ALPHA_DECODERS = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
# Formats, and codecs, of one picture or several. Frames build on earlier ones, whatever packets say of key frames.
ANIMATIONS = {"gif", "apng"}
# Formats, too, that hold a picture where they hold one frame alone. A PDF with a JPEG in it is read as MJPEG.
PERHAPS_PICTURES = {*ANIMATIONS, "mjpeg"}
PICTURES = {"ico"}  # beside those that FFmpeg calls png_pipe, and so on
# Brands of HEIF: pictures in boxes like those of mp4, whose alpha and tiles FFmpeg takes for videos.
HEIF = {"avif", "avis", "heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1"}
UNSAID = 2
HDR = {16: "HDR (PQ)", 18: "HDR (HLG)"}  # transfer characteristics of ITU-T H.273


class Orientation(NamedTuple):
    """How a stored frame comes upright: rows and columns change places, then left and right, then top and bottom."""

    transposed: bool = False
    mirrored: bool = False
    upside_down: bool = False

    def apply(self, picture: np.ndarray) -> np.ndarray:
        """H W C -> the same, or W H C where it is transposed."""
        if self.transposed:
            picture = picture.swapaxes(0, 1)
        return picture[:: -1 if self.upside_down else 1, :: -1 if self.mirrored else 1]


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds. Height and width are those of the frames when upright, in pixels as stored."""

    path: Path
    container: str  # FFmpeg's name of the format
    codec: str
    height: int
    width: int
    pixel_aspect: Fraction  # width of a pixel / its height
    orientation: Orientation
    has_alpha: bool  # may be transparent
    is_best: bool  # the video stream that FFmpeg itself would choose
    notes: tuple[str, ...]  # what its colours or frames lose when they are taken as they are: HDR, interlaced
    timestamps: np.ndarray = field(repr=False)  # seconds of each frame, float64, increasing, the first is 0
    pts: list[int] | None = field(repr=False)  # the same in the container's units; None: frames can only be counted
    keys: list[int] = field(repr=False)  # pts of the key frames, increasing
    key_sizes: list[int] = field(repr=False)  # bytes of their packets

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def fps(self) -> float:
        """Frames per second on average; 25 for a single frame, which has none."""
        return (self.num_frames - 1) / float(self.timestamps[-1]) if self.num_frames > 1 else 25.0


class Opened(NamedTuple):
    """A file that is being read, its main video stream, and what decodes it."""

    container: av.container.InputContainer
    stream: av.VideoStream
    decoder: av.VideoCodecContext

    def packets(self) -> Iterator[av.Packet]:
        """All from here on; the last one is empty, and has the decoder give what it still holds."""
        ended = False
        try:
            for packet in self.container.demux(self.stream):  # gone when it is left, or PyAV 18 loses 280 bytes
                ended = not packet.size
                yield packet
        except IndexError:  # PyAV stumbles over streams that begin in the middle, as in broadcasts; after ours, at best
            if not ended:
                raise av.InvalidDataError(0, "another stream begins in its middle") from None

    def decode(self) -> Iterator[av.VideoFrame]:
        """The frames from here on, in the order of showing."""
        for packet in self.packets():
            yield from self.decoder.decode(packet)

    def decode_from(self, info: "VideoInfo", place: int) -> Iterator[av.VideoFrame]:
        """After a seek: the frames from the key frame of this place on, or the next; none if it landed elsewhere.

        Without the pictures shown before it, which in an open GOP need earlier ones.
        """
        here = slice(place, place + 2)
        keys, landed = list(zip(info.keys[here], info.key_sizes[here], strict=True)), False
        for packet in self.packets():
            if packet.pts is None or packet.pts >= info.keys[place]:
                if not landed and (packet.pts, packet.size) not in keys:
                    return  # too late; or packets have other time stamps after a seek, as in some ASF
                landed = True
                yield from self.decoder.decode(packet)

    def seek(self, pts: int) -> None:
        self.container.seek(pts, stream=self.stream, backward=True)
        self.decoder.flush_buffers()


def scan(path: Path) -> VideoInfo:
    """Read the header of every packet, and decode one frame. Raises ValueError, see `mm_data.video.probe`.

    All frames are decoded where the packets do not tell the order of showing.
    """
    pts: list[int | None] = []
    dts: list[int] = []
    keys: list[tuple[int, int]] = []
    with _open(path) as video:
        for packet in video.packets():  # one at a time: together they are as large as the file
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise ValueError(f"{path} is cut off or damaged: it ends in the middle of a frame")
            pts.append(packet.pts)
            if packet.dts is not None:
                dts.append(packet.dts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.size))
        if not pts:
            raise ValueError(f"{path} holds no frames, though its header promises {video.stream.frames}")
        if video.container.format.name in PERHAPS_PICTURES and len(pts) == 1:
            _refuse_picture(path)
        if video.decoder.name in ANIMATIONS:
            keys.clear()
    keys.sort()
    with _open(path) as video:
        decoded, transfer = (
            video.decode(),
            video.stream.codec_context.color_trc,
        )  # of the container; decoding forgets it
        first = next(decoded, None)
        if first is None:
            raise ValueError(f"{path}: none of its {len(pts)} frames can be decoded: damaged or encrypted")
        in_order = all(a < b for a, b in pairwise(dts))
        pts = _shown(pts, in_order, first, decoded, video.decoder)
        sound = _are_distinct(pts) and (in_order or pts == sorted(pts))  # else there are none, or they start anew
        if sound:  # frames in another order than their time stamps have the same times
            shown = sorted(pts)
            times = np.array([float((one - shown[0]) * video.stream.time_base) for one in shown])
        else:
            times = np.arange(len(pts)) / float(video.stream.average_rate or 25)
        orientation = _orientation(first, path)
        aspect = Fraction(video.stream.sample_aspect_ratio or 1)
        return VideoInfo(
            path=path,
            container=video.container.format.name,
            codec=video.stream.codec_context.name,
            height=first.width if orientation.transposed else first.height,
            width=first.height if orientation.transposed else first.width,
            pixel_aspect=1 / aspect if orientation.transposed else aspect,
            orientation=orientation,
            has_alpha=_has_alpha(first),
            is_best=video.stream == video.container.streams.best("video"),
            notes=_notes(first, transfer),
            timestamps=times,
            pts=pts if sound and pts == sorted(pts) else None,
            keys=[pts for pts, _ in keys],
            key_sizes=[size for _, size in keys],
        )


def frames(info: VideoInfo, order: list[int], on_white: bool = True) -> Iterator[tuple[int, np.ndarray]]:
    """(index, upright picture H W 3) of the frames in `order`, increasing; without those that cannot be decoded.

    What is transparent lies on white, or else its alpha is left out. Where the decoder shows another order than the
    time stamps, all come again, counted: the later one of an index is right.
    """
    try:
        for index, frame in _count(info, order) if info.pts is None else _find(info, order):
            if frame.is_corrupt:
                raise ValueError(f"{info.path}: frame {index} of {info.num_frames} is damaged")
            yield index, info.orientation.apply(_to_rgb(frame, on_white))
    except _Disorder:
        yield from frames(replace(info, pts=None), order, on_white)


class _Disorder(Exception):
    """The decoder shows frames in another order than their time stamps have."""


def _count(info: VideoInfo, order: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) of the wanted frames, counted from the start."""
    wanted = set(order)
    with _open(info.path) as video:
        for index, frame in enumerate(video.decode()):
            if index in wanted:
                yield index, frame
            if index >= order[-1]:
                return


def _find(info: VideoInfo, order: list[int]) -> Iterator[tuple[int, av.VideoFrame]]:
    """(index, frame) of the wanted frames, by time stamps; with a seek wherever a later key frame saves decoding."""
    number = {pts: index for index, pts in enumerate(info.pts)}
    with _open(info.path) as video:
        for run in _split_at_keys(info, order):
            left = set(run)
            start = bisect_right(info.keys, info.pts[run[0]]) - 1
            # A seek may land late where decoding order is not showing order: then one key frame earlier.
            for place in range(start, max(start - 2, -1), -1):
                try:
                    video.seek(info.keys[place])
                    if (yield from _find_here(info, video.decode_from(info, place), number, left, key_first=True)):
                        break
                except av.FFmpegError:
                    continue  # in an open GOP pictures may refer to what lies before the key frame
            else:
                with _open(info.path) as fresh:  # a seek to the start may land late, too
                    yield from _find_here(info, fresh.decode(), number, left, key_first=False)


def _find_here(
    info: VideoInfo, decoded: Iterator[av.VideoFrame], number: dict[int, int], left: set[int], key_first: bool
) -> Generator[tuple[int, av.VideoFrame], None, bool]:
    """(index, frame) of those `left`, which it takes out, until there are none.

    Returns False where nothing was decoded; or, with `key_first`, the first frame is no key frame, as it may be only by
    the container's word, or comes too late.
    """
    first, last = min(left), -1
    for frame in decoded:
        index = number.get(frame.pts)
        if key_first and last < 0 and not (frame.key_frame and index is not None and index <= first):
            return False
        if index is None:
            continue
        if last >= 0 and index != last + 1:
            _check_order(info)
        last = index
        if index in left:
            left.remove(index)
            yield index, frame
        if not left:
            break
    return last >= 0


def _check_order(info: VideoInfo) -> None:
    """Raise _Disorder unless the decoder shows all frames in the order of their time stamps, as far as it does."""
    with _open(info.path) as video:
        shown = [frame.pts for frame in video.decode()]
    if None in shown or shown != sorted(shown):
        raise _Disorder


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


def _shown(
    pts: list[int | None],
    in_order: bool,
    first: av.VideoFrame,
    decoded: Iterator[av.VideoFrame],
    decoder: av.VideoCodecContext,
) -> list[int | None]:
    """Time stamps of the frames in the order of showing: those of the packets, sorted, where they can be believed.

    Else all frames are decoded. `first` and `decoded` are the frames; `in_order`: packets are in the order of decoding.
    """
    expected, enough = None, 1
    if in_order and _are_distinct(pts) and decoder.name not in HIDDEN_FRAMES:
        expected = sorted(pts)
        if first.interlaced_frame:
            enough = 4  # a packet may be a field, not a frame
        # Where packets are in the order of their time stamps, none of them is shown later than the next. A decoder that
        # holds frames back says otherwise: time stamps follow the order of decoding, as in every AVI.
        if expected == pts and decoder.codec.reorder and decoder.has_b_frames:
            enough = len(pts)
    shown: list[int | None] = []
    try:
        for frame in chain([first], decoded):
            shown.append(frame.pts)
            if expected is not None and len(shown) == min(enough, len(pts)) and shown == expected[: len(shown)]:
                return expected
    except av.FFmpegError:
        if expected is None or shown != expected[: len(shown)]:
            raise
        return expected  # damaged further on, which is said where it is read
    return shown


def _orientation(frame: av.VideoFrame, path: Path) -> Orientation:
    """That of the display matrix. ValueError for one that turns by less than a quarter."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d = (int(number) for number in np.frombuffer(bytes(data), np.int32)[:5])
            straight, crossed = max(abs(a), abs(d)), max(abs(b), abs(c))
            if min(straight, crossed) * 100 > max(straight, crossed):
                raise ValueError(
                    f"{path} is to be shown rotated by {degrees(atan2(b, a)):.0f} degrees: only quarter turns and "
                    "mirrors are supported"
                )
            # a pixel at (x, y) is shown at (a x + c y, b x + d y)
            return Orientation(True, c < 0, b < 0) if crossed > straight else Orientation(False, a < 0, d < 0)
    return Orientation()


def _has_alpha(frame: av.VideoFrame) -> bool:
    return frame.format.has_palette or any(component.is_alpha for component in frame.format.components)


def _notes(frame: av.VideoFrame, transfer: int) -> tuple[str, ...]:
    """`transfer`: the characteristics that the container says, which count where the frame says none."""
    transfer = transfer if frame.color_trc == UNSAID else frame.color_trc
    notes = [HDR[transfer]] if transfer in HDR else []
    if any(data.type.name.startswith("DOVI") for data in frame.side_data):
        notes.append("Dolby Vision")
    if frame.interlaced_frame:
        notes.append("interlaced")
    return tuple(notes)


def _to_rgb(frame: av.VideoFrame, on_white: bool) -> np.ndarray:
    if on_white and _has_alpha(frame):
        return lay_on_white(frame.to_ndarray(format="rgba"))
    return frame.to_ndarray(format="rgb24")


@contextmanager
def open_container(path: str | Path) -> Iterator[av.container.InputContainer]:
    """A regular file for FFmpeg to read, and nothing else. Raises ValueError as `open_file`, and av.FFmpegError.

    FFmpeg is given an open file and neither its name nor any other protocol. So a name means nothing to it (http://,
    concat:, %03d), and a playlist, or whatever else names other files, opens none of them.
    """
    with open_file(path) as file:
        options = {"fd": str(file.fileno()), "protocol_whitelist": "fd"}
        with av.open("fd:", options=options, metadata_errors="ignore") as container:
            yield container


@contextmanager
def _open(path: Path) -> Iterator[Opened]:
    """The file and its main video stream; every error of FFmpeg becomes a ValueError that names the file."""
    _check_file(path)
    try:
        with open_container(path) as container:
            kind = container.format.name
            if (
                kind.endswith("_pipe") or kind in PICTURES or container.metadata.get("major_brand") in HEIF
            ):  # readers of single pictures
                _refuse_picture(path)
            stream = _main_stream(container, path)
            decoder = stream.codec_context
            if stream.metadata.get("alpha_mode") == "1" and decoder.name in ALPHA_DECODERS:
                decoder = av.CodecContext.create(ALPHA_DECODERS[decoder.name], "r")
            decoder.options = {"err_detect": "explode"}  # a damaged picture is an error, not a guess
            decoder.thread_count = 1  # parallelism is the business of the data workers
            yield Opened(container, stream, decoder)
    except av.FFmpegError as error:
        raise ValueError(
            f"{path} cannot be read as a video: damaged, cut off, encrypted or no video at all ({error.strerror})"
        ) from error


def _main_stream(container: av.container.InputContainer, path: Path) -> av.VideoStream:
    """The video that a player would show: not the cover of an album, nor the pictures of chapters."""
    moving = [one for one in container.streams.video if not one.disposition & Disposition.attached_pic]
    if not moving:
        kinds = {"a cover picture" if stream.type == "video" else stream.type for stream in container.streams}
        raise ValueError(f"{path} holds no video, only {', '.join(sorted(kinds)) or 'nothing that FFmpeg knows'}")
    best = container.streams.best("video")
    stream = best if best in moving else moving[0]
    if stream.codec_context is None:
        raise ValueError(f"{path} cannot be decoded: FFmpeg has no decoder for its codec")
    return stream


def _refuse_picture(path: Path) -> None:
    raise ValueError(f"{path} is a picture, not a video: leave it out, or join pictures into a video first")


def _check_file(path: Path) -> None:
    """ValueError for what cannot be opened as a file."""
    if path.is_dir():
        images = sum(p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") for p in path.iterdir())
        hint = f"it holds {images} images; join them into a video first" if images else "give a video file"
        raise ValueError(f"{path} is a folder: {hint}")
    if fault := find_fault(path):
        raise ValueError(fault)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty (0 bytes)")
