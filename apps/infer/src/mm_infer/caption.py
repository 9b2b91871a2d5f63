"""python -m mm_infer.caption clips/ --weights Qwen2.5-VL-7B-Instruct: a caption beside each clip and picture."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mm_convert.cli.arguments import parse
from mm_convert.cli.terminal import escaped_output, one_line
from mm_data.conversations import Conversation, Media, Turn, Unusable
from mm_data.files import write_atomic
from mm_data.folders import CAPTION, PICTURES, Captioned, list_folder
from mm_infer.answer import Model
from mm_infer.chat import Answering, Asking, check_prompt, exit_code, load, open_model, trained_options
from mm_parallel.launch import read_launch

PROGRAM = "mm_infer.caption"
ASKED = (
    "Describe this {} for training a model that makes videos from text: the subject and what it does, the place, the "
    "light, the style, and how the camera moves. Write one paragraph that begins with the subject, and say only what "
    "can be seen."
)


@dataclass(frozen=True, kw_only=True)
class Config(Answering):
    """Write a caption beside each clip and picture of a folder that has none: clip.mp4 gets clip.txt.

    A command that was stopped continues. Under torchrun each rank captions its share of the files.
    """

    folder: Path = field(metadata={"positional": True})
    "clips and pictures, also in folders of it"
    prompt: str | None = None
    "what is asked of each; {} stands for image or video. By default a description for training"
    prefix: str = ""
    'put before each caption, e.g. a name for what a LoRA is to learn: "sks dog, "'
    overwrite: bool = False
    "write anew what has a caption already"

    def __post_init__(self) -> None:
        check_prompt(self.prompt)
        if marks := [mark for mark in ("<image>", "<video>") if mark in (self.prompt or "")]:
            raise ValueError(
                f"--prompt has the mark {marks[0]}, but each clip or picture stands before it: leave the mark out, or "
                "write {}, which becomes the word image or video"
            )


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work, 1 if a file got no caption, 130 after Ctrl-C."""
    try:
        config = parse(Config, argv, prog=PROGRAM)
        with exit_code(PROGRAM, 2, ValueError, OSError):
            if said := trained_options(config.lora, config.weights):
                config = parse(Config, argv, prog=PROGRAM, defaults=said)
            todo = choose(config)
            model = open_model(config) if todo else None
        with exit_code(PROGRAM, 2, ValueError), exit_code(PROGRAM, 1, OSError, MemoryError):
            failed = write_captions(config, model, todo) if todo else 0
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped; the same command continues", file=sys.stderr)
        sys.exit(130)
    sys.exit(1 if failed else 0)


def choose(config: Config) -> list[Captioned]:
    """What gets a caption from this rank, by name. ValueError for a folder without clips and pictures."""
    if not config.folder.is_dir():
        raise ValueError(f"{config.folder} is not a folder: give one with clips or pictures in it")
    rank, world = read_launch().ranks or (0, 1)
    say = _tell if rank == 0 else lambda _: None
    found = list_folder(config.folder, say)
    if not found:
        raise ValueError(f"{config.folder} holds no clip and no picture: give a folder of them")
    todo = [one for one in found if config.overwrite or not one.caption]
    kept = len(found) - len(todo)
    say(f"{config.folder}: {len(todo):,} of {len(found):,} get a caption" + (f", {kept:,} have one" if kept else ""))
    return todo[rank::world]


def write_captions(config: Config, model: Model, todo: Sequence[Captioned]) -> int:
    """How many could not be captioned; each is named with the reason on stderr."""
    ask = Asking(config, load(config, model))
    failed = 0
    for number, one in enumerate(todo, 1):
        kind = "image" if one.path.suffix.lower() in PICTURES else "video"
        asked = (config.prompt or ASKED).replace("{}", kind)
        try:
            answer = ask(Conversation(one.name, (Turn("user", (Media(kind, str(one.path)), asked)),)))
        except Unusable as error:
            failed += 1
            _tell(f"{number}/{len(todo)} {one.name}: no caption: {error}")
            continue
        text = " ".join(answer.text.split())
        if not text:
            failed += 1
            _tell(f"{number}/{len(todo)} {one.name}: no caption: the model answered nothing; ask otherwise (--prompt)")
            continue
        write_atomic(one.path.with_suffix(CAPTION), f"{config.prefix}{text}\n".encode())
        print(one_line(f"{number}/{len(todo)} {one.name}: {config.prefix}{text}"), flush=True)
    if failed:
        _tell(f"{failed:,} of {len(todo):,} got no caption")
    return failed


def _tell(line: str) -> None:
    print("\n".join(one_line(part) for part in line.splitlines()), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
