"""What packing costs: `python docs/measure/packs.py --conversations 1000000 --pictures 10000 --images 200`.

Order, plan and memory of many conversations; a survey of pictures from their headers, and how evenly their work lies on
ranks; images a second of the loader against its parts. Every file is made here. Processing is that of Qwen2.5-VL, with
a small tokenizer.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from mm_data import ConversationDataset, Flops, build_loader, read_image
from mm_data.chat_options import ChatOptions
from mm_data.conversations import Source, read_conversations
from mm_models.qwen2_5_vl.processing import Qwen25VLProcessing
from mm_models.qwen2_5_vl.testing import write_hub_folder

WORDS = ["what", "is", "in", "this", "picture", "and", "which", "colour", "has", "the", "shape", "on", "its", "left"]


def peak() -> float:
    """MB of memory at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    def __init__(self) -> None:
        self.began = time.perf_counter()

    def __call__(self) -> float:
        """Seconds since the last call."""
        now = time.perf_counter()
        passed, self.began = now - self.began, now
        return passed


def item(draw: np.random.Generator, pictures: list[str]) -> dict:
    messages = []
    for turn in range(int(draw.integers(1, 4))):
        question = "<image>" * len(pictures) * (turn == 0) + " ".join(draw.choice(WORDS, 12))
        answer = " ".join(draw.choice(WORDS, int(min(600, draw.lognormal(3.6, 0.9))) + 1))
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": pictures}


def write_items(path: Path, count: int, pictures: list[str]) -> None:
    """Seven of ten have a picture, a few several. Of many items, the texts of the first thousand come again."""
    draw = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        lines = []
        for number in range(count):
            if number < 1000 or pictures:
                some = int(draw.choice([0, 1, 2, 5], p=[0.25, 0.65, 0.07, 0.03])) if pictures else 0
                lines.append(json.dumps(item(draw, draw.choice(pictures, some).tolist() if some else [])))
            file.write(f"{lines[number % len(lines)]}\n")


def many(folder: Path, processing: Qwen25VLProcessing, count: int) -> None:
    write_items(folder / "many.jsonl", count, [])
    before, clock = peak(), Clock()
    conversations = read_conversations([Source(folder / "many.jsonl", 1.5)])
    found = clock()
    dataset = ConversationDataset(conversations, processing, max_tokens=8192, max_patches=16384, survey=False)
    made = clock()
    loader = build_loader(dataset, global_batch=512, dp_size=64, num_workers=0)
    ordered = clock()
    loader.order.step(0)
    first = clock()
    for step in range(20):
        loader.order.step(10**6 + step)
    later = clock() / 20
    print(
        f"{count:,} conversations of {(folder / 'many.jsonl').stat().st_size / 1e6:.0f} MB: found in {found:.1f} s, "
        f"data set {made:.2f} s, order {ordered:.2f} s, first step {first:.2f} s, a step far away {1000 * later:.1f} "
        f"ms; {peak() - before:.0f} MB"
    )
    picks = [loader.order.step(step) for step in range(10)]
    clock()
    for step in picks:
        dataset.plan(step, 64)
    measured = clock() / 10
    for step in picks:
        dataset.plan(step, 64)
    print(
        f"a step of 512 over 64 ranks: planned in {measured:.2f} s where sizes are not known, "
        f"{1000 * clock() / 10:.0f} ms where they are"
    )


def headers(folder: Path, processing: Qwen25VLProcessing, count: int) -> None:
    draw = np.random.default_rng(1)
    paths = []
    kinds = []
    for kind in range(32):
        height, width = (int(side) for side in draw.uniform(224, 1100, 2))
        pixels = draw.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
        name = folder / f"kind{kind}.{'jpg' if kind % 4 else 'png'}"
        Image.fromarray(pixels).resize((width, height)).save(name)
        kinds.append(name)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        paths.append(str(folder / f"{number}{kind.suffix}"))
        Path(paths[-1]).write_bytes(kind.read_bytes())
    write_items(folder / "pictures.jsonl", count, paths)
    conversations = read_conversations([Source(folder / "pictures.jsonl")])
    before, clock = peak(), Clock()
    options = {"max_tokens": 8192, "max_patches": 16384, "survey_file": folder / "survey.npz"}
    dataset = ConversationDataset(conversations, processing, **options)
    surveyed = clock()
    ConversationDataset(conversations, processing, **options)
    print(
        f"survey of {count:,} conversations with pictures: {surveyed:.1f} s, {count / surveyed:,.0f} a second; "
        f"kept: {clock():.2f} s; {peak() - before:.0f} MB; {len(dataset):,} can be used"
    )
    cost = Flops()
    for ranks, global_batch in ((8, 128), (16, 512)):
        order = build_loader(dataset, global_batch=global_batch, num_workers=0).order
        spreads, waits, full, packs = [], [], [], []
        for step in range(len(dataset) // global_batch):
            sizes = dataset.sizes
            dealt = dataset.plan(order.step(step), ranks)
            paid = np.array(
                [
                    [sum(cost(sizes[int(dataset.usable[pick.index])]) for pick in pack.picks) for pack in packs_of_rank]
                    for packs_of_rank in dealt
                ]
            )
            tokens = sum(sizes[int(dataset.usable[pick.index])].tokens for pick in order.step(step))
            totals = paid.sum(1)
            spreads.append((totals.max() - totals.min()) / totals.mean())
            waits.append(paid.max(0).sum() / totals.mean() - 1)
            full.append(tokens / (ranks * len(dealt[0]) * 8192))
            packs.append(len(dealt[0]))
        print(
            f"  {global_batch} over {ranks} ranks: FLOPs of ranks spread by {np.mean(spreads):.1%} (95 of 100 steps: "
            f"{np.quantile(spreads, 0.95):.1%}); waiting for the dearest pack {np.mean(waits):.1%}; "
            f"{np.mean(packs):.1f} packs a rank, {np.mean(full):.0%} full of tokens"
        )


def loader(folder: Path, processing: Qwen25VLProcessing, count: int) -> None:
    draw = np.random.default_rng(2)
    pixels = draw.integers(0, 256, (480 // 8, 640 // 8, 3), np.uint8)
    Image.fromarray(pixels).resize((640, 480)).save(folder / "coco.jpg", quality=90)
    data = (folder / "coco.jpg").read_bytes()
    names = [str(folder / f"coco{number}.jpg") for number in range(count)]
    for name in names:
        Path(name).write_bytes(data)
    with open(folder / "images.jsonl", "w", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(item(draw, [name]))}\n" for name in names)
    conversations = read_conversations([Source(folder / "images.jsonl")])
    clock = Clock()
    pictures = [read_image(name) for name in names]
    decoded = count / clock()
    way = processing._ways["image"]
    resize = processing.images.resizer(way)
    resized = [resize(picture) for picture in pictures]
    shrunk = count / clock()
    for picture in resized:
        processing.images.patches(picture[None])
    patched = count / clock()
    for conversation in conversations:
        processing.measure(conversation)
    spelled = count / clock()
    parts = 1 / (1 / decoded + 1 / shrunk + 1 / patched + 1 / spelled)
    print(
        f"images of 640x480 a second: decoding {decoded:.0f}, resizing {shrunk:.0f}, patches {patched:.0f}, reading "
        f"and spelling the conversation {spelled:.0f}; all of these one after another {parts:.0f}"
    )
    dataset = ConversationDataset(conversations, processing, max_tokens=8192, max_patches=16384)
    for workers in (0, 1, 2):
        made = iter(build_loader(dataset, global_batch=16, num_workers=workers))
        clock()
        steps = list(islice(made, max(1, count // 16)))
        images = sum(batch.tensors["grid_thw"].shape[1] for step in steps for batch in step.micro)
        speed = images / clock()
        print(f"  the loader with {workers} threads: {speed:.0f}, {speed / parts:.2f} of that")
        made.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=1_000_000)
    parser.add_argument("--pictures", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        hub = write_hub_folder(folder / "hub", weights=False)
        processing = Qwen25VLProcessing(hub, ChatOptions())
        many(folder, processing, args.conversations)
        headers(folder, processing, args.pictures)
        loader(folder, processing, args.images)


if __name__ == "__main__":
    main()
