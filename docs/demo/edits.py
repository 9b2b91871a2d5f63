"""The demo's data set for VACE: clips of two shapes, of which one is kept and the other is to be made up.

    python docs/demo/edits.py DIR

Half of each picture is masked: in the source video it is grey. What belongs there is told by the caption ("a red circle
moving left"), or the caption leaves the colour out, and a reference picture shows it: the shape, large and still. The
other half shows another shape, of which nothing is said: it is to be kept.

DIR/videos, sources, masks and references are listed by data.json and .txt (for training, in MindSpeed-MM's format)
and validation.json and .txt. What is asked for in the end is words.json and references.json, each with the twelve
combinations that no training clip shows, and for mm_infer the lists words.txt (prompts), words_video.txt, ...
"""

import argparse
from pathlib import Path

import clips
import numpy as np
from PIL import Image

GREY = 128  # of the source where it is masked
HALF = clips.SIZE // 2
JITTER = 1.0  # ± of the place, pixels
REFERENCE_RADIUS, REFERENCE_BACKGROUND = 23.0, 24  # dark, unlike real ones: docs/demo/codec has never seen white


def draw(combination: clips.Combination, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(clip uint8 F H W 3, mask bool H W of the half that shows the combination).

    Both shapes move along the line between the halves, each as it likes; the kept one is any but this one.
    """
    along = clips.DIRECTIONS[combination.direction]
    others = [
        c
        for c in clips.training_combinations()
        if abs(clips.DIRECTIONS[c.direction][0]) == abs(along[0])
        and (c.colour, c.shape) != (combination.colour, combination.shape)
    ]
    other = others[rng.integers(len(others))]
    side, background = rng.integers(2), rng.uniform(16, 32)
    mask = np.zeros((clips.SIZE, clips.SIZE), bool)
    rows = slice(side * HALF, side * HALF + HALF)
    mask[(rows, slice(None)) if along[0] else (slice(None), rows)] = True
    frames = [_crossing(c, s, background, rng) for c, s in ((combination, side), (other, 1 - side))]
    return np.where(mask[None, :, :, None], *frames), mask


def _crossing(combination: clips.Combination, side: int, background: float, rng: np.random.Generator) -> np.ndarray:
    """The combination, crossing the upper (left) half of the picture, or for side 1 the lower (right) one."""
    velocity = clips.SPEED * np.array(clips.DIRECTIONS[combination.direction])
    middle = np.full(2, clips.SIZE / 2)
    middle[1 if velocity[0] else 0] = HALF / 2 + side * HALF
    start = middle - velocity * (clips.FRAMES - 1) / 2 + rng.uniform(-JITTER, JITTER, 2)
    return clips.render(combination.shape, clips.COLOURS[combination.colour], start, velocity, background=background)


def reference(combination: clips.Combination) -> np.ndarray:
    """The shape, large and still: uint8 H W 3."""
    middle, colour = (clips.SIZE / 2, clips.SIZE / 2), clips.COLOURS[combination.colour]
    radius, background = REFERENCE_RADIUS, REFERENCE_BACKGROUND
    return clips.render(combination.shape, colour, middle, (0, 0), radius=radius, background=background, frames=1)[0]


class Files:
    """Writes what a sample is made from. A combination's reference looks the same every time."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("videos", "sources", "masks", "references"):
            (folder / name).mkdir(parents=True, exist_ok=True)

    def control(self, name: str, frames: np.ndarray, mask: np.ndarray) -> tuple[str, str]:
        """Paths of the source and of the mask video."""
        paths = f"sources/{name}.mp4", f"masks/{name}.mp4"
        moving = np.broadcast_to(mask[None, :, :, None], frames.shape)
        clips.write_clip(self.folder / paths[0], np.where(moving, GREY, frames).astype(np.uint8))
        clips.write_clip(self.folder / paths[1], (255 * moving).astype(np.uint8))
        return paths

    def reference(self, combination: clips.Combination) -> str:
        path = f"references/{combination.colour}_{combination.shape}.png"
        Image.fromarray(reference(combination)).save(self.folder / path)
        return path


def prompt(combination: clips.Combination, referred: bool) -> str:
    return f"a {combination.shape} moving {combination.direction}" if referred else combination.caption


def write(folder: Path, repeats: int = 4, validation: int = 24, seed: int = 0) -> None:
    files = Files(folder)

    def record(path: str, combination: clips.Combination, rng: np.random.Generator) -> dict:
        frames, mask = draw(combination, rng)
        clips.write_clip(folder / path, frames)
        source, masked = files.control(Path(path).stem, frames, mask)
        referred = rng.random() < 0.6
        return {
            "video": path,
            "cap": prompt(combination, referred),
            "src_video": source,
            "src_video_mask": masked,
            "src_ref_images": [files.reference(combination)] if referred else None,
        }

    clips.write_sets(folder, record, repeats, validation, seed)
    for number, name in enumerate(("words", "references")):
        rng = np.random.default_rng([seed, 2, number])
        asked = []
        for i, combination in enumerate(clips.held_out_combinations()):
            source, masked = files.control(f"{name}_{i:02d}", *draw(combination, rng))
            referred = name == "references"
            entry = {"prompt": prompt(combination, referred), "shows": combination.caption}
            entry |= {"video": source, "mask": masked}
            asked.append(entry | ({"references": [files.reference(combination)]} if referred else {}))
        clips.write_asked(folder, name, asked)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=4, help="clips per training combination")
    options = parser.parse_args()
    write(options.folder, repeats=options.repeats)


if __name__ == "__main__":
    main()
