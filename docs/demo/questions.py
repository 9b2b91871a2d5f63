"""The demo's data set for questions: pictures and short clips of coloured shapes, what is asked, and what is right.

    python docs/demo/questions.py DIR

writes DIR/train.json, DIR/validation.json and DIR/held_out.json in the format of MindSpeed-MM's guide (`messages`,
`images`, `videos`; boxes as `objects`), with DIR/images and DIR/videos. Of the 24 pairs of colour and shape four are
held out: no training conversation shows or names them, and held_out.json asks of nothing else. Each of its entries says
of what kind it is. Every file is a function of the seed.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import clips
import numpy as np
from PIL import Image

SIZE = 84  # pixels of a side: 3 x 3 tokens
BACKGROUND = (105, 125)  # grey, near the mean that the image processor subtracts
RADIUS = 19.0  # of a shape that is alone; four have room beside each other with less
LARGE = 34.0  # in the middle, where it is asked what it is
MIXED = 0.7  # of the pictures that teach shapes: so many have a colour without a name
EACH = 300
NUMBERS = ("one", "two", "three", "four")
COLOURS = clips.COLOURS | {"black": (10, 10, 10), "white": (245, 245, 245)}
PAIRS = list(product(COLOURS, clips.SHAPES))
FRAMES, SPEED = 4, 12.0  # of a clip, and its pixels per frame

Pair = tuple[str, str]
Colour = tuple[float, float, float] | np.ndarray  # red, green, blue, 0..255
Entry = dict[str, object]


def held_out_pairs() -> list[Pair]:
    """4 of the 24."""
    return [("red", "circle"), ("cyan", "square"), ("blue", "triangle"), ("white", "circle")]


def training_pairs() -> list[Pair]:
    held_out = set(held_out_pairs())
    return [pair for pair in PAIRS if pair not in held_out]


def paint(
    shape: str, colour: Colour, places: list[tuple[float, float]], radius: float, background: float
) -> np.ndarray:
    """A picture of shapes that are alike, uint8 H W 3."""
    picture = np.full((SIZE, SIZE, 3), background)
    for x, y in places:
        cover = clips.coverage(shape, x, y, radius, SIZE)[..., None]
        picture = cover * np.asarray(colour) + (1 - cover) * picture
    return picture.round().astype(np.uint8)


def any_colour(shape: str, rng: np.random.Generator) -> np.ndarray:
    """A colour that stands out from the background, and is none that this shape must not have.

    From eight colours alone a model learns for each which of its shapes is which, and takes a third one for one of
    these.
    """
    never = [COLOURS[colour] for colour, other in held_out_pairs() if other == shape]
    while True:
        colour = rng.uniform(0, 255, 3)
        away = [np.linalg.norm(colour - other) for other in never]
        if np.linalg.norm(colour - np.mean(BACKGROUND)) > 80 and min(away) > 60:
            return colour


def box_of(shape: str, x: float, y: float, radius: float) -> list[int]:
    """x1 y1 x2 y2 of what is covered."""
    rows, columns = np.nonzero(clips.coverage(shape, x, y, radius, SIZE) > 0.5)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


class Writer:
    """Makes the conversations of one file, and the pictures and clips that they are about."""

    def __init__(self, folder: Path, name: str, pairs: list[Pair], moving: list[clips.Combination], seed: list[int]):
        self.folder, self.name, self.pairs, self.moving = folder, name, pairs, moving
        self.rng = np.random.default_rng(seed)
        self.entries: list[Entry] = []
        self.pictures = 0
        for kind in ("images", "videos"):
            (folder / kind).mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, turns: list[tuple[str, str]], **media: object) -> None:
        messages = [
            {"role": role, "content": text}
            for question, answer in turns
            for role, text in (("user", question), ("assistant", answer))
        ]
        self.entries.append({"kind": kind, "messages": messages, "images": [], "videos": []} | media)

    def pair(self, number: int) -> Pair:
        return self.pairs[number % len(self.pairs)]

    def save(self, picture: np.ndarray) -> str:
        path = f"images/{self.name}_{self.pictures:05d}.png"
        Image.fromarray(picture).save(self.folder / path)
        self.pictures += 1
        return path

    def draw(self, shape: str, colour: Colour, places: list[tuple[float, float]], radius: float) -> str:
        return self.save(paint(shape, colour, places, radius, self.rng.uniform(*BACKGROUND)))

    def middle(self, shape: str, colour: Colour) -> str:
        """A picture of a large shape in the middle."""
        x, y = SIZE / 2 + self.rng.uniform(-3, 3, 2)
        return self.draw(shape, colour, [(x, y)], LARGE * self.rng.uniform(0.95, 1.05))

    def anywhere(self, pair: Pair) -> tuple[str, list[int]]:
        """A picture of one shape, and its box."""
        colour, shape = pair
        radius = RADIUS * self.rng.uniform(0.8, 1.2)
        x, y = self.rng.uniform(radius + 1, SIZE - radius - 1, 2)
        return self.draw(shape, COLOURS[colour], [(x, y)], radius), box_of(shape, x, y, radius)

    def colour(self, number: int) -> None:
        """Two turns about one picture; the last answer is the one that is measured."""
        colour, shape = self.pair(number)
        turns = [("<image>How many are there?", "one"), ("Which colour is it?", colour)]
        self.add("which colour", turns, images=[self.middle(shape, COLOURS[colour])])

    def shape(self, number: int) -> None:
        """No turn before it names the colour, for that would say which shapes it never had in training."""
        colour, shape = self.pair(number)
        shown = any_colour(shape, self.rng) if self.name == "train" and self.rng.uniform() < MIXED else COLOURS[colour]
        turns = [("<image>How many are there?", "one"), ("Which shape is it?", shape)]
        self.add("which shape", turns, images=[self.middle(shape, shown)])

    def box(self, number: int) -> None:
        colour, shape = pair = self.pair(number)
        path, box = self.anywhere(pair)
        turns = [(f"<image>Where is the {colour} {shape}?", "<bbox>")]
        self.add("where", turns, images=[path], objects={"ref": [], "bbox": [box]})

    def count(self, number: int) -> None:
        """Some shapes alike, each in a quarter of its own."""
        colour, shape = self.pair(number)
        many = int(self.rng.integers(1, 5))
        places = self.rng.permutation(4)[:many]
        half, radius = SIZE / 2, 0.7 * RADIUS
        room = half / 2 - radius - 1
        middles = [np.array([i % 2, i // 2]) * half + half / 2 for i in places]
        spots = [tuple(middle + self.rng.uniform(-room, room, 2)) for middle in middles]
        path = self.draw(shape, COLOURS[colour], spots, radius)
        self.add("how many", [("<image>How many are there?", NUMBERS[many - 1])], images=[path])

    def two_pictures(self, number: int) -> None:
        """One has the colour that is asked for, the other has not."""
        pair = self.pair(number)
        colour = pair[0]
        others = [other for other in self.pairs if other[0] != colour]
        pictures = [self.anywhere(pair)[0], self.anywhere(others[int(self.rng.integers(len(others)))])[0]]
        first = bool(self.rng.integers(2))
        question = f"First <image> second <image> Which is {colour}?"
        self.add("which of two", [(question, "first" if first else "second")], images=pictures[:: 1 if first else -1])

    def move(self, number: int) -> None:
        combination = self.moving[number % len(self.moving)]
        velocity = SPEED * np.array(clips.DIRECTIONS[combination.direction])
        start = SIZE / 2 - velocity * (FRAMES - 1) / 2 + self.rng.uniform(-6, 6, 2)
        frames = clips.render(
            combination.shape,
            COLOURS[combination.colour],
            start,
            velocity,
            radius=RADIUS,
            background=self.rng.uniform(*BACKGROUND),
            frames=FRAMES,
            size=SIZE,
        )
        path = f"videos/{self.name}_{number:05d}.mp4"
        clips.write_clip(self.folder / path, frames, fps=2)
        self.add("where to", [("<video>Where does it move?", combination.direction)], videos=[path])

    def words(self, number: int) -> None:
        """Text alone."""
        named = self.pair(number), self.pairs[int(self.rng.integers(len(self.pairs)))]
        place, what = (int(choice) for choice in self.rng.integers(2, size=2))
        first, last = (" ".join(pair) for pair in named)
        asked = f"Which {('colour', 'shape')[what]} comes {('first', 'last')[place]}?"
        self.add("text", [(f"First comes a {first}, last a {last}. {asked}", named[place][what])])

    def write(self) -> None:
        text = json.dumps(self.entries, indent=1) + "\n"
        (self.folder / f"{self.name}.json").write_text(text, encoding="utf-8")


KINDS: dict[Callable[[Writer, int], None], int] = {
    Writer.colour: 1,
    Writer.shape: 1,
    Writer.box: 1,
    Writer.count: 1,
    Writer.two_pictures: 1,
    Writer.move: 1,
    Writer.words: 1,
}


def write(folder: Path, each: int, seed: int = 0) -> None:
    """`each` training conversations of every kind, or a multiple of it."""
    known, unknown = training_pairs(), held_out_pairs()
    for stream, (name, pairs, count) in enumerate(
        (("train", known, each), ("validation", known, 4), ("held_out", unknown, 24))
    ):
        moving = [clips.Combination(*pair, direction) for pair in pairs for direction in clips.DIRECTIONS]
        writer = Writer(folder, name, pairs, moving, [seed, stream])
        for kind, share in KINDS.items():
            for number in range(count * share if name == "train" else count):
                kind(writer, number)
        writer.write()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=4, help=f"times {EACH} training conversations of every kind")
    options = parser.parse_args()
    write(options.folder, EACH * options.repeats)


if __name__ == "__main__":
    main()
