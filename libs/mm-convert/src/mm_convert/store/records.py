"""The container of torch.save: a zip file whose records are not compressed, so that tensors lie in it as they are.

Its directory is read by the standard library, and not trusted: every record must lie inside the window of the file that
was given, before the directory and beside the other records. Checksums are not looked at: torch can leave them out
(`torch.serialization.set_crc32_options`), and loads such files. Written as a stream: only the checksum of a record is
filled in after its bytes.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO

_LOCAL = struct.Struct("<4s5H3L2H")  # before the bytes of each record
_ENTRY = struct.Struct("<4s6H3L5H2L")  # one per record in the directory, at the end of the file
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")

_MAX_DIRECTORY = 32 * 2**20  # bytes: 400,000 records
_FULL16, _FULL32 = 0xFFFF, 0xFFFFFFFF  # "look at the 64-bit field"
_ALIGNMENT = 64  # of a record's bytes in the file, as in torch
_DATE = 0x21  # 1980-01-01, the same in every file
_CHECKSUM_AT = 14  # in _LOCAL


@dataclass(frozen=True)
class Record:
    """Bytes [start, start + size) of the file."""

    start: int
    size: int


class _Window:
    """Bytes [start, stop) of a file, as a file that can be read; nothing huge at once."""

    def __init__(self, file: BinaryIO, start: int, stop: int) -> None:
        self.file, self.start, self.size, self.position = file, start, stop - start, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        if position < 0:
            raise OSError(f"byte {position} is before the beginning")
        self.position = position
        return position

    def tell(self) -> int:
        return self.position

    def read(self, count: int = -1) -> bytes:
        left = max(self.size - self.position, 0)
        count = left if count < 0 else min(count, left)
        if count > _MAX_DIRECTORY:
            raise ValueError(f"its directory has {count:,} bytes")
        data = _bytes(self.file, self.start + self.position, count)
        self.position += count
        return data


def read_records(file: BinaryIO, start: int, stop: int) -> dict[str, Record]:
    """The records of the zip that is bytes [start, stop) of a file, in the order of its directory.

    Raises ValueError for a zip that is truncated, compressed, encrypted, or that lies about where its records are.
    """
    length = stop - start
    end = _bytes(file, max(stop - _END.size, start), min(_END.size, length))
    if not end.startswith(b"PK\5\6") or not end.endswith(b"\0\0"):  # the library would look for it further up
        raise ValueError(f"is truncated or damaged: its {length:,} bytes do not end as a zip file")
    try:
        with zipfile.ZipFile(_Window(file, start, stop)) as archive:  # type: ignore[call-overload]
            entries, directory = archive.infolist(), archive.start_dir
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, struct.error) as error:
        raise ValueError(f"is truncated or damaged, {length:,} bytes long: {error}") from error
    if entries and min(entry.header_offset for entry in entries):  # the library would skip what is before
        raise ValueError(f"is damaged: its {length:,} bytes do not begin with its first record")

    records: dict[str, Record] = {}
    limit = directory
    for entry in sorted(entries, key=lambda entry: entry.header_offset, reverse=True):
        if entry.compress_type or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise ValueError(
                f"is compressed or encrypted ({entry.filename!r}), as checkpoints never are (but programs of "
                "TorchScript): load its weights with torch and save them with torch.save"
            )
        magic, *_, name, extra = _LOCAL.unpack(_bytes(file, start + entry.header_offset, _LOCAL.size))
        first = entry.header_offset + _LOCAL.size + name + extra
        if magic != b"PK\3\4" or first + entry.file_size > limit or entry.filename in records:
            raise ValueError(
                f"is damaged: {entry.filename!r} claims bytes {first:,} to {first + entry.file_size:,}, which are not "
                "its own"
            )
        records[entry.filename] = Record(start + first, entry.file_size)
        limit = entry.header_offset
    return {entry.filename: records[entry.filename] for entry in entries}


def read_record(file: BinaryIO, record: Record, limit: int) -> bytes:
    """The bytes of a small record."""
    if record.size > limit:
        raise ValueError(f"has a record of {record.size:,} bytes where at most {limit:,} are sensible")
    return _bytes(file, record.start, record.size)


def _bytes(file: BinaryIO, position: int, count: int) -> bytes:
    file.seek(position)
    data = file.read(count)
    if len(data) != count:
        raise ValueError("became shorter while it was read")
    return data


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
