"""The demo's data set: small mp4 clips of one coloured shape that moves, with captions.

    python docs/demo/clips.py DIR

writes DIR/videos/*.mp4, DIR/data.json (training, MindSpeed-MM's format) and DIR/data.txt (names it), the same for
a small validation set (validation.json, validation.txt), and DIR/held_out.txt: one prompt per line for the combinations
of colour, shape and direction that no training clip shows. Every file is a function of the seed alone.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import av
import numpy as np

SIZE, FRAMES, FPS = 64, 9, 8  # pixels, frames, frames per second
SPEED, RADIUS, JITTER = 4.0, 10.0, 3.0  # pixels per frame; radius of the circle; ± of the position, pixels
COLOURS = {
    "red": (225, 40, 40),
    "yellow": (225, 215, 40),
    "green": (40, 200, 60),
    "cyan": (50, 215, 220),
    "blue": (50, 80, 235),
    "magenta": (220, 50, 215),
}
FACTS = {"num_frames": FRAMES, "fps": FPS, "resolution": {"height": SIZE, "width": SIZE}}  # of an entry of data.json
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x to the right, y down


@dataclass(frozen=True)
class Combination:
    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"


Record = Callable[[str, Combination, np.random.Generator], dict]


def all_combinations() -> list[Combination]:
    return [Combination(*names) for names in product(COLOURS, SHAPES, DIRECTIONS)]


def held_out_combinations() -> list[Combination]:
    """12 of the 72: every colour twice, every shape four times, every direction three times."""
    directions = list(DIRECTIONS)
    picks = [(i, i % 3, i % 4) for i in range(6)] + [(i, (i + 1) % 3, (i + 2) % 4) for i in range(6)]
    return [Combination(list(COLOURS)[c], SHAPES[s], directions[d]) for c, s, d in sorted(picks)]


def training_combinations() -> list[Combination]:
    held_out = set(held_out_combinations())
    return [c for c in all_combinations() if c not in held_out]


def coverage(shape: str, x: float, y: float, radius: float, size: int = SIZE) -> np.ndarray:
    """How much of each pixel the shape covers, H W in 0..1. (x, y) is its centroid, in pixels.

    A distance to the outline, clamped to the width of one pixel: edges are antialiased, so slow motion is visible too.
    """
    grid = np.arange(size) + 0.5
    dx, dy = grid[None, :] - x, grid[:, None] - y
    if shape == "circle":
        outside = np.hypot(dx, dy) - radius
    elif shape == "square":
        outside = np.maximum(np.abs(dx), np.abs(dy)) - 0.9 * radius
    elif shape == "triangle":  # equilateral, points up; three half-planes at the distance of the inscribed circle
        outside = np.maximum(dy, 0.866 * np.abs(dx) - 0.5 * dy) - 0.65 * radius
    else:
        raise ValueError(f"unknown shape {shape!r}: one of {', '.join(SHAPES)}")
    return np.clip(0.5 - outside, 0, 1)


def render(shape, rgb, start, velocity, *, radius=RADIUS, background=24, frames=FRAMES, size=SIZE) -> np.ndarray:
    """A clip, uint8 F H W 3: `shape` in `rgb`, its centroid at `start` + frame·`velocity` (x, y in pixels), on grey."""
    clip = np.empty((frames, size, size, 3))
    for f in range(frames):
        cover = coverage(shape, start[0] + f * velocity[0], start[1] + f * velocity[1], radius, size)[..., None]
        clip[f] = cover * np.asarray(rgb) + (1 - cover) * background
    return clip.round().astype(np.uint8)


def draw(combination: Combination, rng: np.random.Generator) -> np.ndarray:
    """The combination as a clip, uint8 F H W 3: it crosses the middle of the picture, with a small jitter of place."""
    velocity = SPEED * np.array(DIRECTIONS[combination.direction])
    start = SIZE / 2 - velocity * (FRAMES - 1) / 2 + rng.uniform(-JITTER, JITTER, 2)
    return render(combination.shape, COLOURS[combination.colour], start, velocity, background=rng.uniform(16, 32))


def write_clip(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """uint8 F H W 3 to H.264 (yuv420p, nearly lossless)."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "8", "threads": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())


def write_set(folder: Path, name: str, combinations: list[Combination], record: Record, seed: list[int]) -> None:
    """One sample per entry of `combinations`, and the two files that list them: `name`.json and `name`.txt."""
    rng = np.random.default_rng(seed)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    entries = [record(f"videos/{name}_{number:04d}.mp4", each, rng) for number, each in enumerate(combinations)]
    (folder / f"{name}.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.txt").write_text(f"{folder.resolve()},{(folder / f'{name}.json').resolve()}\n", encoding="utf-8")


def write_sets(folder: Path, record: Record, repeats: int = 4, validation: int = 24, seed: int = 0) -> None:
    """Every training combination `repeats` times, and `validation` further samples of some of them.

    `record(path, combination, rng)` writes the clip of a sample at `path` below the folder, and returns its entry.
    """
    training = training_combinations()
    write_set(folder, "data", training * repeats, record, [seed, 0])
    every = np.linspace(0, len(training) - 1, validation).round().astype(int)
    write_set(folder, "validation", [training[i] for i in every], record, [seed, 1])


def write(folder: Path, repeats: int = 4, validation: int = 24, seed: int = 0) -> None:
    """The data set for text-to-video."""

    def record(path: str, combination: Combination, rng: np.random.Generator) -> dict:
        write_clip(folder / path, draw(combination, rng))
        return {"path": path, "cap": combination.caption} | FACTS

    write_sets(folder, record, repeats, validation, seed)
    (folder / "held_out.txt").write_text("".join(f"{c.caption}\n" for c in held_out_combinations()), encoding="utf-8")


def write_asked(folder: Path, name: str, asked: list[dict]) -> None:
    """What is to be generated: `name`.json for measure.py, and a list for each flag of mm_infer, one line per video.

    Entries have `prompt`; `shows`, the caption of the combination that the video should show; and what it is made from
    (image, video, mask: paths; references: a list of them), relative to the folder. The lists are `name`.txt, of the
    prompts, and `name`_image.txt, `name`_video.txt, ...
    """
    (folder / f"{name}.json").write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    (folder / f"{name}.txt").write_text("".join(f"{entry['prompt']}\n" for entry in asked), encoding="utf-8")
    for flag in [key for key in asked[0] if key not in ("prompt", "shows")]:
        rows = [entry[flag] if isinstance(entry[flag], list) else [entry[flag]] for entry in asked]
        lines = (", ".join(str((folder / path).resolve()) for path in row) for row in rows)
        (folder / f"{name}_{flag}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=4, help="clips per training combination")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    write(options.folder, repeats=options.repeats, seed=options.seed)


if __name__ == "__main__":
    main()
