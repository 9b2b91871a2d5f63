"""What does a generated clip show? Decides colour, shape and motion from the pixels, and counts what is right.

    python docs/demo/measure.py FOLDER PROMPTS --json scores.json   # the folder's mp4 files by name, one prompt a line
    python docs/demo/measure.py data.json                           # or clips that a data.json lists: how far to trust

Nothing here is learned and nothing knows the model: the colour is the nearest hue of the foreground, the shape the
best of three drawn templates, the motion the direction in which the foreground's centroid travels.
"""

import argparse
import colorsys
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import av
import clips
import numpy as np

SMALLEST_AREA = 40  # pixels of foreground (the demo's shapes have 290 to 330); below it there is nothing to see
SMALLEST_STEP = 0.75  # pixels per frame (the demo's shapes move at 4); below it nothing moves
SMALLEST_CONTRAST = 40  # between foreground and background, Euclidean, of 0..255 per channel
SMALLEST_SATURATION = 0.35
SMALLEST_OVERLAP = 0.75  # with a drawn shape; that of a noisy picture with a square is 0.7


@dataclass(frozen=True)
class Seen:
    """What a clip shows; None where nothing can be recognised."""

    colour: str | None
    shape: str | None
    direction: str | None
    overlap: float  # of the foreground with the best template, intersection over union, mean over the frames

    def matches(self, wanted: clips.Combination) -> dict[str, bool]:
        return {name: getattr(self, name) == getattr(wanted, name) for name in ("colour", "shape", "direction")}


def foreground(frames: np.ndarray) -> np.ndarray:
    """How much each pixel belongs to the foreground, F H W in 0..1: its distance from the background's colour.

    The background is the median of the clip, the foreground's own distance that of its brightest 3 % of pixels.
    """
    pixels = frames.astype(float)
    distance = np.linalg.norm(pixels - np.median(pixels, axis=(0, 1, 2)), axis=-1)
    full = np.quantile(distance, 0.97)
    return np.zeros_like(distance) if full < SMALLEST_CONTRAST else np.clip(distance / full, 0, 1)


def colour_of(frames: np.ndarray, cover: np.ndarray) -> str | None:
    """The palette's nearest hue to the mean colour of what is surely foreground."""
    red, green, blue = frames[cover > 0.8].mean(axis=0) / 255
    hue, saturation, _ = colorsys.rgb_to_hsv(red, green, blue)
    if saturation < SMALLEST_SATURATION:
        return None

    def distance(name: str) -> float:
        other = colorsys.rgb_to_hsv(*np.array(clips.COLOURS[name]) / 255)[0]
        return abs((hue - other + 0.5) % 1 - 0.5)  # hue is a circle

    return min(clips.COLOURS, key=distance)


def centroids(masks: np.ndarray) -> np.ndarray:
    """F H W bool to F 2: x and y of the centroid per frame, pixels; NaN where a frame shows too little."""
    places = np.full((len(masks), 2), np.nan)
    for f, mask in enumerate(masks):
        if mask.sum() >= SMALLEST_AREA:
            rows, columns = np.nonzero(mask)
            places[f] = columns.mean() + 0.5, rows.mean() + 0.5
    return places


def shape_of(masks: np.ndarray, places: np.ndarray) -> tuple[str | None, float]:
    """The shape whose drawing, moved to the foreground's centroid and scaled to its area, overlaps it best."""
    overlaps = {}
    for shape in clips.SHAPES:
        unit_area = clips.coverage(shape, 32, 32, clips.RADIUS).sum() / clips.RADIUS**2
        per_frame = []
        for mask, (x, y) in zip(masks, places, strict=True):
            if np.isnan(x):
                per_frame.append(0.0)
                continue
            template = clips.coverage(shape, x, y, (mask.sum() / unit_area) ** 0.5, len(mask)) > 0.5
            per_frame.append((mask & template).sum() / (mask | template).sum())
        overlaps[shape] = float(np.mean(per_frame))
    best = max(overlaps, key=overlaps.get)
    return (best if overlaps[best] > SMALLEST_OVERLAP else None), overlaps[best]


def direction_of(places: np.ndarray) -> str | None:
    """Where the centroid travels: the slope of a straight line through all frames, along its larger axis."""
    seen = np.flatnonzero(~np.isnan(places[:, 0]))
    if len(seen) < 3:
        return None
    dx, dy = np.polyfit(seen, places[seen], 1)[0]
    if max(abs(dx), abs(dy)) < SMALLEST_STEP:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def look(frames: np.ndarray) -> Seen:
    """frames: uint8 F H W 3."""
    cover = foreground(frames)
    masks = cover > 0.5
    places = centroids(masks)
    if np.isnan(places).all():
        return Seen(None, None, None, 0.0)
    shape, overlap = shape_of(masks, places)
    return Seen(colour_of(frames, cover), shape, direction_of(places), round(overlap, 3))


def read_clip(path: Path) -> np.ndarray:
    with av.open(str(path)) as file:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def wanted_by(caption: str) -> clips.Combination:
    for combination in clips.all_combinations():
        if combination.caption == caption.strip():
            return combination
    raise ValueError(f"{caption!r} is no caption of the demo; one is {clips.all_combinations()[0].caption!r}")


def measure(clips_wanted: list[tuple[Path, clips.Combination]]) -> dict:
    """{"clips": [{file, prompt, seen, right}], "totals": share of clips right in colour, shape, direction, all}."""
    rows = []
    for path, wanted in clips_wanted:
        seen = look(read_clip(path))
        rows.append({"file": str(path), "prompt": wanted.caption, "seen": asdict(seen), "right": seen.matches(wanted)})
    rights = [row["right"] for row in rows]
    totals = {name: float(np.mean([right[name] for right in rights])) for name in ("colour", "shape", "direction")}
    totals["all"] = float(np.mean([all(right.values()) for right in rights]))
    return {"clips": rows, "totals": totals}


def table(result: dict) -> str:
    lines = [f"{'prompt':36} {'colour':12} {'shape':12} {'direction':12} overlap"]
    for row in result["clips"]:
        cells = [f"{row['seen'][name] or '?'}{'' if ok else ' ✗'}" for name, ok in row["right"].items()]
        lines.append(f"{row['prompt']:36} {cells[0]:12} {cells[1]:12} {cells[2]:12} {row['seen']['overlap']:.2f}")
    totals = "  ".join(f"{name} {100 * share:.0f} %" for name, share in result["totals"].items())
    return "\n".join([*lines, f"right, of {len(result['clips'])} clips:  {totals}"])


def asked(source: Path, prompts: Path | None) -> list[tuple[Path, clips.Combination]]:
    """The clips to look at, and what was asked for."""
    if source.is_file():
        return [(source.parent / e["path"], wanted_by(e["cap"])) for e in json.loads(source.read_text())]
    if prompts is None:
        raise ValueError(f"{source} is a folder of clips: name the file of their prompts, too, one per line")
    files, lines = sorted(source.glob("*.mp4"), key=lambda p: (len(p.name), p.name)), prompts.read_text().splitlines()
    if not files or len(files) != len(lines):
        raise ValueError(f"{source} holds {len(files)} mp4 files, but {prompts} has {len(lines)} prompts")
    return [(path, wanted_by(line)) for path, line in zip(files, lines, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="a folder of mp4 files, or a json list of {path, cap}")
    parser.add_argument("prompts", type=Path, nargs="?", help="what the folder's clips should show, one per line")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    options = parser.parse_args()
    result = measure(asked(options.clips, options.prompts))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
