"""The names of entries in a feature store: hashes of all that decides an entry's tensors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from mm_data.geometry import Geometry
from mm_data.manifest import Sample

PIXELS = 1  # counts up when the same video and geometry come to give other pixels: then all entries are stale


def content_key(
    video_sha256: str,
    geometry: Geometry | None,
    encoder: str,
    captions: Sequence[str] = (),
    cut: tuple[int, int] | None = None,
    seed: int = 0,
    control: Mapping | None = None,
    decoder: str | None = None,
) -> str:
    """The name of an entry: a hash of all that decides its tensors, and of nothing else (so not of the file's name).

    `seed` counts only where the geometry draws a random window. `control` is that of a VACE sample, with hashes in
    place of its files. `decoder` is what gave the pixels, see `mm_data.video.decoder_identity`.
    """
    shape = asdict(geometry) if geometry else None
    if shape:
        del shape["least_frames"]  # says which clips there are, not what is in them
    # What was always so is not named, so that entries keep the keys that they had before there was another.
    if shape and shape["rule"] == "window":
        del shape["rule"], shape["keep_last"]
    if shape and shape["time_stride"] == 4:
        del shape["time_stride"]
    drawn = seed if shape and "rule" not in shape and shape["window"] == "random" else None
    parts = [PIXELS, video_sha256, shape, encoder, list(captions), cut, drawn]
    if control is not None:
        parts.append(dict(control))
    if decoder is not None:
        parts.append(decoder)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def hash_control(sample: Sample) -> dict | None:
    """The control of a sample, with hashes in place of its files."""
    if sample.control is None:
        return None
    hashes = [content.sha256 for content in sample.contents[1:]]
    source = hashes.pop(0) if sample.control.source else None
    mask = hashes.pop(0) if sample.control.mask else None
    return {"source": source, "mask": mask, "references": hashes}
