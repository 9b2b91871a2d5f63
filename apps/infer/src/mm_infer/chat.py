"""python -m mm_infer.chat --weights W --image a.png --prompt "What is in this picture?" """

import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from mm_convert.cli.arguments import parse
from mm_convert.cli.checks import Check, NotHere
from mm_convert.cli.terminal import escaped_output, one_line
from mm_data.chat_options import ChatOptions, read_options
from mm_data.conversations import Conversation, Ledger, Media, Source, Turn, Unusable, find_missing, read_conversations
from mm_data.files import shorten
from mm_infer.answer import Answer, Answerer, Model
from mm_infer.checks import check_output, choose_device, describe_device, describe_file, tell
from mm_models.libraries import check_libraries
from mm_parallel.config import AttentionName

PROGRAM = "mm_infer.chat"
HELP = "/image PATH and /video PATH go with the next question; /new begins anew; /quit ends"


@dataclass(frozen=True)
class Answering:
    """A model that answers, and how: what every program shares that asks one."""

    weights: Path
    "folder of the hub, or of ours, a run of mm_train, or any other form that mm-convert reads"
    processor: Path | None = None
    "folder of the hub with tokenizer and image processor; by default the weights, if they lie beside them"
    model: str | None = None
    "preset; only needed where the weights do not say what they are"
    lora: Path | None = None
    "LoRA that is added to the weights: a file or folder, of any format that mm-convert reads"
    lora_alpha: Annotated[float, "!= 0"] | None = None
    "alpha of the LoRA, where its files do not say it"
    max_new_tokens: Annotated[int, ">= 1", "<= 1000000"] = 512
    "most tokens of an answer"
    temperature: Annotated[float, ">= 0", "<= 100"] = 0.0
    "0 takes the likeliest token each time; above, tokens are drawn"
    seed: Annotated[int, ">= 0", "<= 9223372036854775807"] = 0
    "of drawn tokens"
    system: str | None = None
    "system prompt; by default the model's own, an empty text: none"
    device: str | None = None
    "as cpu, cuda:1, npu:0; by default the accelerator"
    dtype: Literal["bfloat16", "float32"] | None = None
    "by default bfloat16 on an accelerator, float32 on a CPU"
    attention: AttentionName = "auto"
    "kernel of attention: on CUDA flash, flash3 or flash4 (with their packages), cudnn, efficient"
    chat: ChatOptions = field(default_factory=ChatOptions)

    @property
    def options(self) -> ChatOptions:
        """With the system prompt of the flag."""
        return self.chat if self.system is None else replace(self.chat, system=self.system)


@dataclass(frozen=True)
class Config(Answering):
    """Ask a model about images and videos: once (--prompt), a file of questions (--questions), or in a conversation."""

    prompt: str | None = None
    "question; <image> and <video> in it say where they stand, without them they stand before it"
    image: Path | list[Path] | None = None
    'image of the question, or several: ["a.png", "b.png"]'
    video: Path | list[Path] | None = None
    "video of the question, or several"
    questions: Path | None = None
    "file of conversations, in any form that is trained on; the last question of each is asked"
    media: Path | None = None
    "folder of the images and videos of --questions"
    output: Path = Path("answers.jsonl")
    "of --questions: an object with id, question, answer, reference and exact on each line"
    overwrite: bool = False
    "replace an output that is there"
    boxes: Literal["model", "original"] = "model"
    "boxes of an answer in pixels of the image as the model sees it, or of the image as it is"
    check: bool = False
    "look at everything that the command needs, print what is found, and ask nothing; exit code 2 where something is wrong"  # noqa: E501

    def __post_init__(self) -> None:
        if self.prompt is not None and self.questions is not None:
            raise ValueError("--prompt is one question, --questions a file of them: leave one out")
        check_prompt(self.prompt)
        if self.prompt is None and (self.image or self.video):
            raise ValueError("--image and --video are of a --prompt: give it; in a conversation, /image PATH adds one")
        if self.questions is None and self.media is not None:
            raise ValueError("--media is the folder of --questions: give them")


def check_prompt(prompt: str | None) -> None:
    """Raise ValueError for a question that is given and empty, as an unset variable of a shell makes it."""
    if prompt is not None and not prompt.strip():
        raise ValueError("--prompt is empty: write what is asked, or leave it out")


@escaped_output()
def main(argv: Sequence[str] | None = None) -> None:
    """Exit code 2 for a command that cannot work, found before a tensor is read; 130 after Ctrl-C."""
    try:
        config = parse(Config, argv, prog=PROGRAM)
        with exit_code(PROGRAM, 2, ValueError, OSError):
            config = _as_trained(config, argv)
            if config.check:
                sys.exit(tell(CHECKS, Asked(config), config, lambda: {}))
            model = open_model(config)
            asked = None if config.prompt is None else make_question(config)
            questions = None if config.questions is None else _open_questions(config)
        with exit_code(PROGRAM, 2, ValueError), exit_code(PROGRAM, 1, OSError, MemoryError):
            ask = Asking(config, load(config, model))
            if asked is not None:
                print(ask.show(ask(asked).text, asked))
            elif questions is not None:
                ask.all(questions)
            else:
                ask.in_turn()
    except KeyboardInterrupt:
        print(f"{PROGRAM}: stopped", file=sys.stderr)
        sys.exit(130)


class Asked:
    """What is asked for, and what several checks look at, opened once."""

    def __init__(self, config: Config) -> None:
        self.config = config

    @cached_property
    def model(self) -> Model:
        return open_model(self.config)


def open_model(config: Answering) -> Model:
    """The model that is asked for. ValueError as `Model`."""
    more = {"model": config.model, "lora": config.lora, "lora_alpha": config.lora_alpha}
    return Model(config.weights, config.processor, **more)


def _weights(asked: Asked) -> str:
    file = asked.model.checkpoint
    return f"{describe_file(file)}{', with an adapter' if asked.config.lora else ''}"


def _processor(asked: Asked) -> str:
    """Tokenizer and image processor open, and are the model's."""
    model = asked.model
    model.family.chat.processing(model.processor, asked.config.options, model.config)
    return f"{model.processor}: tokenizer and image processor open"


def _question(asked: Asked) -> str:
    config = asked.config
    if config.prompt is not None:
        media = len(make_question(config).media)
        return f"--prompt, with {media} of images and videos"
    if config.questions is None:
        return NotHere("questions are asked in turn")
    questions = _open_questions(config)
    ledger = Ledger()
    find_missing(questions, ledger)
    if len(ledger) == len(questions):
        first = f", e.g. {ledger.entries[0].id}: {ledger.entries[0].text}" if len(ledger) else ""
        raise ValueError(f"--questions {config.questions}: not one of {len(questions)} can be asked{first}")
    left = f"\n{len(ledger)} cannot be asked, e.g. {ledger.entries[0].text}" if len(ledger) else ""
    return f"{len(questions):,} questions{left}"


def _output(asked: Asked) -> str:
    config = asked.config
    return check_output(config.output.parent) if config.questions is not None else NotHere("no --questions")


CHECKS: tuple[Check[Asked], ...] = (
    Check("libraries", "when asked", lambda asked: check_libraries()),
    Check("weights", "when asked", _weights),
    Check("processor", "when asked", _processor, after=("weights",)),
    Check("question", "when asked", _question),
    Check("output", "when asked", _output),
    Check("device", "when asked", lambda asked: describe_device(asked.config.dtype, asked.config.device)),
)


def _as_trained(config: Config, argv: Sequence[str] | None) -> Config:
    """The same, asked as the adapter or the weights were trained where nothing else is given; and it is said."""
    defaults = trained_options(config.lora, config.weights)
    return parse(Config, argv, prog=PROGRAM, defaults=defaults) if defaults else config


def trained_options(*folders: Path | None) -> list[dict[str, Any]]:
    """Tables of options as the first of these folders was trained that says so, which is told; or nothing."""
    for folder in folders:
        if folder is not None and (said := read_options(folder)):
            options = ", ".join(f"{name} {value}" for name, value in said.items())
            print(one_line(f"as {folder} was trained: {options}"), file=sys.stderr)
            return [{"chat": said}]
    return []


def make_question(config: Config) -> Conversation:
    """The prompt with its images and videos. ValueError for one that cannot be read, and for marks <image> and <video>
    that are not as many as there are of them.
    """
    given = {kind: [str(path) for path in _paths(getattr(config, kind))] for kind in ("image", "video")}
    media = {kind: [look_at(Media(kind, path)) for path in paths] for kind, paths in given.items()}
    marks = {kind: config.prompt.count(f"<{kind}>") if media[kind] else 0 for kind in media}
    for kind, count in marks.items():
        if count not in (0, len(media[kind])):
            raise ValueError(
                f"the prompt has {count} marks <{kind}>, but {len(media[kind])} are given (--{kind}): mark the place "
                "of each, or of none"
            )
    before = [one for kind in media for one in media[kind] if not marks[kind]]
    marked = [kind for kind, count in marks.items() if count]
    texts = re.split(f"<({'|'.join(marked)})>", config.prompt) if marked else [config.prompt]
    placed = {kind: iter(media[kind]) for kind in marked}
    parts = [next(placed[text]) if i % 2 else text for i, text in enumerate(texts)]
    return Conversation("prompt", (Turn("user", tuple(part for part in [*before, *parts] if part)),))


def look_at(one: Media) -> Media:
    """The same. Raises Unusable where its header cannot be read."""
    one.read_size() if one.kind == "image" else one.probe()
    return one


def _paths(given: Path | list[Path] | None) -> list[Path]:
    return [] if given is None else [given] if isinstance(given, Path) else given


def _open_questions(config: Config):
    if config.output.is_dir():
        raise ValueError(f"output {config.output} is a folder: give a file, as {config.output / 'answers.jsonl'}")
    if config.output.exists() and not config.overwrite:
        raise ValueError(f"output {config.output} is there already: give --overwrite true, or another --output")
    return read_conversations([Source(config.questions)], config.media, answered=False)


def load(config: Answering, model: Model) -> Answerer:
    import torch  # only now that the command makes sense

    from mm_parallel.attention import activate

    device = choose_device(config.device)
    dtype = None if config.dtype is None else getattr(torch, config.dtype)
    activate(config.attention, device.type)  # transformers' class asks torch
    return Answerer(model, config.options, device, dtype, config.attention)


class Asking:
    """A model, and how it is asked."""

    def __init__(self, config: Config, answerer: Answerer) -> None:
        self.config, self.answerer = config, answerer

    def __call__(self, conversation: Conversation) -> Answer:
        config = self.config
        most, temperature = config.max_new_tokens, config.temperature
        return self.answerer(conversation, max_new_tokens=most, temperature=temperature, seed=config.seed)

    def show(self, text: str, conversation: Conversation) -> str:
        """An answer with its boxes as they are asked for; where that cannot be, as they are, and stderr says so."""
        if self.config.boxes == "original":
            try:
                return self.answerer.processing.scale_back(text, conversation)
            except ValueError as error:
                print(one_line(f"{conversation.id}: {error}"), file=sys.stderr)
        return text

    def all(self, questions: Sequence[Conversation]) -> None:
        """A line for each as soon as it is answered; what cannot be asked is named in a file beside them."""
        ledger, asked, right = Ledger(), 0, []
        failures = self.config.output.with_name(f"{self.config.output.stem}-failures.jsonl")
        self.config.output.parent.mkdir(parents=True, exist_ok=True)
        with open(self.config.output, "w", encoding="utf-8") as file:
            for number, id in enumerate(questions.ids):
                try:
                    conversation = questions[number]
                    answer = self(conversation)
                except Unusable as error:
                    ledger.add(id, error)
                    continue
                text = self.show(answer.text, conversation)
                row = {"id": id, "question": conversation.question, "answer": text}
                if answer.reference is not None:
                    row |= {"reference": self.show(answer.reference, conversation), "exact": answer.exact}
                    right.append(answer.exact)
                asked += 1
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
        print(f"{asked} answers, {self.config.output}")
        if right:
            print(f"{sum(right)} of {len(right)} ({sum(right) / len(right):.1%}) are exactly the reference")
        failures.unlink(missing_ok=True)  # of an output that is replaced
        if len(ledger):
            ledger.write(failures)
            print(f"{len(ledger)} could not be asked, {failures}:\n{ledger}", file=sys.stderr)
        if not asked:
            raise ValueError(f"{self.config.questions}: not one question could be asked")

    def go_on(self, turns: Sequence[Turn], parts: Sequence[Media | str]) -> tuple[str, tuple[Turn, ...]]:
        """The answer to a question after these turns, and the turns with both. Raises Unusable as the model does."""
        asked = (*turns, Turn("user", tuple(parts)))
        conversation = Conversation("chat", asked)
        answer = self(conversation)
        said = (answer.text,) if answer.text else ()
        return self.show(answer.text, conversation), (*asked, Turn("assistant", said))

    def in_turn(self) -> None:
        """Questions and answers on the terminal, each with all before it."""
        print(HELP)
        turns: tuple[Turn, ...] = ()
        media: list[Media] = []
        for line in _lines():
            word, _, path = line.partition(" ")
            if word == "/quit":
                return
            if word == "/new":
                turns, media = (), []
            elif word in ("/image", "/video") and path.strip():
                try:
                    media = [*media, look_at(Media(word[1:], path.strip()))]
                except Unusable as error:
                    print(error)
            elif word.startswith("/"):
                print(f"{shorten(word)} is no command: {HELP}")
            elif not _is_text(line):
                print("this is not UTF-8 text: nothing was asked")
            elif line:
                try:
                    text, turns = self.go_on(turns, (*media, line))
                    print(text)
                except Unusable as error:
                    print(error)
                media = []


def _is_text(text: str) -> bool:
    """Whether all of it are characters: bytes of other encodings arrive as halves of some."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _lines() -> Iterator[str]:
    """What is typed, line by line, until it ends."""
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return


@contextmanager
def exit_code(program: str, code: int, *errors: type[Exception]) -> Iterator[None]:
    """Ends the program with this code and one line for errors that are not a mistake of ours."""
    try:
        yield
    except errors as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
