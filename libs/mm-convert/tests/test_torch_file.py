"""Files of torch.save: read as torch reads them, written as torch can read them, and never run."""

from __future__ import annotations

import argparse
import datetime
import enum
import io
import pickle
import random
import struct
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_convert.store.records import RecordWriter
from mm_convert.store.torch_file import read_torch_file, write_archive, write_torch_file
from mm_convert.store.unpickle import Opaque
from mm_convert.tensors.views import BITS, Computed, LazyTensor, Rows, Stored, rows


def lazy(shape, dtype="F32", seed=0):
    """A tensor of arbitrary bytes (of a BOOL: zeros and ones), always the same ones."""
    tensor = Computed(dtype, shape, lambda start, stop: b"")
    data = random.Random(seed).randbytes(tensor.nbytes)
    data = bytes(byte % 2 for byte in data) if dtype == "BOOL" else data
    width = tensor.row_bytes
    return Computed(dtype, shape, lambda start, stop: data[start * width : stop * width])


def written(path, contents):
    path.unlink(missing_ok=True)
    write_torch_file(path, contents, lambda done: None)
    return path


def zipped(path, program, prefix="archive", method=zipfile.ZIP_STORED, **records):
    """A file as torch.save writes it, by another writer of zip files."""
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr(f"{prefix}/data.pkl", program)
        for name, data in records.items():
            file.writestr(f"{prefix}/{name.replace('_', '/')}", data)
    return path


def plain(value):
    """With bytes in place of lazy tensors."""
    if isinstance(value, LazyTensor):
        return value.dtype, value.shape, bytes(value.read())
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list) else value


CONTENTS = {
    "model": {
        "matrix": lazy((3, 4)),
        "vector": lazy((5,), "BF16"),
        "number": lazy(()),
        "no rows": lazy((0, 3)),
        "no columns": lazy((3, 0, 2)),
        "convolution": lazy((2, 3, 1, 2, 2), "F16"),
        **{f"of {dtype}": lazy((3, 2), dtype) for dtype in BITS},
    },
    "checkpoint_version": 3.0,
    "iteration": 12_000,
    "numbers": [0, -1, 255, 256, -(2**31), 2**31 - 1, 2**31, -(2**31) - 1, 2**80, -(2**80), 1e300, float("inf")],
    "text": ["", "blocks.0", "ключ 键 \udc80"],
    "others": [None, True, False, [], {}, [[1], [{"a": [2]}]]],
    "nothing": {},
}


# --- what is written


def test_what_was_written_is_read(tmp_path):
    path = written(tmp_path / "model.pt", CONTENTS)
    assert plain(read_torch_file(path)) == plain(CONTENTS)


def test_other_tools_find_the_zip_whole_and_aligned(tmp_path):
    path = written(tmp_path / "model.pt", CONTENTS)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None
        assert file.read("archive/byteorder") == b"little"
        assert file.read("archive/version") == b"3\n"
    assert all(tensor.start % 64 == 0 for tensor in read_torch_file(path)["model"].values())


def test_the_same_contents_are_the_same_bytes(tmp_path):
    first, second = (written(tmp_path / name, CONTENTS).read_bytes() for name in ("a.pt", "b.pt"))
    assert first == second


def test_tied_weights_are_stored_once(tmp_path):
    tied = lazy((100, 100))
    path = written(tmp_path / "model.pt", {"embed": tied, "head": tied, "other": lazy((100, 100), seed=1)})
    assert 80_000 < path.stat().st_size < 90_000
    read = read_torch_file(path)
    assert read["embed"] == read["head"] != read["other"]
    again = written(tmp_path / "again.pt", read)
    assert again.read_bytes() == path.read_bytes()


def test_progress_counts_the_bytes_of_the_tensors(tmp_path):
    done = []
    write_torch_file(tmp_path / "model.pt", CONTENTS, done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in CONTENTS["model"].values())


def test_what_torch_does_not_know_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="F4 tensors cannot be written"):
        write_torch_file(tmp_path / "a.pt", {"a": Stored(tmp_path / "f", 0, "F4", (2,), 1)}, print)
    with pytest.raises(ValueError, match="Namespace"):
        write_torch_file(tmp_path / "b.pt", {"a": argparse.Namespace()}, print)
    write_torch_file(tmp_path / "c.pt", {}, print)
    with pytest.raises(FileExistsError):
        write_torch_file(tmp_path / "c.pt", {}, print)


MEMORY = """
import re, sys
from pathlib import Path
from mm_convert.store.torch_file import read_torch_file, write_archive, write_torch_file
from mm_convert.tensors.views import Stored
source, target = map(Path, sys.argv[1:])
tensor = Stored(source, 0, "BF16", (2**17, 2**10))
write_torch_file(target, {"model": {"w": tensor}}, lambda done: None)
assert read_torch_file(target)["model"]["w"].nbytes == tensor.nbytes
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())  # ru_maxrss has the parent's, too
print(int(peak[1]) // 1024)
"""


def test_writing_takes_no_memory(tmp_path):
    with (tmp_path / "source").open("wb") as file:
        file.truncate(2**28)
    command = [sys.executable, "-c", MEMORY, tmp_path / "source", tmp_path / "target.pt"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    (tmp_path / "target.pt").unlink()
    assert int(result.stdout) < 100, "MiB, of a tensor of 256"


ZEROS = memoryview(bytes(2**26))


class Sparse(io.FileIO):
    """A file that leaves a hole where ZEROS would be written."""

    def write(self, data):
        return self.seek(len(data), io.SEEK_CUR) and len(data) if data is ZEROS else super().write(data)


class Zeros(LazyTensor):
    dtype, shape = "U8", (66, 2**26)  # 4.1 GiB

    def pieces(self, start, stop):
        yield from [ZEROS] * (stop - start)


def test_records_and_offsets_beyond_4_GiB(tmp_path):
    path = tmp_path / "large.pt"
    with Sparse(path, "x") as file:
        write_archive(file, {"large": Zeros(), "after": lazy((4,))}, lambda done: None)
    with zipfile.ZipFile(path) as file:
        large, after = file.getinfo("archive/data/0"), file.getinfo("archive/data/1")
        assert (large.file_size, large.extract_version) == (Zeros().nbytes, 45)
        assert after.header_offset > 2**32
        assert file.read(after) == lazy((4,)).read()
    read = read_torch_file(path)
    assert read["large"].nbytes == Zeros().nbytes
    assert plain(read["after"]) == plain(lazy((4,)))
    if "torch" in sys.modules:
        import torch

        mapped = torch.load(path, mmap=True, weights_only=True)
        assert mapped["large"].shape == (66, 2**26)
        assert bytes(mapped["after"].view(torch.uint8).numpy()) == lazy((4,)).read()


# --- several in one file, as in DCP


def test_only_the_window_is_read(tmp_path):
    path = tmp_path / "two"
    with path.open("xb") as file:
        file.write(b"something else")
        write_archive(file, {"a": lazy((3,))}, lambda done: None)
        middle = file.tell()
        write_archive(file, lazy((2, 2), seed=1), lambda done: None)
        end = file.tell()
    assert plain(read_torch_file(path, 14, middle)) == plain({"a": lazy((3,))})
    assert plain(read_torch_file(path, middle, end)) == plain(lazy((2, 2), seed=1))
    for start, stop in ((14, middle - 1), (14, middle + 1), (13, middle), (15, middle), (14, end), (middle, end + 1)):
        with pytest.raises(ValueError, match="two"):
            read_torch_file(path, start, stop)


# --- what is read from others


class Colour(enum.Enum):
    RED = 1


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_lies_beside_the_weights_becomes_plain_or_opaque(protocol, tmp_path, monkeypatch):
    megatron = types.ModuleType("megatron_enums")
    megatron.Colour = Colour
    monkeypatch.setitem(sys.modules, "megatron_enums", megatron)
    monkeypatch.setattr(Colour, "__module__", "megatron_enums")
    content = {
        "args": argparse.Namespace(lr=0.1, load=Path("/data"), colour=Colour.RED, when=datetime.date(2025, 1, 2)),
        "_extra_state": io.BytesIO(b"state"),
        "words": {1, 2},
        "frozen": frozenset("a"),
        "raw": bytearray(b"\0\xff"),
        "bytes": b"\0\xff",
        "ordered": OrderedDict(b=1, a=2),
        "default": defaultdict(list, a=[1]),
        "count": Counter("aab"),
        "complex": 1j,
        "class": dict,
        "deep": (1, (2, [3, {"a": None}])),
    }
    program = pickle.dumps(content, protocol)
    monkeypatch.delitem(sys.modules, "megatron_enums")
    read = read_torch_file(zipped(tmp_path / "model.pt", program))
    same = ("words", "frozen", "raw", "bytes", "ordered", "default", "deep")
    assert {key: read[key] for key in same} == {key: content[key] for key in same}
    args = read["args"]
    assert isinstance(args, Opaque)
    assert (args.module, args.name, args.state["lr"]) == ("argparse", "Namespace", 0.1)
    assert (args.state["colour"].module, args.state["colour"].args) == ("megatron_enums", (1,))
    assert args.state["load"].args == ("/", "data")
    assert read["_extra_state"].state[0] == b"state"
    assert "megatron_enums" not in sys.modules


def test_members_of_enumerations_by_name_are_opaque(tmp_path):
    """As Python 3.11 began to pickle them; getattr of anything else is refused, see below."""
    program = b"\x80\2c__builtin__\ngetattr\ncmegatron.core.enums\nModelType\nX\3\0\0\0one\x86R."
    member = read_torch_file(zipped(tmp_path / "model.pt", program))
    assert (member.module, member.name) == ("megatron.core.enums", "ModelType.one")


def test_tensors_of_npus_are_read(tmp_path):
    """torch_npu has a function of its own for them, with the storage format as its last argument."""
    storage = b"(X\7\0\0\0storagectorch\nHalfStorage\nX\1\0\0\0" + b"0X\5\0\0\0npu:0K\6tQ"
    call = b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n(" + storage + b"K\0K\2K\3\x86K\3K\1\x86\x89}K\2tR"
    path = zipped(tmp_path / "model.pt", b"\x80\2" + call + b".", data_0=b"0123456789ab")
    assert plain(read_torch_file(path)) == ("F16", (2, 3), b"0123456789ab")


# --- code


class Marker:
    """Pickles as a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def called(name, *args):
    """A pickle that calls module.name, in the opcodes of protocol 2."""
    module, _, function = name.rpartition(".")
    return b"\x80\2c%b\n%b\n" % (module.encode(), function.encode()) + pickle.dumps(args, 2)[2:-1] + b"R."


CODE = ["os.system", "posix.system", "nt.system", "builtins.eval", "builtins.exec", "__builtin__.eval", "builtins.open"]
CODE += ["builtins.__import__", "builtins.getattr", "builtins.setattr", "builtins.compile", "builtins.globals"]
CODE += ["subprocess.Popen", "subprocess.check_output", "sys.exit", "runpy.run_path", "importlib.import_module"]
CODE += [
    "pickle.loads",
    "_pickle.loads",
    "operator.attrgetter",
    "operator.methodcaller",
    "shutil.rmtree",
    "socket.socket",
]
CODE += ["webbrowser.open", "ctypes.CDLL", "code.interact", "pty.spawn", "argparse._os.system", "collections.abc.eval"]
CODE += [
    "functools.reduce",
    "itertools.chain",
    "pathlib.Path.unlink",
    "_io.FileIO",
    "types.FunctionType",
    "__main__.run",
]
CODE += ["mm_convert.store.torch_file.write_torch_file", "copyreg.add_extension", "megatro.core.run", "atorch.load"]


@pytest.mark.parametrize("name", CODE)
def test_code_is_refused_by_name_and_not_run(name, tmp_path):
    victim = tmp_path / "victim"
    path = zipped(tmp_path / "model.pt", called(name, f"touch {victim}"))
    with pytest.raises(ValueError, match="has no place in a checkpoint; nothing of it was run") as error:
        read_torch_file(path)
    assert str(path) in str(error.value)
    assert name.replace("__builtin__", "builtins") in str(error.value)
    assert not victim.exists()


def test_every_way_to_call_is_closed(tmp_path):
    victim = tmp_path / "victim"
    system = b"cos\nsystem\n"
    argument = b"X%b%b" % (len(f"touch {victim}").to_bytes(4, "little"), f"touch {victim}".encode())
    for program in (
        pickle.dumps(Marker(subprocess.call, ["touch", str(victim)]), 4),
        b"\x80\4" + system + argument + b"\x85\x81.",  # NEWOBJ
        b"\x80\4" + system + argument + b"\x85}\x92.",  # NEWOBJ_EX
        b"(" + argument + b"ios\nsystem\n.",  # INST
        b"(" + system + argument + b"o.",  # OBJ
        b"\x80\4\x8c\2os\x8c\6system\x93" + argument + b"\x85R.",  # STACK_GLOBAL
        b"\x80\2\x82\1.",  # EXT1
        b"Pname\n.",  # PERSID
        b"\x80\5\x97.",  # NEXT_BUFFER
        b"\x80\2ccollections\nOrderedDict\n" + argument + b"\x85R.",  # not pairs
    ):
        with pytest.raises(ValueError, match=r"model\.pt"):
            read_torch_file(zipped(tmp_path / "model.pt", program))
        assert not victim.exists()


def test_what_is_named_is_neither_imported_nor_called(tmp_path):
    path = zipped(tmp_path / "model.pt", called("mindspeed.nowhere.run", "rm"))
    read = read_torch_file(path)
    assert (read.module, read.name, read.args) == ("mindspeed.nowhere", "run", ("rm",))
    assert not any(name.startswith("mindspeed") for name in sys.modules)


# --- damage


STORAGE = b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0" + b"0X\3\0\0\0cpuK\6tQ"


def tensor_program(offset=b"K\0", shape=b"K\2K\3\x86", strides=b"K\3K\1\x86", storage=STORAGE, end=b"", last=b""):
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89}" + last + b"tR"
    return b"\x80\2" + call + end + b"."


FLOATS = struct.pack("<6f", *range(6))


def numbers(tensor):
    return list(struct.unpack(f"<{tensor.nbytes // 4}f", tensor.read()))


def test_the_tensor_that_the_following_damage(tmp_path):
    tensor = read_torch_file(zipped(tmp_path / "model.pt", tensor_program(), data_0=FLOATS))
    assert (tensor.shape, numbers(tensor)) == ((2, 3), [0, 1, 2, 3, 4, 5])


HUGE = b"\x8a\x08" + bytes([255] * 7 + [127])
DAMAGED = {
    "beyond the storage": (tensor_program(offset=b"K\1"), "does not fit a storage of 6"),
    "before the storage": (tensor_program(offset=b"J\xff\xff\xff\xff"), "offset -1"),
    "negative side": (tensor_program(shape=b"J\xff\xff\xff\xffK\1\x86"), "shape"),
    "negative stride": (tensor_program(strides=b"J\xff\xff\xff\xffK\1\x86"), "strides"),
    "a true side": (tensor_program(shape=b"\x88K\1\x86"), "shape"),
    "a side of text": (tensor_program(shape=b"X\1\0\0\0aK\1\x86"), "damaged"),
    "fewer strides": (tensor_program(strides=b"K\1\x85"), "strides"),
    "larger than its storage": (tensor_program(shape=HUGE + b"K\1\x86", strides=b"K\0K\1\x86"), "does not fit"),
    "too large": (tensor_program(shape=HUGE + HUGE + b"\x86", strides=b"K\0K\0\x86"), "does not fit"),
    "no neighbours": (tensor_program(shape=b"K\3\x85", strides=b"K\2\x85"), "save its .contiguous"),
    "no such storage": (tensor_program(storage=STORAGE.replace(b"0X", b"7X")), "no storage '7'"),
    "storage of other size": (tensor_program(storage=STORAGE.replace(b"K\6", b"K\7")), "7 elements of float32"),
    "storage of no kind": (tensor_program(storage=STORAGE.replace(b"FloatS", b"QInt8S")), "a tensor of None"),
    "negated": (tensor_program(last=b"}X\3\0\0\0neg\x88s"), "{'neg': True}"),
    "no storage at all": (tensor_program(storage=b"N"), "damaged"),
    "moved elsewhere": (tensor_program(end=b"}X\5\0\0\0startK\0sb"), "changes a Stored"),
    "filled": (tensor_program(end=b"K\0K\0s"), "damaged"),
    "huge memo": (b"\x80\2]r\xff\xff\xff\x7f0h\0.", "damaged"),
    "huge bytes": (b"\x80\5B\xff\xff\xff\x7f.", "damaged"),
    "huge bytearray": (b"\x80\5\x96" + b"\xff" * 5 + b"\0\0\0.", "damaged"),
    "huge bytearray by number": (called("builtins.bytearray", 2**40), "a bytearray of int"),
    "huge frame": (b"\x80\4\x95" + b"\xff" * 6 + b"\0\0.", "damaged"),
    "huge number": (b"\x80\2\x8b\xff\xff\xff\x7f\1.", "damaged"),
    "set of a number": (called("builtins.set", 7), "a set of int"),
    "future protocol": (b"\x80\x63N.", "protocol"),
    "empty": (b"", "damaged"),
    "no end": (b"\x80\2]", "damaged"),
    "no such opcode": (b"\x80\2\xff.", "damaged"),
    "empty stack": (b"\x80\2R.", "damaged"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_pickle_is_a_clear_error(case, tmp_path):
    program, message = DAMAGED[case]
    path = zipped(tmp_path / "model.pt", program, data_0=FLOATS)
    with pytest.raises(ValueError, match=message) as error:
        read_torch_file(path)
    assert str(path) in str(error.value)


def test_other_formats_say_what_to_do(tmp_path):
    old = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
    (tmp_path / "old.pt").write_bytes(old)
    with tarfile.open(tmp_path / "tar.pt", "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    for name in ("old.pt", "tar.pt"):
        with pytest.raises(ValueError, match=rf"{name} has the format of torch before 1.6.*torch.save\(torch.load"):
            read_torch_file(tmp_path / name)
    (tmp_path / "garbage.pt").write_bytes(b"garbage")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("garbage.pt", "empty.pt"):
        with pytest.raises(ValueError, match=f"{name} is not a file of torch.save"):
            read_torch_file(tmp_path / name)


def test_other_zip_files_say_what_they_are(tmp_path):
    program = pickle.dumps({}, 2)
    for message, path in (
        ("is compressed", zipped(tmp_path / "1", program, method=zipfile.ZIP_DEFLATED)),
        ("other byte order", zipped(tmp_path / "2", program, byteorder=b"big")),
        ("without data.pkl", zipped(tmp_path / "4", program, prefix="a/b")),
    ):
        with pytest.raises(ValueError, match=message):
            read_torch_file(path)
    with (tmp_path / "5").open("wb") as file:
        archive = RecordWriter(file)
        archive.write("archive/data.pkl", len(program), [program])
        archive.write("archive/data.pkl", len(program), [program])
        archive.finish()
    with pytest.raises(ValueError, match="not its own"):
        read_torch_file(tmp_path / "5")


def test_records_that_share_bytes_are_refused(tmp_path):
    """The second of them is said to begin where the first does, or in the middle of its bytes."""
    program = pickle.dumps({}, 2)
    whole = zipped(tmp_path / "whole.pt", program, data_0=bytes(200), data_1=bytes(200)).read_bytes()
    with zipfile.ZipFile(tmp_path / "whole.pt") as file:
        first, second = (file.getinfo(f"archive/data/{i}").header_offset for i in (0, 1))
    entry = whole.rindex(b"archive/data/1") - 4  # in the directory; the offset is what comes last before the name
    inside = whole[first : first + 44]  # a header as the first record has it, in its bytes
    for name, offset, data in (
        ("same", first, whole),
        ("inside", first + 60, whole[: first + 60] + inside + whole[first + 104 :]),
    ):
        changed = data[:entry] + struct.pack("<L", offset) + data[entry + 4 :]
        (tmp_path / f"{name}.pt").write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name}\.pt is damaged: .* not its own"):
            read_torch_file(tmp_path / f"{name}.pt")
    assert second > first


def test_a_huge_directory_is_not_read(tmp_path):
    with Sparse(tmp_path / "model.pt", "w") as file:
        for _ in range(4):
            file.write(ZEROS)
        file.write(struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 4 * len(ZEROS), 0, 0))
        file.seek(0)
        file.write(b"PK\3\4")
    with pytest.raises(ValueError, match="directory has 268,435,456 bytes"):
        read_torch_file(tmp_path / "model.pt")


def test_a_huge_pickle_is_not_read(tmp_path):
    with Sparse(tmp_path / "model.pt", "w") as file:
        archive = RecordWriter(file)
        archive.write("archive/data.pkl", 4 * len(ZEROS), [ZEROS] * 4)
        archive.finish()
    with pytest.raises(ValueError, match="268,435,456 bytes where at most"):
        read_torch_file(tmp_path / "model.pt")


SMALL = {"model": {"a": lazy((2, 3)), "b": lazy((4,), "BF16"), "c": lazy((), "F8_E4M3")}, "version": 3.0}


def test_every_truncation_is_noticed(tmp_path):
    whole = written(tmp_path / "whole.pt", SMALL).read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.pt"):
            read_torch_file(tmp_path / "cut.pt")


EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4)


def read_all(value):
    """Also the bytes of the tensors."""
    if isinstance(value, LazyTensor):
        assert len(value.read()) == value.nbytes
    elif isinstance(value, Mapping):
        for item in value.values():
            read_all(item)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS)
def test_any_change_is_read_or_refused(edits, tmp_path):
    whole = tmp_path / "whole.pt"
    data = bytearray(whole.read_bytes() if whole.exists() else written(whole, SMALL).read_bytes())
    for position, byte in edits:
        data[position % len(data)] = byte
    (tmp_path / "changed.pt").write_bytes(data)
    try:
        content = read_torch_file(tmp_path / "changed.pt")
    except ValueError as error:
        named = "changed.pt" in str(error)
    else:
        named = True
        read_all(content)
    assert named


# --- against torch


def same_as_torch(read, theirs, path=""):
    """Every tensor that torch has is here, with the same bytes."""
    import torch

    from mm_convert.tensors.torch import SPELLING

    if isinstance(theirs, torch.Tensor):
        assert isinstance(read, LazyTensor), path
        data = theirs.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        dtype = "C64" if theirs.is_complex() else SPELLING[theirs.dtype]
        assert (read.dtype, read.shape, bytes(read.read())) == (dtype, tuple(theirs.shape), data), path
        if read.height > 1:
            assert read.read(1, read.height) == data[read.row_bytes :], path
    elif isinstance(theirs, Mapping):
        assert list(read) == list(theirs)
        for key in theirs:
            same_as_torch(read[key], theirs[key], f"{path}.{key}")
    elif isinstance(theirs, (list, tuple)):
        assert len(read) == len(theirs)
        for here, there in zip(read, theirs, strict=True):
            same_as_torch(here, there, path)
    elif theirs is None or isinstance(theirs, (int, float, str)):
        assert read == theirs


def test_what_torch_saved_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    from mm_convert.tensors.torch import DTYPES

    torch.manual_seed(0)
    big, marked = torch.randn(10, 8), torch.nn.Parameter(torch.randn(3, 2))
    marked.tensor_model_parallel = True
    linear = torch.nn.Linear(3, 4)
    dtypes = [*DTYPES.values(), torch.complex64]
    content = {
        "model": linear.state_dict(),
        "parameter": linear.weight,
        "marked": marked,
        "optimizer": torch.optim.AdamW([marked]).state_dict(),
        "tied": [big, big, big[3:7], big[3], big[3, 4]],
        "number": torch.tensor(3.5),
        "no rows": torch.empty(0, 3),
        "no columns": torch.empty(3, 0, 2),
        "transposed": big.T,
        "columns": big[:, 2:5],
        "part of transposed": big.T[1:4, 2:],
        "permuted": torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "expanded": big[:1, :2].expand(6, 2),
        "of many": [torch.arange(6).view(3, 2).float().to(dtype) for dtype in dtypes],
        "of many, transposed": [torch.arange(6).view(3, 2).float().to(dtype).T for dtype in dtypes],
        "args": argparse.Namespace(dtype=torch.bfloat16, device=torch.device("cpu"), size=torch.Size([3])),
        "rng_state": [torch.get_rng_state(), random.getstate()],
        "others": [None, True, 2**70, -5, 1.5, "text"],
        "size": torch.Size([2, 3]),
    }
    path = tmp_path / "model.pt"
    torch.save(content, path)
    read = read_torch_file(path)
    same_as_torch(read, content)
    assert read["size"] == (2, 3)
    assert read["args"].state["size"] == (3,)
    assert read["args"].state["dtype"].name == "bfloat16"
    assert read["tied"][0] == read["tied"][1]
    torch.save(big, path)
    same_as_torch(read_torch_file(path), big)


def test_files_without_checksums_are_read(tmp_path):
    torch = pytest.importorskip("torch")
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.arange(6.0)}, tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(computed)
    with zipfile.ZipFile(tmp_path / "model.pt") as file:
        assert file.testzip(), "a checksum is wrong"
    assert numbers(read_torch_file(tmp_path / "model.pt")["w"]) == list(range(6))


def test_random_states_of_numpy_are_opaque(tmp_path):
    torch, numpy = pytest.importorskip("torch"), pytest.importorskip("numpy")
    content = {"np_rng_state": numpy.random.get_state(), "scalar": numpy.float32(2), "weight": torch.ones(2)}
    torch.save(content, tmp_path / "model.pt")
    read = read_torch_file(tmp_path / "model.pt")
    same_as_torch(read["weight"], content["weight"])
    assert read["np_rng_state"][0] == "MT19937"
    assert isinstance(read["np_rng_state"][1], Opaque)
    assert isinstance(read["scalar"], Opaque)


def test_views_without_neighbouring_elements_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    for view in (torch.ones(4, 4)[:, 0], torch.ones(2, 2).expand(9, 2, 2), torch._neg_view(torch.ones(2))):
        torch.save({"w": view}, tmp_path / "model.pt")
        with pytest.raises(ValueError, match=r"model\.pt"):
            read_torch_file(tmp_path / "model.pt")


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_what_was_written(mmap, tmp_path):
    torch = pytest.importorskip("torch")
    tied = lazy((7, 5), seed=1)
    parts = [tied, rows(lazy((9, 5), seed=2), 2, 9), Rows(((tied, 0, 2), (tied, 5, 7)))]
    contents = CONTENTS | {"tied": [tied, tied], "parts": parts}
    path = written(tmp_path / "model.pt", contents)
    theirs = torch.load(path, weights_only=True, mmap=mmap)
    same_as_torch(contents, theirs)
    same_as_torch(read_torch_file(path), theirs)
    assert theirs["tied"][0].data_ptr() == theirs["tied"][1].data_ptr()
    assert theirs["numbers"] == CONTENTS["numbers"]


def test_the_old_format_of_torch_says_what_to_do(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(2)}, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"before 1\.6"):
        read_torch_file(tmp_path / "model.pt")
