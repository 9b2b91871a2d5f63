"""An item of a list as a conversation, whichever of the usual formats it has.

    LLaVA      {"id": …, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
               {"from": "gpt", "value": "A cat."}]}; several: "image" is a list; "video"
    ShareGPT   the same with lists "images" and "videos", and "system"
    messages   {"messages": [{"role": "user", "content": "<image>What is it?"}, …], "images": […], "videos": […]}, as in
               MindSpeed-MM's guide, ms-swift and LLaMA-Factory
    OpenAI     messages whose content is a list of parts: {"type": "text", "text"}, {"type": "image_url", "image_url":
               {"url": "file:///…" or "data:image/png;base64,…"}}; as in Hugging Face's {"type": "image", "image":
               "a.jpg"}, "video"; and {"type": "image"} alone, for the next of "images"

Two names of a key mean the same everywhere, so mixtures of these formats are read as well. In a text <image> and
<video> are the places of media, as many as there are media; in lists of parts they are text. Texts are taken as they
are, with the white space around them.

`objects` are those of ms-swift: {"ref": names for <ref-object>, "bbox": boxes for <bbox>, "bbox_type": "real" (pixels
of the picture, the default) or "norm1" (0 to 1), "image_id": the number of each box's picture, all 0 by default}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote, urlsplit

from mm_data.conversations.boxes import Objects, split_answers
from mm_data.conversations.conversation import Box, Media, Turn, Unusable
from mm_data.files import shorten, show

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
_TOOLS = ("tool", "tool_call", "tool_calls", "tool_response", "function", "function_call", "observation")
_MARKS = re.compile("<(image|video|ref-object|bbox)>")
_KINDS = ("image", "video")
_LISTS = ("messages", "conversations", "conversation")
# What would change the training if it were left out without a word:
_OF_ITEMS = {"audio", "audios", "chosen", "rejected", "rejected_response", "rejected_messages", "history"}
_OF_TURNS = ("image", "images", "video", "videos", "audio", "audios")
_OF_PARTS = ("type", "image", "image_url", "video", "video_url", "url", "path", "max_pixels", "detail", "text")


@dataclass(frozen=True)
class Tags:
    """Names of keys and roles that differ from the usual ones, as MindSpeed-MM's data JSON may give them."""

    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    images: str | None = None
    videos: str | None = None
    system: str | None = None
    user: str = "user"
    assistant: str = "assistant"
    system_role: str = "system"

    def rename(self, record: Any) -> Any:
        """The item under the usual names."""
        if not isinstance(record, dict) or not isinstance(turns := record.get(self.messages), list):
            return record
        roles = {self.user: "user", self.assistant: "assistant", self.system_role: "system"}

        def turn(said: Any) -> Any:
            if not isinstance(said, dict):
                return said
            role = said.get(self.role)
            return {"role": roles.get(role, role) if isinstance(role, str) else role, "content": said.get(self.content)}

        own = (self.messages, self.images, self.videos, self.system)
        renamed = {key: value for key, value in record.items() if key not in own} | {"messages": list(map(turn, turns))}
        for key, name in (("images", self.images), ("videos", self.videos), ("system", self.system)):
            if name is not None and name in record:
                renamed[key] = record[name]
        return renamed


def read_turns(
    record: Any, find: Callable[[str], str], *, parse_boxes: bool = False, answered: bool = True
) -> tuple[Turn, ...]:
    """The turns of an item. Raises Unusable.

    find: the path of a medium by what an item calls it.
    parse_boxes: `bbox_2d` and `point_2d` in answers are boxes, in pixels of the last picture before them.
    answered: the last turn must be an answer.
    """
    if not isinstance(record, dict):
        raise Unusable("unknown_format", f"an item is {show(record)}, not an object with messages or conversations")
    if record.get("tools") not in (None, "", [], "[]"):
        raise Unusable("tools", f"it has tools, {show(record['tools'])}: calls of tools are not trained")
    if unread := [key for key in record.keys() & _OF_ITEMS if record[key] not in (None, "", [])]:
        raise Unusable("unknown_format", f"it has {', '.join(unread)}, which cannot be read here")
    turns = _Reading(record, find).read_turns(_list_turns(record))
    _check_order(turns, answered)
    return split_answers(turns) if parse_boxes else turns


def _list_turns(record: dict) -> list:
    there = [key for key in _LISTS if record.get(key) is not None]
    if len(there) != 1:
        keys = ", ".join(map(shorten, list(record)[:10])) or "nothing"
        has = "both " + " and ".join(there) if there else f"neither messages nor conversations, but {keys}"
        raise Unusable("unknown_format", f"it has {has}")
    turns = record[there[0]]
    if not isinstance(turns, list) or not turns:
        raise Unusable("unknown_format", f"{there[0]} is {show(turns)}, not a list of turns")
    system = record.get("system")
    return turns if system in (None, "") else [{"role": "system", "content": system}, *turns]


class _Reading:
    """An item while its turns are read, from the first to the last: what of it was used up."""

    def __init__(self, record: dict, find: Callable[[str], str]):
        self.find = find
        self.listed = {kind: _list_media(record, kind) for kind in _KINDS}
        self.marks = dict.fromkeys(_KINDS, 0)
        self.objects = Objects(record.get("objects"))

    def read_turns(self, turns: Sequence[Any]) -> tuple[Turn, ...]:
        read = tuple(self.read_turn(turn, f"turn {number}") for number, turn in enumerate(turns))
        for kind, listed in self.listed.items():
            if len(listed) != self.marks[kind]:
                raise Unusable("marks", f"<{kind}> is there {self.marks[kind]} times, for {len(listed)} {kind}s")
        placed = self.objects.place(read)
        for number, turn in enumerate(placed):
            if not turn.parts:
                raise Unusable("empty_turn", f"turn {number} ({turn.role}) is empty")
            if turn.role != "user" and any(isinstance(part, Media) for part in turn.parts):
                raise Unusable("marks", f"turn {number} ({turn.role}) has media: only what the user says may have them")
        return placed

    def read_turn(self, turn: Any, where: str) -> Turn:
        role, content = _role_and_content(turn, where)
        if isinstance(content, str):
            parts = _join(self.read_text(content) if "<" in content else iter([content]), where)
        elif isinstance(content, list):
            parts = _join((piece for part in content for piece in self.read_part(part, where)), where)
        elif content is None:
            parts = ()
        else:
            raise Unusable("unknown_format", f"the content of {where} is {show(content)}: a text or a list of parts")
        return Turn(role, parts)

    def read_text(self, text: str) -> Iterator[str | Media | Box]:
        for number, piece in enumerate(_MARKS.split(text)):
            if number % 2 == 0:
                yield piece
            elif piece in _KINDS:
                yield from self.take(piece)
            else:
                yield from self.objects.take(piece)

    def read_part(self, part: Any, where: str) -> Iterator[str | Media]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield part["text"]
            return
        if kind not in ("image", "video", "image_url", "video_url"):
            raise Unusable("unknown_format", f"a part of {where} is {show(part)}: text, image_url, image or video")
        if odd := [shorten(key) for key in part if key not in _OF_PARTS]:
            raise Unusable("unknown_format", f"a part of {where} has {', '.join(odd)}, which cannot be read here")
        given = [part[key] for key in dict.fromkeys((kind, "url", "path")) if part.get(key) is not None]
        most = part.get("max_pixels")
        if len(given) > 1 or (most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1)):
            raise Unusable("unknown_format", f"a part of {where} is {show(part)}: one path, max_pixels from 1 on")
        kind = kind.removesuffix("_url")
        if given:
            yield Media(kind, _find_medium(given[0], kind, self.find), most)
        else:
            yield from self.take(kind, most)

    def take(self, kind: str, max_pixels: int | None = None) -> Iterator[Media]:
        """The next of those that the item lists; nothing where there is none left."""
        self.marks[kind] += 1
        for given in self.listed[kind][self.marks[kind] - 1 : self.marks[kind]]:
            yield Media(kind, _find_medium(given, kind, self.find), max_pixels)


def _list_media(record: dict, kind: str) -> list:
    there = [key for key in (kind, f"{kind}s") if record.get(key) not in (None, "", [])]
    if len(there) > 1:
        raise Unusable("unknown_format", f"it has both {there[0]} and {there[1]}: keep one of them")
    found = record[there[0]] if there else []
    return found if isinstance(found, list) else [found]


def _role_and_content(turn: Any, where: str) -> tuple[Any, Any]:
    if not isinstance(turn, dict):
        raise Unusable("unknown_format", f"{where} is {show(turn)}, not an object with role and content")
    role = turn["role"] if "role" in turn else turn.get("from")
    content = turn["content"] if "content" in turn else turn.get("value")
    if len(turn) == 2 and isinstance(role, str) and role in ROLES:  # of nearly all
        return ROLES[role], content
    if not isinstance(role, str):
        raise Unusable("unknown_format", f"{where} has no role (nor from): its keys are {show(list(turn))}")
    if role.lower() in _TOOLS or turn.get("tool_calls") or turn.get("function_call"):
        raise Unusable("tools", f"{where} ({shorten(role)}) calls a tool, or is what one returned: that is not trained")
    if role.lower() not in ROLES:
        raise Unusable("roles", f"{where} has the role {show(role)}: there are {', '.join(ROLES)}")
    if unread := [key for key in _OF_TURNS if turn.get(key) not in (None, "", [])]:
        raise Unusable(
            "unknown_format", f"{where} has {', '.join(unread)}: media belong to the item, or to a list of parts"
        )
    for key in ("loss", "weight"):
        if turn.get(key) not in (None, True, 1):
            raise Unusable("unknown_format", f"{where} has {key} {show(turn[key])}: all answers are trained alike")
    return ROLES[role.lower()], content


def _join(pieces: Iterator[str | Media | Box], where: str) -> tuple[str | Media | Box, ...]:
    """Parts of which no text is empty and no two follow one another."""
    parts: list[str | Media | Box] = []
    for piece in pieces:
        if isinstance(piece, str) and parts and isinstance(parts[-1], str):
            parts[-1] += piece
        elif piece != "":
            parts.append(piece)
    for part in parts:
        if isinstance(part, str) and not part.isascii():
            try:
                part.encode()
            except UnicodeEncodeError as error:  # JSON can say "\ud83d", of which no tokenizer makes anything
                raise Unusable("broken_json", f"{where} holds half a character (a lone surrogate)") from error
    return tuple(parts)


def _find_medium(given: Any, kind: str, find: Callable[[str], str]) -> str:
    if isinstance(given, dict):  # of OpenAI, and of Hugging Face's data sets
        given = given.get("url", given.get("path")) if given.get("bytes") is None else given
    if not isinstance(given, str) or not given:
        more = ": a list of frames is no video here" if isinstance(given, list) and kind == "video" else ""
        raise Unusable("unknown_format", f"{kind} is {show(given)}, not a path{more}")
    if given.startswith("data:"):
        if kind != "image":
            raise Unusable("unknown_format", f"{kind} is {shorten(given, 40)}: only images may be data: URLs")
        return given
    if "://" not in given:
        return find(given)
    try:
        url = urlsplit(given)
    except ValueError:
        url = urlsplit("")
    if url.scheme != "file":
        raise Unusable(
            "remote_media", f"{kind} {shorten(given)} is not on this machine: download it, and name the file"
        )
    if url.netloc not in ("", "localhost") or not url.path:
        raise Unusable("remote_media", f"{kind} {shorten(given)} names a host: write file:///path")
    return unquote(url.path)


def _check_order(turns: Sequence[Turn], answered: bool) -> None:
    """Unusable unless questions and answers alternate; before every question there may be one system turn."""
    wanted, before = "user", None
    for number, turn in enumerate(turns):
        if turn.role == "system" and wanted == "user" and before != "system":
            before = "system"
            continue
        if turn.role != wanted:
            after = f" after {before}" if before else ""
            raise Unusable("roles", f"turn {number} is of {turn.role}{after}: {wanted} must speak")
        before, wanted = turn.role, "assistant" if wanted == "user" else "user"
    if before == "system" or (answered and before != "assistant"):
        raise Unusable("roles", f"the last turn is of {before}: nothing answers it")
