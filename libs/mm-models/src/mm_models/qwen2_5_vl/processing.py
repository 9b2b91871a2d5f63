"""Conversations as the model reads them: tokens, labels, pixels and positions; the same for training and for chat.

Tokens are those of the hub's chat template. Labels are known by construction: each turn is spelled apart, so what is
trained does not depend on what a text says. Content is never read as special tokens: in a user's text, `<|im_end|>` or
`<|image_pad|>` are letters, where the hub's template would end the turn or ask for an image.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from mm_models.processors import Conversation, Encoded, Media, Piece, Size, Turn, VideoInfo, read_json
from mm_models.qwen2_5_vl.config import Qwen25VLConfig
from mm_models.qwen2_5_vl.mrope import positions
from mm_models.qwen2_5_vl.pixels import Bounds, ImageProcessor, Way
from mm_models.tokens.head import IGNORED

VERSION = 1  # of what this file does
SYSTEM = "You are a helpful assistant."
VIDEO_BOUNDS = Bounds(128 * 28 * 28, 768 * 28 * 28)  # of a frame, as transformers' video processor has them
# What MindSpeed-MM and LLaMA-Factory do where nothing is said.
NEAREST_BOUNDS = {"image": Bounds(32 * 32, 768 * 768), "video": Bounds(16 * 16, 256 * 256)}
BOX = re.compile(r"\[\s*\d+\s*,\s*\d+\s*(?:,\s*\d+\s*,\s*\d+\s*)?\]")


class Seen(NamedTuple):
    """A picture or a video as the model will see it, known from its header."""

    size: tuple[int, int]
    """Height and width, upright."""
    resized: tuple[int, int]
    grid: tuple[int, int, int]
    frames: tuple[int, ...] = ()
    """Of a video: the numbers of those that are read."""
    seconds: float = 0.0
    """Of a video: from one grid to the next."""
    info: VideoInfo | None = None


class Qwen25VLProcessing:
    """An `mm_data.processing.Processing`, and `mm_models.processors.Processing`. It has no state; threads may share it.

    folder: of the hub, with tokenizer.json and preprocessor_config.json; config.json too, where `config` is None.
    options: `mm_data.chat_options.ChatOptions`.
    ValueError for a folder that lacks a file, or whose tokens are not those of the configuration.
    """

    def __init__(self, folder: Path | str, options: Any, config: Qwen25VLConfig | None = None) -> None:
        self.folder = folder = Path(folder)
        self.options = options
        self.tokenizer = _read_tokenizer(folder)
        processor = read_json(folder, "preprocessor_config.json", "processor_config.json")
        self.images = ImageProcessor.read(processor.get("image_processor") or processor)
        self.config = _read_facts(folder) if config is None else config
        names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad", "endoftext")
        tokens = {name: self._special(folder, name) for name in names}
        self._start, self._end = tokens["im_start"], tokens["im_end"]
        self._vision = tokens["vision_start"], tokens["vision_end"]
        self._pads = {"image": tokens["image_pad"], "video": tokens["video_pad"]}
        self.stop_ids = (tokens["im_end"], tokens["endoftext"])
        self.banned_ids = tuple(self._pads.values())
        self._check(folder)
        self._ways = {kind: self._way(kind) for kind in ("image", "video")}
        self._newline = self._spell("\n")
        self.identity = self._identify(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder, self.options, self.config)  # pickled, a tokenizer forgets what a text is

    # --- what a conversation is

    def measure(self, conversation: Conversation) -> Size:
        """Exactly what `encode` makes of it, from texts and the headers of files alone."""
        seen = [self._look(media) for media in conversation.media]
        ids, trained = self._write(self._turns(conversation), seen)
        frames = [grid[1] * grid[2] for grid in (one.grid for one in seen)]
        return Size(
            tokens=len(ids),
            patches=sum(one.grid[0] * area for one, area in zip(seen, frames, strict=True)),
            label_tokens=sum(trained[1:]),
            squares=sum(one.grid[0] * area**2 for one, area in zip(seen, frames, strict=True)),
        )

    def encode(self, conversation: Conversation) -> Encoded:
        """Its tensors. Media are decoded here, one after the other."""
        seen = [self._look(media) for media in conversation.media]
        ids, trained = self._write(self._turns(conversation), seen)
        return self._tensors(conversation, seen, ids, trained)

    def prompt(self, conversation: Conversation) -> Encoded:
        """All up to where the last answer begins, whether it is there or not; no label."""
        turns, _ = self._part(conversation)
        # Media of the answer are not asked for.
        asked = sum(_is_media(part) for turn in turns for part in turn.parts)
        seen = [self._look(media) for media in conversation.media[:asked]]
        ids, _ = self._write(turns, seen)
        ids = [*ids, self._start, *self._spell("assistant\n")]
        return self._tensors(conversation, seen, ids, [False] * len(ids))

    def read_answer(self, ids: Sequence[int]) -> str:
        """The text up to the first token that ends an answer."""
        stop = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(list(ids[:stop]), skip_special_tokens=True)

    def read_reference(self, conversation: Conversation) -> str | None:
        """The last answer of a conversation as the model should say it; None where it ends with a question."""
        _, answer = self._part(conversation)
        if answer is None:
            return None
        boxed = any(not isinstance(part, str) for part in answer.parts)
        seen = [self._look(media) for media in conversation.media] if boxed else []
        own = sum(map(_is_media, answer.parts))
        content = self._content("", answer, iter(seen[len(seen) - own :]), seen)
        return self.read_answer([token for run, is_vision in content if not is_vision for token in run])

    def scale_back(self, answer: str, conversation: Conversation) -> str:
        """An answer in which every list of two or four whole numbers was scaled to the picture as it is.

        ValueError where there is such a list, and not one picture or video: an answer does not say which one it means.
        """
        if not BOX.search(answer):
            return answer
        if len(conversation.media) != 1:
            raise ValueError(
                f"boxes of an answer cannot be scaled back: the conversation has {len(conversation.media)} images and "
                "videos, and the answer does not say which one they are in"
            )
        seen = self._look(conversation.media[0])
        by = seen.size[1] / seen.resized[1], seen.size[0] / seen.resized[0]

        def scale(found: re.Match) -> str:
            numbers = [int(number) for number in re.findall(r"\d+", found[0])]
            return _write_box([round(number * by[i % 2]) for i, number in enumerate(numbers)])

        return BOX.sub(scale, answer)

    def show(self, conversation: Conversation) -> list[Piece]:
        """The tokens as text, with those that are trained; see `Piece`."""
        seen = [self._look(media) for media in conversation.media]
        ids, trained = self._write(self._turns(conversation), seen)
        pieces: list[Piece] = []
        for (is_pad, flag), run in groupby(
            zip(ids, trained, strict=True), lambda one: (one[0] in self._pads.values(), one[1])
        ):
            run = [token for token, _ in run]
            if is_pad:
                pieces.append(Piece(self.tokenizer.id_to_token(run[0]), flag, len(run)))
                continue
            held: list[int] = []
            for token in run:  # a character may be spelled by several tokens
                held.append(token)
                text = self.tokenizer.decode(held, skip_special_tokens=False)
                if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    pieces.append(Piece(text, flag, 1))
                    held = []
            if held:
                pieces.append(Piece(self.tokenizer.decode(held, skip_special_tokens=False), flag, 1))
        return pieces

    # --- tokens

    def _part(self, conversation: Conversation) -> tuple[Sequence[Turn], Turn | None]:
        """What is asked, and the last answer where there is one."""
        turns = self._turns(conversation)
        if turns and turns[-1].role == "assistant":
            return turns[:-1], turns[-1]
        return turns, None

    def _turns(self, conversation: Conversation) -> Sequence[Turn]:
        """With the usual system prompt where there is none."""
        turns = conversation.turns
        system = SYSTEM if self.options.system is None else self.options.system
        if system and turns and turns[0].role != "system":
            return (_System((system,)), *turns)
        return turns

    def _write(self, turns: Sequence[Turn], seen: Sequence[Seen]) -> tuple[list[int], list[bool]]:
        """All tokens, and whether each is trained to be said."""
        ids: list[int] = []
        trained: list[bool] = []
        media = iter(seen)
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        if self.options.mask_history:
            answers = answers[-1:]
        for number, turn in enumerate(turns):
            answer, asked = number in answers, self.options.train_on_prompt
            # A question is spelled together with its header, as the hub's template has it. An answer is not, for it
            # is said behind the header of a prompt: tokens differ only where it begins with a line break.
            header = f"{turn.role}\n"
            before = "" if turn.role == "assistant" else header
            head = [self._start, *(self._spell(header) if turn.role == "assistant" else [])]
            ids += head
            trained += [asked] * len(head)
            for run, is_vision in self._content(before, turn, media, seen):
                ids += run
                trained += [(answer or asked) and not is_vision] * len(run)
            ids += [self._end, *self._newline]
            trained += [answer or asked] + [(answer and self.options.newline) or asked] * len(self._newline)
        return ids, trained

    def _content(
        self, text: str, turn: Turn, media: Iterator[Seen], seen: Sequence[Seen]
    ) -> Iterator[tuple[list[int], bool]]:
        """(tokens, whether they are of an image or a video), of a turn that begins with `text`."""
        for part in turn.parts:
            if isinstance(part, str):
                text += part
            elif _is_media(part):
                yield self._spell(text), False
                text = ""
                one = next(media)
                pads = math.prod(one.grid) // self.images.merge_size**2
                begin, end = self._vision
                yield [begin, *[self._pads[part.kind]] * pads, end], True
            else:
                one = seen[part.media]
                text += _write_box(part.scale(one.size, one.resized))
        yield self._spell(text), False

    def _spell(self, text: str) -> list[int]:
        """Tokens of a text; what looks like a special token is a text as well."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    # --- pictures and videos

    def _look(self, media: Media) -> Seen:
        """How the model will see it, from its header alone. Raises Unusable."""
        way = self._ways[media.kind].limit(media.max_pixels)
        if media.kind == "image":
            size, frames, seconds, info = media.read_size(), (), 0.0, None
        else:
            info = media.probe()
            size, (frames, seconds) = (info.height, info.width), self._sample(info)
        try:
            resized = self.images.sizes(size, way)[-1][0]
        except ValueError as error:
            raise media.refuse(str(error)) from error
        return Seen(size, resized, self.images.grid(resized, max(1, len(frames))), frames, seconds, info)

    def _sample(self, info: VideoInfo) -> tuple[tuple[int, ...], float]:
        """Which frames of a video are read, and the seconds of a grid: MindSpeed-MM's rule.

        As many as `video_fps` asks for in its time, not more than there are or than `video_max_frames`, evenly from
        the first to the last. Their rate is what was really taken, not what was asked for.
        """
        length = info.num_frames / info.fps
        wanted = max(1, math.floor(length * self.options.video_fps))
        count = min(info.num_frames, self.options.video_max_frames, wanted)
        frames = np.linspace(0, info.num_frames - 1, count).astype(np.int32).tolist()
        return tuple(frames), self.images.temporal_patch_size / (count / length)

    def _pixels(self, media: Media, seen: Seen) -> np.ndarray:
        """N C*T*P*P float32."""
        resize = self.images.resizer(self._ways[media.kind].limit(media.max_pixels))
        if media.kind == "image":
            frames = resize(media.read_image())[None]
        else:
            frames = media.read_frames(seen.info, seen.frames, resize)
        if frames.shape[1:3] != seen.resized:
            raise media.refuse(f"has another size than its header says, {seen.size[0]}x{seen.size[1]}")
        return self.images.patches(frames)

    def _way(self, kind: str) -> Way:
        """The bounds that are asked for, or the usual ones."""
        nearest = self.options.resize == "nearest"
        usual = NEAREST_BOUNDS[kind] if nearest else self.images.bounds if kind == "image" else VIDEO_BOUNDS
        least = getattr(self.options, f"{kind}_min_pixels")
        most = getattr(self.options, f"{kind}_max_pixels")
        least = min(usual.least, most or usual.least) if least is None else least
        most = max(usual.most, least) if most is None else most
        asked = Bounds(least, most)
        return Way(self.images.bounds, asked) if nearest else Way(asked)

    # --- all of it

    def _tensors(
        self, conversation: Conversation, seen: Sequence[Seen], ids: Sequence[int], trained: Sequence[bool]
    ) -> Encoded:
        pixels = [self._pixels(media, one) for media, one in zip(conversation.media, seen, strict=False)]
        width = self.config.patch_dim
        tokens = torch.tensor(ids, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORED)
        following = torch.tensor(trained[1:], dtype=torch.bool)
        labels[:-1][following] = tokens[1:][following]
        grids = np.array([one.grid for one in seen], np.int64).reshape(-1, 3)
        return Encoded(
            input_ids=tokens,
            labels=labels,
            position_ids=positions(tokens, grids, [one.seconds for one in seen], config=self.config),
            pixel_values=torch.from_numpy(np.concatenate([np.empty((0, width), np.float32), *pixels])),
            grid_thw=torch.from_numpy(grids),
        )

    # --- the folder

    def _special(self, folder: Path, name: str) -> int:
        token = f"<|{name}|>"
        number = self.tokenizer.token_to_id(token)
        if number is None:
            raise ValueError(f"{folder}/tokenizer.json has no {token}: this is not the tokenizer of such a model")
        return number

    def _check(self, folder: Path) -> None:
        """ValueError where tokenizer, processor and configuration do not belong together."""
        config, images = self.config, self.images
        for field, said, found in (
            ("image_token", config.image_token, self._pads["image"]),
            ("video_token", config.video_token, self._pads["video"]),
            ("patch_size", config.patch_size, images.patch_size),
            ("temporal_patch_size", config.temporal_patch_size, images.temporal_patch_size),
            ("spatial_merge_size", config.spatial_merge_size, images.merge_size),
        ):
            if said != found:
                raise ValueError(
                    f"{folder}: {field} of the model is {said}, that of its tokenizer and processor {found}: they do "
                    "not belong together"
                )
        tokens = self.tokenizer.get_vocab_size(with_added_tokens=True)
        if tokens > config.vocab_size:
            raise ValueError(
                f"{folder}/tokenizer.json has {tokens} tokens, but the model only {config.vocab_size}: they do not "
                "belong together"
            )

    def _identify(self, folder: Path) -> str:
        """What decides the numbers: files, options, and the decoders of pictures and videos."""
        tokenizer = hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()[:16]
        facts = ("image_token", "video_token", "spatial_merge_size", "tokens_per_second")
        config = {name: getattr(self.config, name) for name in facts}
        decoders = f"Pillow {version('pillow')} PyAV {version('av')}"
        return f"qwen2_5_vl {VERSION} {tokenizer} {self.images} {config} {asdict(self.options)} {decoders}"


class _System(NamedTuple):
    """The turn that is put before others."""

    parts: tuple[str, ...]
    role: str = "system"


def _is_media(part: Any) -> bool:
    return hasattr(part, "kind")


def _write_box(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"


def _read_tokenizer(folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no tokenizer.json: name a folder as it was downloaded from the hub")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise ValueError(f"{path} is no tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # as texts
    return tokenizer


def _read_facts(folder: Path) -> Qwen25VLConfig:
    """What positions and pixels depend on, of config.json; the sizes of the network are left as they are."""
    json = read_json(folder, "config.json")
    vision, text = json.get("vision_config") or {}, json.get("text_config") or {}
    if "tokens_per_second" not in vision:
        raise ValueError(f"{folder}/config.json: vision_config does not say tokens_per_second")
    usual = Qwen25VLConfig()
    names = ("patch_size", "temporal_patch_size", "spatial_merge_size", "tokens_per_second")
    facts = {name: vision[name] for name in names if name in vision}
    tokens = {
        ours: json[f"{ours}_id"] for ours in ("image_token", "video_token") if type(json.get(f"{ours}_id")) is int
    }
    size = json.get("vocab_size", text.get("vocab_size", usual.vocab_size))
    side = facts.get("patch_size", usual.patch_size) * facts.get("spatial_merge_size", usual.spatial_merge_size)
    others = ("vision_start_token", "vision_end_token", "bos_token", "eos_token")
    return Qwen25VLConfig(**facts, **tokens, **dict.fromkeys(others, 0), vocab_size=size, window_size=side)
