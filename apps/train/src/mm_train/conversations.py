"""The conversations of a run: which files, by which processing, and what of them can be used.

Nothing here imports torch before a data set is made: what is missing is said at once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mm_convert.cli.terminal import one_line
from mm_data.conversations import Ledger, Source, Unusable, read_conversations
from mm_data.conversations.mindspeed import is_data_json, read_data_json
from mm_models.families import family_of
from mm_models.family import Chat
from mm_train.config import Config, Listed
from mm_train.objective import architecture

if TYPE_CHECKING:
    from mm_data.conversation_dataset import ConversationDataset
    from mm_models.processors import Processing


def read_sources(listed: Listed, flag: str) -> tuple[Source, ...]:
    """The files that a flag names, and those that a data JSON of MindSpeed-MM names for it.

    ValueError for a weight that is none, and a file that is named twice.
    """
    given = [_source(word, flag) for word in split(listed)]
    sources = [source for one in given for source in _expand(one, validation=flag.startswith("--validation"))]
    paths = [Path(source.path).resolve() for source in sources]
    if twice := [source.path for i, source in enumerate(sources) if paths[i] in paths[:i]]:
        raise ValueError(f"{flag} names {twice[0]} twice: give it once, with a weight, as {twice[0]}=2")
    return tuple(sources)


def split(listed: Listed) -> list[str]:
    """The words of a list of files."""
    words = listed.split(",") if isinstance(listed, str) else listed
    return [word.strip() for word in words if word.strip()]


def _expand(source: Source, validation: bool) -> tuple[Source, ...]:
    if not is_data_json(source.path):
        return (source,)
    said = read_data_json(source.path)
    return said.validation if validation else said.sources


def _source(word: str, flag: str) -> Source:
    path, equals, number = word.rpartition("=")
    if not equals or Path(word).exists():  # a name may hold the sign, too
        return Source(Path(word))
    try:
        weight = float(number)
    except ValueError:
        return Source(Path(word))
    if not 0 < weight <= 1000 or not math.isfinite(weight):
        raise ValueError(f"{flag} {word}: the weight is {number}; it is more than 0, and 1000 at most")
    return Source(Path(path), weight)


def find_processor(config: Config, chat: Chat) -> Path:
    """The hub's folder of tokenizer and image processor. ValueError where there is nothing of that."""
    flag, path = "--data.processor", config.data.processor
    if path is None:
        flag, path = "--weights", Path(config.weights)
    if not any((path / name).is_file() for name in chat.files):
        given = f"{flag} {path} holds no tokenizer and no processor" if path.is_dir() else f"{flag} {path} is no folder"
        raise ValueError(
            f"{given}: give --data.processor with the folder of the hub, where {', '.join(chat.files[:2])}, … lie "
            "beside the weights"
        )
    return path


def open_processing(config: Config) -> Processing:
    """What makes tokens and pixels of a conversation, for training, validation and answers alike."""
    family, shape = architecture(config)
    return family.chat.processing(find_processor(config, family.chat), config.data.chat, shape)


def open_conversations(
    config: Config, listed: Listed, flag: str, processing: Processing, name: str, *, pad: bool
) -> ConversationDataset:
    """The conversations of these files that can be used. All ranks look, each at its share; they find the same.

    name: what the files of findings and failures in the run's folder are called by. pad: see `ConversationDataset`.

    Raises ValueError if none is left; `failures.jsonl` says then, as always, why.
    """
    import torch.distributed as dist

    from mm_data.conversation_dataset import ConversationDataset
    from mm_train.ranks import all_gather
    from mm_train.start import outline

    model = outline(config)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    data, ledger = config.data, Ledger()
    conversations = read_conversations(read_sources(listed, flag), data.media, boxes=data.boxes)
    silent = rank > 0 or not sys.stderr.isatty()
    with tqdm(total=len(conversations), unit="conversation", desc=f"looking into {flag}", disable=silent) as bar:

        def tell(done: int, of: int) -> None:
            bar.total = of
            bar.update(done - bar.n)

        dataset = ConversationDataset(
            conversations,
            processing,
            max_tokens=data.max_tokens,
            max_patches=data.most_patches,
            too_long=data.too_long,
            packing=data.packing,
            pad=pad,
            survey=data.survey,
            survey_file=config.run_dir / f"{name}survey.npz",
            part=(rank, world),
            exchange=lambda own: all_gather([own]),
            ledger=ledger,
            decode_timeout=data.decode_timeout,
            cost=family_of(model.config).cost(model).weigh,
            say=tell,
        )
    if rank == 0:
        ledger.write(config.run_dir / f"{name}failures.jsonl")
    if not dataset.ids:
        first = ledger.entries[0]
        raise ValueError(
            f"{flag}: not one of {len(conversations):,} conversations can be used. {describe_refused(ledger)}, e.g. "
            f"{first.id}: {first.text}; {config.run_dir / f'{name}failures.jsonl'} names them all"
        )
    return dataset


class Refusals:
    """Tells of conversations that are left out on the way, and keeps `failures.jsonl`."""

    TOLD = 20  # of one rank; then the file has to be looked at

    def __init__(self, ledger: Ledger, file: Path):
        self.ledger, self.file = ledger, file
        self.known = self.written = len(ledger)
        self.told = 0

    def tell(self) -> None:
        """A line for each that was found on this rank since it was last asked."""
        if len(self.ledger) == self.known:
            return
        new = self.ledger.entries[self.known :]
        self.known += len(new)
        for entry in new[: self.TOLD - self.told]:
            print(one_line(f"left out: {entry.id}: {entry.reason}: {entry.text}"), file=sys.stderr, flush=True)
        self.told += len(new)
        if self.told - len(new) < self.TOLD <= self.told:
            print(one_line(f"more that are left out are named in {self.file} alone"), file=sys.stderr, flush=True)

    def write(self) -> None:
        """What all ranks have found; all of them must call it."""
        import torch.distributed as dist

        from mm_train.ranks import all_gather

        found = Ledger()
        for entry in all_gather(self.ledger.entries):
            found.add(entry.id, Unusable(entry.reason, entry.text))
        if len(found) > self.written and not (dist.is_initialized() and dist.get_rank()):
            found.write(self.file)
        self.written = len(found)


def describe_refused(ledger: Ledger) -> str:
    """`12 missing_media, 3 too_long`; empty where nothing was refused."""
    return ", ".join(f"{count:,} {reason}" for reason, count in ledger.counts.items())


def describe_sources(sources: Sequence[Source]) -> str:
    """As they are given on a command line."""
    return ",".join(one_line(source.path) + (f"={source.weight:g}" if source.weight != 1 else "") for source in sources)


def find_files(sources: Sequence[Source]) -> dict[str, Path]:
    """The files by what they are called in a list of contents."""
    return {str(source.path): Path(source.path) for source in sources}


def find_processor_files(config: Config) -> dict[str, Path]:
    """Those of tokenizer and image processor that are there."""
    chat: Any = architecture(config)[0].chat
    folder = find_processor(config, chat)
    return {name: folder / name for name in chat.files if (folder / name).is_file()}
