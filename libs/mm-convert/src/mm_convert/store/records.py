"""The container of torch.save: a zip file whose records are not compressed, so that tensors lie in it as they are.

Read without trust: every record must lie inside the window of the file that was given. Written as a stream: only the
checksum of a record is filled in after its bytes.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

_LOCAL = struct.Struct("<4s5H3L2H")  # before the bytes of each record
_ENTRY = struct.Struct("<4s6H3L5H2L")  # one per record in the directory, at the end of the file
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")

_MAX_DIRECTORY = 200 * 2**20
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "look at the 64-bit field"
_ALIGNMENT = 64  # of a record's bytes in the file, as in torch
_DATE = 0x21  # 1980-01-01, the same in every file
_CHECKSUM_AT = 14  # in _LOCAL


@dataclass(frozen=True)
class Record:
    """Bytes [start, start + size) of the file."""

    start: int
    size: int


def read_records(file: BinaryIO, start: int, stop: int) -> dict[str, Record]:
    """The records of the zip that is bytes [start, stop) of a file, in the order of its directory.

    Raises ValueError for a zip that is truncated, compressed, encrypted, or that lies about where its records are.
    """

    def read(layout: struct.Struct, position: int, magic: bytes) -> tuple[int, ...]:
        found, *fields = layout.unpack(_bytes(file, start + position, layout.size, start, stop))
        if found != magic:
            raise ValueError(f"is truncated or damaged: byte {position:,} has {found!r} instead of {magic!r}")
        return tuple(fields)

    end = stop - start - _END.size
    *_, count, size, offset, _ = read(_END, end, b"PK\5\6")
    if count == _FULL16 or _FULL32 in (size, offset):
        _, end, _ = read(_LOCATOR64, end - _LOCATOR64.size, b"PK\6\7")
        *_, count, size, offset = read(_END64, end, b"PK\6\6")
    if offset + size > end or size > _MAX_DIRECTORY:
        raise ValueError(f"is damaged: its directory of {size:,} bytes at {offset:,} does not fit before {end:,}")
    directory = _bytes(file, start + offset, size, start, stop)

    records: dict[str, Record] = {}
    position = 0
    for _ in range(count):
        name, place, nbytes, position = _entry(directory, position)
        *_, name_bytes, extra_bytes = read(_LOCAL, place, b"PK\3\4")
        first = place + _LOCAL.size + name_bytes + extra_bytes
        if first + nbytes > offset or name in records:
            raise ValueError(
                f"is damaged: {name!r} claims bytes {first:,} to {first + nbytes:,}, which are not its own"
            )
        records[name] = Record(start + first, nbytes)
    return records


def _entry(directory: bytes, position: int) -> tuple[str, int, int, int]:
    """Name, place, bytes of the record described at `position`, and the position of the next."""
    try:
        fields = _ENTRY.unpack_from(directory, position)
    except struct.error:
        raise ValueError("is damaged: its directory ends too early") from None
    magic, _, _, flags, method, _, _, _, packed, size, names, extras, comments, _, _, _, place = fields
    begin = position + _ENTRY.size
    name = directory[begin : begin + names].decode(errors="replace")
    extra = directory[begin + names : begin + names + extras]
    numbers = [size, packed, place]
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            full = [i for i, number in enumerate(numbers) if number == _FULL32]
            if length < 8 * len(full) or len(extra) < 4 + length:
                raise ValueError(f"is damaged: {name!r} has no 64-bit size")
            for i, number in zip(full, struct.unpack_from(f"<{len(full)}Q", extra, 4), strict=True):
                numbers[i] = number
        extra = extra[4 + length :]
    size, packed, place = numbers
    if magic != b"PK\1\2":
        raise ValueError(f"is damaged: its directory has {magic!r} at {position:,}")
    if method or packed != size or flags & 1:
        raise ValueError(
            f"is compressed or encrypted ({name!r}), as checkpoints never are (but programs of TorchScript): "
            "load its weights with torch and save them with torch.save"
        )
    return name, place, size, begin + names + extras + comments


def _bytes(file: BinaryIO, position: int, count: int, start: int, stop: int) -> bytes:
    if not start <= position <= position + count <= stop:
        raise ValueError(f"is truncated or damaged: {stop - start:,} bytes, but something at {position - start:,}")
    file.seek(position)
    data = file.read(count)
    if len(data) != count:
        raise ValueError("became shorter while it was read")
    return data


def read_record(file: BinaryIO, record: Record, limit: int) -> bytes:
    """The bytes of a small record."""
    if record.size > limit:
        raise ValueError(f"has a record of {record.size:,} bytes where at most {limit:,} are sensible")
    return _bytes(file, record.start, record.size, record.start, record.start + record.size)


class RecordWriter:
    """Appends a zip to a file, which may hold something before it. `finish` writes the directory."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.start = file.tell()
        self.directory: list[bytes] = []

    def write(self, name: str, size: int, chunks: Iterable[bytes | memoryview]) -> None:
        """Append a record of `size` bytes."""
        raw, place = name.encode(), self.file.tell()
        large = size >= _FULL32
        short = _FULL32 if large else size
        extra = struct.pack("<2H2Q", 1, 16, size, size) if large else b""
        padding = -(place + _LOCAL.size + len(raw) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<2H", 0x4246, padding) + b"Z" * padding
        version = 45 if large else 20
        self.file.write(
            _LOCAL.pack(b"PK\3\4", version, 0, 0, 0, _DATE, 0, short, short, len(raw), len(extra)) + raw + extra
        )
        checksum = written = 0
        for chunk in chunks:
            checksum = zlib.crc32(chunk, checksum)
            written += len(chunk)
            self.file.write(chunk)
        assert written == size, f"{name} has {written} bytes instead of {size}"
        end = self.file.tell()
        self.file.seek(place + _CHECKSUM_AT)
        self.file.write(checksum.to_bytes(4, "little"))
        self.file.seek(end)

        offset = place - self.start
        wide = [number for number in (size, size, offset) if number >= _FULL32]
        extra = struct.pack(f"<2H{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
        version = 45 if wide else 20
        sizes = (checksum, short, short, len(raw), len(extra))
        entry = _ENTRY.pack(b"PK\1\2", version, version, 0, 0, 0, _DATE, *sizes, 0, 0, 0, 0, min(offset, _FULL32))
        self.directory.append(entry + raw + extra)

    def finish(self) -> None:
        directory, count = b"".join(self.directory), len(self.directory)
        offset = self.file.tell() - self.start
        end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, len(directory), offset)
        locator = _LOCATOR64.pack(b"PK\6\7", 0, offset + len(directory), 1)
        count = min(count, _FULL16)
        end = _END.pack(b"PK\5\6", 0, 0, count, count, min(len(directory), _FULL32), min(offset, _FULL32), 0)
        self.file.write(directory + end64 + locator + end)
