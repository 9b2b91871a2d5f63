"""Pickles, read without importing or running anything that they name.

A pickle is a program: it names functions and has them called. Here a name is never looked up. The few that make plain
data (dictionaries, sets, tensors) are built by functions of our own; those of packages that write checkpoints become
inert `Opaque` objects; every other is refused.
"""

from __future__ import annotations

import gc
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# Objects of these packages lie beside the weights in training checkpoints: arguments, random states, optimizers.
_PACKAGES = {"torch", "torch_npu", "numpy", "transformers", "diffusers", "peft", "accelerate", "deepspeed", "apex"}
_PACKAGES |= {"transformer_engine", "pytorch_lightning", "lightning", "lightning_fabric", "omegaconf", "opensora"}
_PACKAGE_STARTS = ("megatron", "mindspeed")
_CLASSES = {"argparse.Namespace", "types.SimpleNamespace", "functools.partial", "_io.BytesIO", "copyreg._reconstructor"}
_CLASSES |= {f"collections.{name}" for name in ("deque", "Counter")}
_CLASSES |= {f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")}
_CLASSES |= {f"pathlib.{name}" for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")}
_CLASSES |= {f"builtins.{name}" for name in ("bool", "bytes", "complex", "dict", "float", "int", "list", "object")}
_CLASSES |= {f"builtins.{name}" for name in ("range", "slice", "str", "tuple", "Ellipsis")}
MAX_OPCODES = 5_000_000  # a tensor has some 40
_MAX_KEY = 64  # values in a key
_OLD_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # of Python 2, which protocol 2 writes


class Refused(ValueError):
    """The pickle names what no checkpoint needs."""


class Flood(ValueError):
    """The pickle is small, but what it asks for is not."""


@dataclass(eq=False, repr=False, slots=True)  # an index has millions of them
class Opaque:
    """A class or function that a pickle names, or, if it has `args`, an object made by it. Neither was imported.

    `state` is what the object was to be filled with; `items` what was to be put into it, for a mapping its pairs.
    """

    module: str
    name: str
    args: tuple[Any, ...] | None = None
    state: Any = None
    items: list[Any] | None = None

    def __call__(self, *args: Any) -> Opaque:
        return Opaque(self.module, self.name, args)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))

    def append(self, item: Any) -> None:
        self.items = [] if self.items is None else self.items
        self.items.append(item)

    add = append

    def __repr__(self) -> str:
        return f"<{self.module}.{self.name}>"


Builders = Mapping[str, Callable[..., Any]]


def unpickle(
    data: bytes,
    where: str,
    builders: Builders,
    load: Callable[[Any], Any] | None = None,
    limit: int = MAX_OPCODES,
) -> Any:
    """What a pickle holds.

    Args:
        where: stands in messages.
        builders: "module.name" -> what is called in place of it.
        load: turns a persistent id, by which torch refers to storages, into an object.
        limit: instructions; one byte can ask for a hundred bytes of memory.

    Raises ValueError for a pickle that is damaged, that names code, or that would take more time or memory than what
    it can hold is worth.
    """
    try:
        with _without_collector():
            return _Unpickler(data, where, {**_BUILDERS, **builders}, load, limit).load()
    except Refused:
        raise
    except Flood as error:
        raise ValueError(f"{where} is no honest checkpoint: {error}") from error
    except Exception as error:  # a damaged program can fail in any way
        raise ValueError(f"{where} is damaged: its pickle cannot be read ({type(error).__name__}: {error})") from error


@contextmanager
def _without_collector() -> Iterator[None]:
    """It would look through all that has been made again and again: half of the time of a large index."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes are encoded as {encoding!r}")
    return text.encode("latin1")


def _bytearray(data: bytes | str = b"", encoding: str = "latin-1") -> bytearray:
    if not isinstance(data, (bytes, str)):  # a number would ask for so many bytes
        raise ValueError(f"a bytearray of {type(data).__name__}")
    return bytearray(data if isinstance(data, bytes) else data.encode("latin-1"))


def _from_list(kind: Callable[[Any], Any]) -> Callable[..., Any]:
    def build(values: list[Any] | tuple[Any, ...] = ()) -> Any:
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"a set of {type(values).__name__}")
        return kind(map(_check_key, values))

    return build


def _ordered(pairs: list[Any] | tuple[Any, ...] = ()) -> OrderedDict[Any, Any]:
    if not isinstance(pairs, (list, tuple)):
        raise ValueError(f"a dictionary of {type(pairs).__name__}")
    return OrderedDict((_check_key(key), value) for key, value in pairs)


def _check_key(key: Any) -> Any:
    """What can be a key, or in a set: looking it up takes a moment.

    A tuple of two tuples of two tuples, … takes twice as long for each level, though it is hardly larger in the file;
    a number of many digits as long as it is, each time.
    """
    inside = [key]
    for count, part in enumerate(inside):  # grows on the way
        if count >= _MAX_KEY or (isinstance(part, int) and part.bit_length() > 64):
            raise Flood("it has keys of huge numbers, or of tuples in tuples")
        if isinstance(part, tuple):
            inside += part[:_MAX_KEY]
    return key


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered,
    "collections.defaultdict": lambda *factory: {},
    "builtins.set": _from_list(set),
    "builtins.frozenset": _from_list(frozenset),
    "builtins.bytearray": _bytearray,
    "_codecs.encode": _encode,
    "torch.Size": tuple,
}


class _Limited(dict[int, Callable[..., None]]):
    """What reads each opcode, for so many of them."""

    def __init__(self, limit: int) -> None:
        super().__init__(_DISPATCH)
        self.limit = self.left = limit

    def __getitem__(self, code: int) -> Callable[..., None]:
        self.left -= 1
        if self.left < 0:
            raise Flood(f"its pickle has more than {self.limit:,} instructions")
        return super().__getitem__(code)


# Without the opcodes that make objects in ways of their own.
_CLOSED = (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.INST, pickle.OBJ, pickle.NEXT_BUFFER)
_DISPATCH = {code: read for code, read in pickle._Unpickler.dispatch.items() if bytes([code]) not in _CLOSED}


class _Unpickler(pickle._Unpickler):  # the one in Python: the one in C gives way to huge memory on request
    def __init__(
        self,
        data: bytes,
        where: str,
        builders: Builders,
        load_persistent: Callable[[Any], Any] | None,
        limit: int,
    ) -> None:
        super().__init__(io.BytesIO(data))
        self.where, self.load_persistent = where, load_persistent
        self.builders = {**builders, "builtins.getattr": self.attribute}
        self.dispatch = _Limited(limit)

    def find_class(self, module: str, name: str) -> Any:
        module = _OLD_NAMES.get(module, module)
        full, package = f"{module}.{name}", module.partition(".")[0]
        if full in self.builders:
            return self.builders[full]
        if full in _CLASSES or package in _PACKAGES or package.startswith(_PACKAGE_STARTS):
            return Opaque(module, name)
        raise self.refused(full)

    def refused(self, name: str) -> Refused:
        return Refused(
            f"{self.where} names {name}, which has no place in a checkpoint; nothing of it was run. If you trust the "
            "file, load it with torch where it can do no harm, and save the weights alone: torch.save(weights, path)"
        )

    def attribute(self, *args: Any) -> Opaque:
        """A member of an enumeration, as Python 3.11 began to pickle it: as a name of a name. Nothing else."""
        match args:
            case (Opaque(module=module, name=owner, args=None), str(name)):
                return Opaque(module, f"{owner}.{name}", ())
        raise self.refused("builtins.getattr")

    def persistent_load(self, pid: Any) -> Any:
        if self.load_persistent is None:
            raise ValueError("it refers to storages, which only files of torch.save have")
        return self.load_persistent(pid)

    def load_build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], dict):  # an OrderedDict may have attributes, which say nothing
            raise ValueError(f"it changes a {type(self.stack[-1]).__name__}")

    def load_newobj(self) -> None:
        args = self.stack.pop()
        self.stack.append(self.stack.pop()(*args))

    def load_newobj_ex(self) -> None:
        named, args = self.stack.pop(), self.stack.pop()
        self.stack.append(self.stack.pop()(*args, *named.items()))

    def load_bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self.stack.append(bytearray(self.read(size)))

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({_check_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_check_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][_check_key(key)] = value

    def load_additems(self) -> None:
        for item in self.pop_mark():
            self.stack[-1].add(_check_key(item))

    def load_frozenset(self) -> None:
        items = self.pop_mark()  # which changes what `append` is
        self.append(frozenset(map(_check_key, items)))


_DISPATCH |= {
    pickle.BUILD[0]: _Unpickler.load_build,
    pickle.NEWOBJ[0]: _Unpickler.load_newobj,
    pickle.NEWOBJ_EX[0]: _Unpickler.load_newobj_ex,
    pickle.BYTEARRAY8[0]: _Unpickler.load_bytearray8,
    pickle.DICT[0]: _Unpickler.load_dict,
    pickle.SETITEM[0]: _Unpickler.load_setitem,
    pickle.SETITEMS[0]: _Unpickler.load_setitems,
    pickle.ADDITEMS[0]: _Unpickler.load_additems,
    pickle.FROZENSET[0]: _Unpickler.load_frozenset,
}
