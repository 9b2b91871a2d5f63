"""How long a large set of conversations takes to be indexed, read and surveyed, and how much memory:

    python docs/measure/conversations.py --conversations 1000000 --images 10000

Like LLaVA-Instruct: two questions and answers about an image, most images in several conversations. JSON in one line,
and JSONL. Every measurement is a process of its own, so that memory is that of one thing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from mm_data.conversations import Ledger, Source, find_missing, read_conversations

ANSWER = 'In the image, someone stands on a field, "playing" with a frisbee.\nThe sky is blue, and there are clouds. '


def write(path: Path, count: int, images: int) -> None:
    with path.open("w", encoding="utf-8") as file:
        begin, between, end = ("", "\n", "\n") if path.suffix == ".jsonl" else ("[", ", ", "]")
        file.write(begin)
        for number in range(count):
            turns = [("human", f"<image>\nWhat is it, number {number}?"), ("gpt", 3 * ANSWER)]
            turns += [("human", "And what is behind it?"), ("gpt", 3 * ANSWER)]
            said = [{"from": role, "value": text} for role, text in turns]
            record = {"id": f"{number:012}", "image": f"{number % images:012}.jpg", "conversations": said}
            file.write((between if number else "") + json.dumps(record))
        file.write(end)


def index(path: Path, media: Path) -> str:
    return f"{len(read_conversations([Source(path)], media)):,} items"


def read(path: Path, media: Path) -> str:
    found = read_conversations([Source(path)], media)
    return f"{sum(len(found[i].turns) for i in range(len(found))):,} turns"


def names(path: Path, media: Path) -> str:
    return _survey(path, media, headers=False)


def headers(path: Path, media: Path) -> str:
    return _survey(path, media, headers=True)


def _survey(path: Path, media: Path, headers: bool) -> str:
    found, ledger = read_conversations([Source(path)], media), Ledger()
    survey = find_missing(found, ledger, headers=headers)
    return f"{len(survey.usable):,} can be used, {len(survey.sizes):,} headers"


def _work(task: Callable[[Path, Path], str], path: Path, media: Path, answer: multiprocessing.Queue) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter(), time.process_time()
    said = task(path, media)
    seconds, busy = time.perf_counter() - started[0], time.process_time() - started[1]
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    answer.put(f"{task.__name__}: {seconds:.1f} s ({busy:.1f} s of a core), {memory:,.0f} MB more memory, {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=1_000_000)
    parser.add_argument("--images", type=int, default=10_000)
    arguments = parser.parse_args()
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as made:
        media = Path(made) / "images"
        media.mkdir()
        for number in range(arguments.images):
            Image.new("RGB", (640, 480), (number % 256, 0, 0)).save(media / f"{number:012}.jpg")
        for name in ("d.json", "d.jsonl"):
            path = Path(made) / name
            write(path, arguments.conversations, arguments.images)
            print(f"{name}: {arguments.conversations:,} conversations, {path.stat().st_size / 1e9:.2f} GB", flush=True)
            for task in (index, read, names, headers):
                answer = processes.Queue()
                process = processes.Process(target=_work, args=(task, path, media, answer))
                process.start()
                print(f"  {answer.get()}", flush=True)
                process.join()
            path.unlink()


if __name__ == "__main__":
    main()
