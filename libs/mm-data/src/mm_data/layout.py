"""What the clip of a sample will be, by the packets and headers of its files: nothing is decoded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from mm_data.geometry import Geometry, Unfit, choose_frames, clip_length, clip_rate, output_size, resample
from mm_data.images import is_picture, read_mask
from mm_data.manifest import Sample
from mm_data.sets import SampleSet
from mm_data.vace import vace_clip
from mm_data.video import VideoInfo, probe, probe_picture


@dataclass(frozen=True)
class Layout:
    """The frames and the size of a clip, but for the draw of a random window."""

    video: VideoInfo
    control: dict[str, VideoInfo]  # "source" and "mask", where the sample has them as videos
    still_mask: np.ndarray | None  # H W 1 uint8: one picture for all frames
    span: tuple[int, int]  # [first, end): the frames that all of them have
    available: np.ndarray  # indices of the frames to choose from
    length: int  # of the clip
    size: tuple[int, int]
    fps: float

    def choose(self, geometry: Geometry, draw: Callable[[int], int]) -> np.ndarray:
        """The indices of the clip's frames; `draw(n)` gives an integer in [0, n)."""
        if geometry.rule == "vace" or self.video.num_frames == 1:
            return self.available
        return choose_frames(self.available, geometry, draw)


def geometry_of(sample: Sample, geometry: Geometry) -> Geometry:
    """The geometry of one sample: that of all, with the size and the frames that its set asks for.

    Raises ValueError, naming the set, where these cannot be.
    """
    return geometry if sample.set is None else geometry_of_set(sample.set, sample.size, geometry)


def geometry_of_set(one: SampleSet, size: tuple[int, int] | None, geometry: Geometry) -> Geometry:
    """The same for one of a set's sizes; None where it has none."""
    if size is None and one.frames is None:
        return geometry
    try:
        return _adapt(geometry, size, one.frames)
    except ValueError as error:
        raise ValueError(f"set {one.name}: {error}") from error


@lru_cache(maxsize=1024)
def _adapt(geometry: Geometry, size: tuple[int, int] | None, frames: int | None) -> Geometry:
    if size is not None:
        geometry = replace(geometry, max_height=size[0], max_width=size[1], max_area=None)
    if frames is not None:
        geometry = replace(geometry, num_frames=frames, min_frames=min(geometry.min_frames, frames))
    return geometry


def lay_out(sample: Sample, geometry: Geometry) -> Layout:
    """Look into the files of a sample. Raises ValueError, as Unfit where the files are sound but do not suit.

    A picture is a clip of one frame, whatever `min_frames` is; unless `least_frames` leaves it out.
    """
    check_control(sample)
    is_still = is_picture(sample.path)
    geometry = geometry_of(sample, geometry)
    geometry = replace(geometry, min_frames=1) if is_still else geometry
    video, control, still_mask = (probe_picture if is_still else probe)(sample.path), {}, None
    if sample.control:
        given = {"source": sample.control.source, "mask": sample.control.mask}
        if given["mask"] and is_picture(given["mask"]):
            still_mask = read_mask(given["mask"])
            _check_shape(video, given.pop("mask"), *still_mask.shape[:2])
        control = {name: probe(path) for name, path in given.items() if path is not None}
    first, end = _span(sample, video, list(control.values()))
    for other in control.values():
        _check_shape(video, other.path, other.height, other.width, float(other.pixel_aspect))
    shown = video.timestamps[first:end] - video.timestamps[first]
    if geometry.rule == "vace":
        chosen, size, fps = vace_clip(shown, video.height, video.width * float(video.pixel_aspect), geometry)
        check_least(sample.path, len(chosen), geometry, is_still)
        return Layout(video, control, still_mask, (first, end), first + chosen, len(chosen), size, fps)
    size = output_size(video.height, video.width, geometry, video.pixel_aspect)
    available = first + resample(shown, geometry.fps)
    length = clip_length(len(available), geometry)
    check_least(sample.path, length, geometry, is_still)
    fps = clip_rate(shown, geometry.fps) or video.fps
    return Layout(video, control, still_mask, (first, end), available, length, size, fps)


def check_least(path: Path, length: int, geometry: Geometry, is_still: bool) -> None:
    """Unfit for a clip of fewer frames than are needed, also if it is a picture."""
    if length < geometry.least_frames:
        what = f"{path} is a picture, which is one frame" if is_still else f"the clip is {_frames(length)}"
        raise Unfit("too_short", f"{what}, and least_frames={geometry.least_frames} are needed")


def check_control(sample: Sample) -> None:
    """Unfit for a mask without a source. (MindSpeed-MM ignores such a mask, and all is made up.)"""
    if sample.control and sample.control.mask and not sample.control.source:
        raise Unfit(
            "mask_without_source",
            f"src_video_mask {sample.control.mask} masks no src_video: to learn to fill it in, name the video itself "
            "as src_video, else leave the mask out",
        )


def _span(sample: Sample, video: VideoInfo, others: list[VideoInfo]) -> tuple[int, int]:
    """[first, end) of the frames that the video, source and mask all have.

    Files that belong together may differ by the frame or two that encoders add or lose. More means that frame n of one
    is not frame n of the other.
    """
    if sample.cut:
        first, end = sample.cut
        for info in (video, *others):
            if end > info.num_frames:
                raise Unfit(
                    "cut_past_end", f"{info.path} has {_frames(info.num_frames)}: it cannot be cut to [{first}, {end})"
                )
        return first, end
    for other in others:
        if abs(other.num_frames - video.num_frames) > max(1, video.num_frames // 10):
            raise Unfit(
                "length_mismatch",
                f"{other.path} has {other.num_frames} frames, {video.path} has {video.num_frames}: source and mask go "
                "with the video frame by frame, so write them with as many frames",
            )
    return 0, min(info.num_frames for info in (video, *others))


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _check_shape(video: VideoInfo, path: Path, height: int, width: int, pixel_aspect: float = 1.0) -> None:
    """Unfit if the file at `path` shows another part of the picture than the video; their resolutions may differ."""
    one, another = video.width * float(video.pixel_aspect) / video.height, width * pixel_aspect / height
    if abs(another / one - 1) > 0.05:  # 1280 x 720 and 832 x 480, say, differ by 0.026
        raise Unfit(
            "shape_mismatch",
            f"{path} is {height} x {width}, {video.path} is {video.height} x {video.width}: source and mask must have "
            "the shape of the video",
        )
