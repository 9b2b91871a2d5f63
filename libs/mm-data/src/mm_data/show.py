"""Look at conversations as a model gets them: `python -m mm_data.show data.json --media images/ [--processor MODEL]`.

Prints a conversation, with the sizes of its media, and counts of the set: what cannot be used, and why. With the
processor of a model also its tokens, those that are trained in colour (elsewhere than on a terminal in [[brackets]]),
the grids of its media, and its positions.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import typing
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mm_data.chat_options import ChatOptions
from mm_data.conversations import (
    Box,
    Conversation,
    Conversations,
    Ledger,
    Media,
    Source,
    Unusable,
    find_missing,
    read_conversations,
)
from mm_data.conversations.mindspeed import is_data_json, read_data_json
from mm_data.files import escape, shorten

LOAD = "mm_models.processors:load"
_TRAINED, _DIM, _PLAIN = "\x1b[32m", "\x1b[2m", "\x1b[0m"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mm_data.show", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "data", nargs="+", type=Path, help="JSON or JSONL of conversations, or MindSpeed-MM's data JSON"
    )
    parser.add_argument("--media", type=Path, help="where the paths of images and videos begin")
    parser.add_argument("--sample", action="append", default=[], help="number or id of a conversation; may be repeated")
    parser.add_argument("--processor", type=Path, help="the hub's folder of a model: also show tokens")
    parser.add_argument("--load", default=LOAD, help=f"module:function of (folder, options) that opens it ({LOAD})")
    parser.add_argument("--chat", action="append", default=[], help="an option for it, as image_max_pixels=262144")
    parser.add_argument(
        "--boxes", choices=("text", "original"), default="text", help="read bbox_2d of answers as boxes"
    )
    parser.add_argument("--failures", type=Path, help="write what cannot be used to this file, with the reasons")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    arguments = make_parser().parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        show(arguments)
    except BrokenPipeError:  # of `| head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ValueError as error:
        print(f"error: {shorten(str(error), 2000)}", file=sys.stderr)
        raise SystemExit(2) from None


def show(arguments: argparse.Namespace) -> None:
    sources, said = _list_sources(arguments.data)
    conversations = read_conversations(sources, arguments.media, boxes=arguments.boxes)
    for source, span in zip(conversations.sources, conversations.spans, strict=True):
        print(escape(f"{source.path}: {len(span):,} conversation{'s' * (len(span) != 1)}"))
    options = _options(said, arguments.chat)
    processing = _load(arguments.load, arguments.processor, options) if arguments.processor else None
    chosen = [_index(conversations, sample) for sample in arguments.sample]
    if not chosen or arguments.failures:
        usable = _count(conversations, arguments.failures)
        chosen = chosen or usable[:1]
    for index in chosen:
        print()
        _show_one(conversations, index, processing)


def _list_sources(paths: Sequence[Path]) -> tuple[list[Source], dict[str, Any]]:
    """The files, and the options that MindSpeed-MM's data JSON says."""
    sources, options = [], {}
    for path in paths:
        if not is_data_json(path):
            sources.append(Source(path))
            continue
        read = read_data_json(path)
        sources += read.sources
        options |= read.options
        for note in read.notes:
            print(escape(f"{path}: {note}"))
    return sources, options


def _options(said: dict[str, Any], texts: Sequence[str]) -> ChatOptions:
    kinds = typing.get_type_hints(ChatOptions)
    values = dict(said)
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or key not in kinds:
            names = ", ".join(field.name for field in dataclasses.fields(ChatOptions))
            raise ValueError(f"--chat {shorten(text)}: write key=value; the keys are {names}")
        values[key] = _parse(value, kinds[key], text)
    return ChatOptions(**values)


def _parse(value: str, kind: Any, text: str) -> Any:
    parts = typing.get_args(kind) or (kind,)
    if value in ("true", "false") and bool in parts:
        return value == "true"
    for number in (int, float):
        if number in parts or (number is float and int in parts):
            try:
                return number(value)
            except ValueError:
                continue
    if str in parts or value in parts:
        return value
    raise ValueError(f"--chat {shorten(text)}: it must be {' or '.join(str(part) for part in parts)}")


def _load(name: str, folder: Path, options: ChatOptions) -> Any:
    module, _, function = name.partition(":")
    try:
        load = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--load {name} cannot be imported ({error}): install mm-models, or name a module:function"
        ) from error
    return load(folder, options)


def _index(conversations: Conversations, sample: str) -> int:
    if not sample.isdecimal():
        return conversations.find_id(sample)
    if int(sample) >= len(conversations):
        raise ValueError(f"there are {len(conversations):,} conversations, 0 to {len(conversations) - 1}: not {sample}")
    return int(sample)


def _count(conversations: Conversations, failures: Path | None) -> list[int]:
    """Print how many can be used, and why the others cannot. Returns those that can."""
    ledger, bar = Ledger(), sys.stderr.isatty()

    def say(done: int, all: int) -> None:
        if bar:
            print(f"\rlooked at {done:,} of {all:,}", end="\n" if done == all else "", file=sys.stderr, flush=True)

    found = find_missing(conversations, ledger, say=say)
    print(f"{len(found.usable):,} can be used, {len(ledger):,} cannot; {len(found.sizes):,} different images")
    print("; ".join(f"{count:,} with {kind}" for kind, count in found.kinds.items() if count))
    if ledger:
        print(ledger)
    if failures is not None:
        ledger.write(failures)
        print(escape(f"written to {failures}"))
    return found.usable.tolist()


def _show_one(conversations: Conversations, index: int, processing: Any) -> None:
    try:
        conversation = conversations[index]
    except Unusable as error:
        print(escape(f"{conversations.ids[index]} cannot be used: {error}"))
        print(escape(shorten(conversations.read_text(index), 2000)))
        return
    count = Counter(medium.kind for medium in conversation.media)
    said = [
        f"{len(conversation.turns)} turns",
        *(f"{number} {kind}{'s' * (number > 1)}" for kind, number in count.items()),
    ]
    print(escape(f"{conversation.id}: {', '.join(said)}"))
    number = 0
    for turn in conversation.turns:
        text = ""
        for part in turn.parts:
            if isinstance(part, Media):
                text += _dim(f"<{part.kind} {number}: {_describe(part)}>")
                number += 1
            elif isinstance(part, Box):
                unit = " of 1" if part.normalized else ""
                text += _dim(f"<box {list(part.numbers)}{unit} of {conversation.media[part.media].kind} {part.media}>")
            else:
                text += escape(part)
        first, *rest = text.split("\n")
        print("\n".join([f"  {turn.role:9} | {first}", *(f"  {'':9} | {line}" for line in rest)]))
    if processing is not None:
        try:
            _show_tokens(conversation, processing)
        except Unusable as error:
            print(escape(f"  it cannot be used: {error}"))


def _describe(medium: Media) -> str:
    path = shorten(medium.path, 120)
    try:
        if medium.kind == "image":
            height, width = medium.read_size()
            return f"{path}, {height} x {width}"
        info = medium.probe()
        return f"{path}, {info.num_frames} frames of {info.height} x {info.width}, {info.fps:.3g} a second"
    except Unusable as error:
        return f"{path}, {error}"


def _show_tokens(conversation: Conversation, processing: Any) -> None:
    pieces, encoded = processing.show(conversation), processing.encode(conversation)
    trained = int((encoded.labels >= 0).sum())
    print(f"  {len(encoded.input_ids):,} tokens, {trained:,} of them trained; {len(encoded.pixel_values):,} patches")
    print("".join(_mark(text, is_trained) for text, is_trained in _join(pieces)))
    for number, (medium, grid) in enumerate(zip(conversation.media, encoded.grid_thw.tolist(), strict=True)):
        print(f"  {medium.kind} {number}: grid {' x '.join(map(str, grid))}, {grid[0] * grid[1] * grid[2]:,} patches")
    for line in _describe_positions(encoded.position_ids.tolist()):
        print(f"  {line}")


def _join(pieces: Sequence[Any]) -> Iterator[tuple[str, bool]]:
    """(text, whether it is trained), of pieces that are alike together."""
    text, trained = "", False
    for piece in pieces:
        if piece.trained != trained and text:
            yield text, trained
            text = ""
        text, trained = text + piece.text + (f"({piece.times:,} times)" if piece.times > 1 else ""), piece.trained
    if text:
        yield text, trained


def _mark(text: str, trained: bool) -> str:
    shown = escape(text)
    if not trained:
        return shown
    return f"{_TRAINED}{shown}{_PLAIN}" if _is_coloured() else f"[[{shown}]]"


def _dim(text: str) -> str:
    return f"{_DIM}{escape(text)}{_PLAIN}" if _is_coloured() else escape(text)


def _is_coloured() -> bool:
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _describe_positions(positions: Sequence[Sequence[int]]) -> list[str]:
    """A line for every run of tokens. Text counts alike in time, height and width; a picture begins as text would."""
    tokens = list(zip(*positions, strict=True))
    alike = [len(set(token)) == 1 for token in tokens]
    is_text = [False] * len(tokens)
    for number in range(1, len(tokens)):
        if alike[number - 1] and alike[number] and tokens[number][0] == tokens[number - 1][0] + 1:
            is_text[number - 1 : number + 1] = [True, True]
    for number in range(len(tokens) - 1):
        if is_text[number] and not alike[number + 1]:
            is_text[number] = False
    begins = [number for number in range(len(tokens)) if number == 0 or is_text[number] != is_text[number - 1]]
    ends = [*(begin - 1 for begin in begins[1:]), len(tokens) - 1]
    return [_describe_run(tokens, *run) for run in zip(begins, ends, strict=True)]


def _describe_run(tokens: Sequence[tuple[int, ...]], begin: int, end: int) -> str:
    ranges = [(min(axis), max(axis)) for axis in zip(*tokens[begin : end + 1], strict=True)]
    where = f"tokens {begin} to {end}: "
    if len(set(ranges)) == 1 and ranges[0][1] - ranges[0][0] == end - begin:
        return f"{where}positions {ranges[0][0]} to {ranges[0][1]}"
    named = zip(("time", "height", "width"), ranges, strict=True)
    return where + ", ".join(f"{axis} {low} to {high}" for axis, (low, high) in named)


if __name__ == "__main__":
    main()
