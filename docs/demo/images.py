"""The demo's data set for image-to-video: clips to be made from their first frame, with captions that say the motion.

    python docs/demo/images.py DIR

writes the files that clips.py writes (videos/, data.json and .txt, validation.json and .txt), and what is asked for in
the end: held_out.txt, one prompt per line ("moving left"), held_out_image.txt, one first frame per line, and
held_out.json, which says what the clips should show. Colour, shape and place are in the image alone, the motion in the
prompt alone: so shapes start near the middle here. (Those of clips.py start on the side that they leave, and a first
frame would tell the motion.)
"""

import argparse
from pathlib import Path

import clips
import numpy as np
from PIL import Image

SPEED, JITTER = 2.0, 1.5  # pixels per frame; ± of the place in the first frame, pixels: so nothing leaves the picture


def draw(combination: clips.Combination, rng: np.random.Generator) -> np.ndarray:
    """A clip, uint8 F H W 3, that starts near the middle of the picture."""
    start = clips.SIZE / 2 + rng.uniform(-JITTER, JITTER, 2)
    velocity = SPEED * np.array(clips.DIRECTIONS[combination.direction])
    colour = clips.COLOURS[combination.colour]
    return clips.render(combination.shape, colour, start, velocity, background=rng.uniform(16, 32))


def write_held_out(folder: Path, rng: np.random.Generator) -> None:
    """The first frames of the combinations that are held out, and the lists of what is asked for."""
    (folder / "images").mkdir()
    asked = []
    for number, combination in enumerate(clips.held_out_combinations()):
        path = f"images/{number:02d}.png"
        Image.fromarray(draw(combination, rng)[0]).save(folder / path)
        asked.append({"prompt": f"moving {combination.direction}", "shows": combination.caption, "image": path})
    clips.write_asked(folder, "held_out", asked)


def write(folder: Path, repeats: int = 4, validation: int = 24, seed: int = 0) -> None:
    def record(path: str, combination: clips.Combination, rng: np.random.Generator) -> dict:
        clips.write_clip(folder / path, draw(combination, rng))
        return {"path": path, "cap": f"moving {combination.direction}"} | clips.FACTS

    clips.write_sets(folder, record, repeats, validation, seed)
    write_held_out(folder, np.random.default_rng([seed, 2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=4, help="clips per training combination")
    options = parser.parse_args()
    write(options.folder, repeats=options.repeats)


if __name__ == "__main__":
    main()
