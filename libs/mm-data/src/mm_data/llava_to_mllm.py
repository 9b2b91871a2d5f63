"""LLaVA-Instruct as it is downloaded, in the format of MindSpeed-MM's guide: `python -m mm_data.llava_to_mllm`.

Does what `python examples/qwen2vl/llava_instruct_2_mllm_demo_format.py` does there, with the same bytes; here training
reads LLaVA-Instruct as it is, so that it is not needed. What is left out is counted, and named in a file beside the
output: there, items of which the image is missing vanish.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mm_data.conversations import Ledger, Unusable
from mm_data.conversations.folders import Folders
from mm_data.conversations.index import index_items
from mm_data.files import TEMPORARY, escape, open_file, parse_json, shorten, show

_ROLES = {"human": "user", "gpt": "assistant"}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mm_data.llava_to_mllm",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--input", default="./data/llava_instruct_150k.json", help="LLaVA-Instruct, as downloaded")
    parser.add_argument("--images", default="./data/COCO2017/train2017", help="the folder of its images")
    parser.add_argument("--output", default="./data/mllm_format_llava_instruct_data.json", help="must not be there yet")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    try:
        convert(arguments.input, arguments.images, Path(arguments.output))
    except (ValueError, OSError) as error:
        print(f"error: {shorten(str(error), 2000)}", file=sys.stderr)
        raise SystemExit(2) from None


def convert(source: str, images: str, output: Path) -> Ledger:
    """Write the items of `source` to `output`, with paths that begin with `images`. Returns what was left out.

    Raises ValueError where `output` is there already, and for a source that is no list. Items go from file to file.
    """
    failures = output.with_name(f"{output.stem}.failures.jsonl")
    for path in (output, failures):
        if path.exists():
            raise ValueError(f"{path} already exists: rename it, or remove it")
    ledger = Ledger()
    descriptor, temporary = tempfile.mkstemp(dir=output.parent, prefix=TEMPORARY)  # of mode 0600, as there
    try:
        with open(descriptor, "wb") as file:
            written = _write(file, source, images, ledger)
        os.replace(temporary, output)
    except BaseException:
        os.unlink(temporary)
        raise
    print(escape(f"{written:,} conversations written to {output}, {len(ledger):,} left out"))
    if ledger:
        ledger.write(failures)
        print(f"{ledger}\nall of them are named in {escape(str(failures))}")
    return ledger


def _write(file: BinaryIO, source: str, images: str, ledger: Ledger) -> int:
    """Returns how many items were written."""
    index, folders, written = index_items(source), Folders(), 0
    with open_file(source) as read:
        for number, (begin, end) in enumerate(zip(index.begins.tolist(), index.ends.tolist(), strict=True)):
            try:
                item = _convert(os.pread(read.fileno(), end - begin, begin), source, images, folders)
            except Unusable as error:
                ledger.add(f"{Path(source).name}[{number}]", error)
                continue
            file.write((b", " if written else b"[") + item)
            written += 1
    file.write(b"]" if written else b"[]")
    file.flush()
    os.fsync(file.fileno())
    return written


def _convert(data: bytes, source: str, images: str, folders: Folders) -> bytes:
    try:
        item: Any = parse_json(data.decode(), source)
    except ValueError as error:
        raise Unusable("broken_json", str(error)) from error
    if not isinstance(item, dict) or not isinstance(item.get("conversations"), list):
        raise Unusable("unknown_format", f"an item is {show(item)}: it must have conversations")
    named = item.get("image") or []
    named = named if isinstance(named, list) else [named]
    if not all(isinstance(name, str) for name in named):
        raise Unusable("unknown_format", f"image is {show(item['image'])}, not a name")
    paths = [os.path.join(images, name) for name in named]
    if missing := [path for path in paths if not folders.has(path)]:
        raise Unusable("missing_media", f"{', '.join(map(shorten, missing))} is not there")
    messages = []
    for number, turn in enumerate(item["conversations"]):
        role = turn.get("from") if isinstance(turn, dict) else None
        if role not in _ROLES or "value" not in turn:
            raise Unusable("roles", f"turn {number} is {show(turn)}: it must be from human or gpt, with a value")
        messages.append({"role": _ROLES[role], "content": turn["value"]})
    try:
        return json.dumps({"images": paths, "messages": messages}, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise Unusable("broken_json", "it holds half a character (a lone surrogate)") from error


if __name__ == "__main__":
    main()
