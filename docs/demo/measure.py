"""What does a generated clip show? Decides colour, shape and motion from the pixels, and counts what is right.

    python docs/demo/measure.py FOLDER ASKED --json scores.json     # the folder's mp4 files by name, and what was asked
    python docs/demo/measure.py data.json                           # or clips that a data.json lists: how far to trust

ASKED is a file of prompts, one a line, or for videos that are made from more than a prompt a json list: images.py and
edits.py say what is in it.

Nothing here is learned and nothing knows the model: the colour is the nearest hue of the foreground, the shape the
best of three drawn templates, the motion the direction in which the foreground's centroid travels. What a video was
given to keep, its first frame or what the mask leaves alone, is compared with what was given.
"""

import argparse
import colorsys
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import av
import clips
import numpy as np
from PIL import Image

SMALLEST_AREA = 40  # pixels of foreground (the demo's shapes have 290 to 330); below it there is nothing to see
SMALLEST_STEP = 0.75  # pixels per frame (the demo's shapes move at 4); below it nothing moves
SMALLEST_CONTRAST = 40  # between foreground and background, Euclidean, of 0..255 per channel
SMALLEST_SATURATION = 0.35
SMALLEST_OVERLAP = 0.75  # with a drawn shape; that of a noisy picture with a square is 0.7
SMALLEST_PSNR = 24  # dB, of what is to be kept: a shape of edits.py that is one pixel off has 25, two pixels 21


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


@dataclass(frozen=True)
class Asked:
    """A video, and what was asked for. `given` is what it was made from, by mm_infer's names, besides the prompt."""

    file: Path
    prompt: str
    wanted: clips.Combination
    given: dict[str, list[Path]] = field(default_factory=dict)


def wanted_by(caption: str) -> clips.Combination:
    for combination in clips.all_combinations():
        if combination.caption == caption.strip():
            return combination
    raise ValueError(f"{caption!r} is no caption of the demo; one is {clips.all_combinations()[0].caption!r}")


def kept(frames: np.ndarray, given: dict[str, list[Path]]) -> float | None:
    """How well that which was given to be kept is kept: dB of PSNR. None where nothing was."""
    if "image" in given:
        return psnr(frames[:1], np.asarray(Image.open(given["image"][0]).convert("RGB"))[None])
    if "mask" in given:
        stays = read_clip(given["mask"][0])[..., 0] < 128
        return psnr(frames[stays], read_clip(given["video"][0])[stays])
    return None


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """dB, of uint8."""
    return float(10 * np.log10(255**2 / max(np.mean((one.astype(float) - other) ** 2), 1e-9)))


def made_up(frames: np.ndarray, given: dict[str, list[Path]]) -> np.ndarray:
    """The frames, with their background wherever they were to be kept: what is left to look at was generated."""
    if "mask" not in given:
        return frames
    changes = read_clip(given["mask"][0])[..., :1] >= 128
    return np.where(changes, frames, np.median(frames[changes[..., 0]], axis=0)).astype(np.uint8)


def measure(asked: list[Asked]) -> dict:
    """{"clips": [{file, prompt, shows, given, seen, kept, right}], "totals": share of clips right in colour, shape,
    direction, kept (where something was to be kept), and all, "kept": mean dB}.
    """
    rows = []
    for one in asked:
        frames = read_clip(one.file)
        seen, fidelity = look(made_up(frames, one.given)), kept(frames, one.given)
        right = seen.matches(one.wanted) | ({} if fidelity is None else {"kept": fidelity > SMALLEST_PSNR})
        row = {"file": str(one.file), "prompt": one.prompt, "shows": one.wanted.caption, "seen": asdict(seen)}
        row |= {"given": {name: [str(path) for path in paths] for name, paths in one.given.items()}}
        rows.append(row | {"kept": fidelity, "right": right})
    rights = [row["right"] for row in rows]
    totals = {name: float(np.mean([right[name] for right in rights])) for name in rights[0]}
    totals["all"] = float(np.mean([all(right.values()) for right in rights]))
    fidelities = [row["kept"] for row in rows if row["kept"] is not None]
    return {"clips": rows, "totals": totals, "kept": float(np.mean(fidelities)) if fidelities else None}


def table(result: dict) -> str:
    lines = [f"{'asked for':36} {'colour':12} {'shape':12} {'direction':12} overlap  kept"]
    for row in result["clips"]:
        cells = [f"{seen or '?'}{'' if row['right'][name] else ' ✗'}" for name, seen in list(row["seen"].items())[:3]]
        fidelity = "" if row["kept"] is None else f"{row['kept']:8.1f} dB{'' if row['right']['kept'] else ' ✗'}"
        lines.append(
            f"{row['shows']:36} {cells[0]:12} {cells[1]:12} {cells[2]:12} {row['seen']['overlap']:.2f}{fidelity}"
        )
    totals = "  ".join(f"{name} {100 * share:.0f} %" for name, share in result["totals"].items())
    fidelity = "" if result["kept"] is None else f"; kept with {result['kept']:.1f} dB"
    return "\n".join([*lines, f"right, of {len(result['clips'])} clips:  {totals}{fidelity}"])


def asked(source: Path, prompts: Path | None) -> list[Asked]:
    """The clips to look at, and what was asked for."""
    if source.is_file():
        entries = json.loads(source.read_text(encoding="utf-8"))
        return [Asked(source.parent / e["path"], e["cap"], wanted_by(e["cap"])) for e in entries]
    if prompts is None:
        raise ValueError(f"{source} is a folder of clips: name the file of their prompts, too, one per line")
    if prompts.suffix == ".json":
        entries = json.loads(prompts.read_text(encoding="utf-8"))
    else:
        entries = [{"prompt": line, "shows": line} for line in prompts.read_text(encoding="utf-8").splitlines()]
    files = sorted(source.glob("*.mp4"), key=lambda p: (len(p.name), p.name))
    if not files or len(files) != len(entries):
        raise ValueError(f"{source} holds {len(files)} mp4 files, but {prompts} has {len(entries)} prompts")
    return [_asked(file, entry, prompts.parent) for file, entry in zip(files, entries, strict=True)]


def _asked(file: Path, entry: dict, folder: Path) -> Asked:
    given = {name: value for name, value in entry.items() if name not in ("prompt", "shows")}
    paths = {
        name: [folder / path for path in (value if isinstance(value, list) else [value])]
        for name, value in given.items()
    }
    return Asked(file, entry["prompt"], wanted_by(entry["shows"]), paths)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="a folder of mp4 files, or a json list of {path, cap}")
    parser.add_argument("prompts", type=Path, nargs="?", help="what was asked of the folder's clips: .txt or .json")
    parser.add_argument("--json", type=Path, help="write the result here, too")
    options = parser.parse_args()
    result = measure(asked(options.clips, options.prompts))
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
