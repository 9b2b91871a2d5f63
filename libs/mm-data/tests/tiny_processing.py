"""A small but whole processing of conversations: a token a byte, patches of 2 x 2 pixels, a token of 2 x 2 patches."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mm_data.conversations import Box, Conversation, Conversations, Media, Source, Turn, Unusable, read_conversations
from mm_data.images import read_image, read_size
from mm_data.processing import Encoded, Size

PATCH, MERGE = 2, 2
IMAGE, START, END = 256, 257, 258
MOST = 64 * 64  # pixels


class TinyProcessing:
    """Text is its bytes. A picture is scaled down to the largest size of whole tokens within its pixels."""

    identity = "tiny"

    def __init__(self):
        self.decoded: list[str] = []
        self.measured = 0
        self.lock = threading.Lock()

    def measure(self, conversation: Conversation) -> Size:
        with self.lock:
            self.measured += 1
        grids = [self._grid(media) for media in conversation.media]
        patches = [rows * columns for rows, columns in grids]
        tokens, labels = self._write(conversation, grids)
        trained = sum(label >= 0 for label in labels)
        return Size(len(tokens), sum(patches), trained, sum(count**2 for count in patches))

    def encode(self, conversation: Conversation) -> Encoded:
        grids = [self._grid(media) for media in conversation.media]
        tokens, labels = self._write(conversation, grids)
        pixels = [self._pixels(media, grid) for media, grid in zip(conversation.media, grids, strict=True)]
        return Encoded(
            torch.tensor(tokens),
            torch.tensor(labels),
            torch.arange(len(tokens)).expand(3, -1),
            torch.cat([torch.empty(0, 3 * PATCH**2), *pixels]),
            torch.tensor([(1, *grid) for grid in grids], dtype=torch.int64).reshape(-1, 3),
        )

    def _write(self, conversation: Conversation, grids) -> tuple[list[int], list[int]]:
        tokens, trained, grids_left = [], [], list(grids)
        for turn in conversation.turns:
            tokens.append(START)
            trained.append(False)
            for part in turn.parts:
                if isinstance(part, str):
                    more = list(part.encode())
                elif isinstance(part, Box):
                    more = list(f"{grids[part.media]}".encode())
                else:
                    rows, columns = grids_left.pop(0)
                    more = [IMAGE] * (rows * columns // MERGE**2)
                tokens += more
                trained += [turn.role == "assistant"] * len(more)
            tokens.append(END)
            trained.append(turn.role == "assistant")
        following = zip([*tokens[1:], 0], [*trained[1:], False], strict=True)
        return tokens, [token if train else -100 for token, train in following]

    def _grid(self, media: Media) -> tuple[int, int]:
        try:
            height, width = read_size(media.path)
        except FileNotFoundError as error:
            raise Unusable("missing_media", f"{media.path} is not there") from error
        except ValueError as error:
            raise Unusable(
                "missing_media" if not Path(media.path).exists() else "unreadable_media", str(error)
            ) from error
        scale = min(1.0, (min(media.max_pixels or MOST, MOST) / (height * width)) ** 0.5)
        rows, columns = (max(1, int(side * scale) // (PATCH * MERGE)) * MERGE for side in (height, width))
        return rows, columns

    def _pixels(self, media: Media, grid: tuple[int, int]) -> torch.Tensor:
        with self.lock:
            self.decoded.append(media.path)
        rows, columns = grid
        try:
            picture = Image.fromarray(read_image(media.path)).resize((columns * PATCH, rows * PATCH))
        except ValueError as error:
            raise Unusable("unreadable_media", str(error)) from error
        pixels = torch.from_numpy(np.asarray(picture, np.float32)).unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH)
        return pixels.reshape(rows * columns, -1)


def say(*texts: str) -> tuple[Turn, ...]:
    """Questions and answers in turn."""
    return tuple(Turn(("user", "assistant")[i % 2], (text,)) for i, text in enumerate(texts))


def save_png(path: Path, height: int, width: int, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def break_pixels(path: str | Path) -> None:
    """Damage a png behind its header."""
    data = bytearray(Path(path).read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    Path(path).write_bytes(data)


def make_set(folder: Path, count: int, weights=((None, 1.0),), odd=()) -> Conversations:
    """Conversations of all kinds: without pictures, with one or two, of one or more turns, of many lengths.

    weights: (number of conversations, weight) of each source. odd: numbers of those that begin with an answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    items = []
    for number in range(count):
        messages, images = [], []
        for turn in range(int(draw.integers(1, 4))):
            pictures = int(draw.choice([0, 1, 2], p=[0.5, 0.4, 0.1]))
            for picture in range(pictures):
                height, width = draw.integers(8, 30, 2)
                path = folder / f"{number}-{turn}-{picture}.png"
                images.append(save_png(path, int(height), int(width), number))
            question = "<image>" * pictures + "q" * int(draw.integers(1, 60))
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": "a" * int(draw.integers(1, 60))})
        items.append({"messages": messages[::-1] if number in odd else messages, "images": images})
    sources, first = [], 0
    for number, (size, weight) in enumerate(weights):
        file = folder / f"{number}.jsonl"
        own = items[first : None if size is None else first + size]
        file.write_text("".join(f"{json.dumps(item)}\n" for item in own), encoding="utf-8")
        sources.append(Source(file, weight))
        first += len(own)
    return read_conversations(sources)
