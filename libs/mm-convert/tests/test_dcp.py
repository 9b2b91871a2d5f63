"""DCP folders: read without torch, from indices written by hand; with torch, against what torch reads and writes."""

from __future__ import annotations

import pickle
import subprocess
import sys
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_convert.store import dcp
from mm_convert.store.dcp import Index, open_dcp, read_dcp, write_dcp
from mm_convert.store.torch_file import read_torch_file, write_archive
from mm_convert.tensors.views import Computed, LazyTensor

# --- folders by hand


class Made(NamedTuple):
    """An object of torch, to be pickled."""

    name: str
    state: Any


class Global(NamedTuple):
    module: str
    name: str


def opcodes(value):
    """A pickle of protocol 2, without its beginning and end."""
    match value:
        case Made(name, state):
            return opcodes(Global("torch.distributed.checkpoint.metadata", name)) + b")\x81" + opcodes(state) + b"b"
        case Global(module, name):
            return b"c%b\n%b\n" % (module.encode(), name.encode())
        case dict():
            return b"}(" + b"".join(opcodes(item) for pair in value.items() for item in pair) + b"u"
        case list():
            return b"](" + b"".join(map(opcodes, value)) + b"e"
        case tuple():
            return b"ctorch\nSize\n((" + b"".join(map(opcodes, value)) + b"ttR"
        case str():
            return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()
        case bool() | None:
            return {True: b"\x88", False: b"\x89", None: b"N"}[value]
        case int():
            return b"J" + value.to_bytes(4, "little", signed=True)


def counting(shape):
    """A tensor of bytes 0, 1, 2, …"""
    width = prod(shape[1:])
    return Computed("U8", shape, lambda start, stop: bytes(n % 256 for n in range(start * width, stop * width)))


def part(shape, offset, sizes):
    """The part of `counting(shape)` that begins at `offset`."""
    data = []
    for n in range(prod(sizes)):
        place = 0
        for i in range(len(sizes)):
            place = place * shape[i] + offset[i] + n // prod(sizes[i + 1 :]) % sizes[i]
        data.append(place % 256)
    width = prod(sizes[1:])
    return Computed("U8", sizes, lambda start, stop: bytes(data[start * width : stop * width]))


class Folder:
    """A DCP folder of one tensor, `w`, that counts; everything in it can be changed before it is written."""

    def __init__(self, path, shape, chunks):
        self.path, self.shape, self.chunks = path, shape, list(chunks)
        self.places = []
        path.mkdir(exist_ok=True)
        with (path / "__0_0.distcp").open("wb") as file:
            for offset, sizes in self.chunks:
                start = file.tell()
                write_archive(file, part(shape, offset, sizes), lambda done: None)
                self.places.append({"relative_path": "__0_0.distcp", "offset": start, "length": file.tell() - start})

    def write(self, dtype="uint8", old=False):
        keys = [Made("MetadataIndex", {"fqn": "w", "offset": offset, "index": 0}) for offset, _ in self.chunks]
        chunks = [Made("ChunkStorageMetadata", {"offsets": a, "sizes": b}) for a, b in self.chunks]
        properties = Made("TensorProperties", (Global("torch", dtype), None, False, None, False))
        if old:
            properties = Made("TensorProperties", {"dtype": Global("torch", dtype)})
        tensor = Made("TensorStorageMetadata", {"properties": properties, "size": self.shape, "chunks": chunks})
        storage = b"}(" + b"".join(
            opcodes(key) + opcodes(Made("_StorageInfo", place)) for key, place in zip(keys, self.places, strict=False)
        )
        index = b"}(" + b"".join(
            (
                opcodes("state_dict_metadata") + opcodes({"w": tensor}),
                opcodes("storage_data") + storage + b"u",
                opcodes("planner_data") + opcodes({"w": ["w"]}),
            )
        )
        program = opcodes(Global("torch.distributed.checkpoint.metadata", "Metadata")) + b")\x81" + index + b"ub"
        (self.path / ".metadata").write_bytes(b"\x80\2" + program + b".")
        return self.path


ROWS = [((0, 0), (2, 3)), ((2, 0), (2, 3))]  # of 4 3


def grid(row_cuts, column_cuts, rest=()):
    """The chunks of a matrix that is cut at these rows and columns."""
    return [
        ((top, left, *(0 for _ in rest)), (bottom - top, right - left, *rest))
        for top, bottom in pairwise(row_cuts)
        for left, right in pairwise(column_cuts)
    ]


CUTS = st.lists(st.integers(1, 6), min_size=1, max_size=5).map(
    lambda sides: [sum(sides[:i]) for i in range(len(sides) + 1)]
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=CUTS, columns=CUTS, rest=st.sampled_from([(), (1,), (2, 3)]), order=st.randoms())
def test_any_grid_of_chunks_is_joined(rows, columns, rest, order, tmp_path):
    chunks = grid(rows, columns, rest)
    order.shuffle(chunks)
    shape = (rows[-1], columns[-1], *rest)
    tensor = read_dcp(Folder(tmp_path / "dcp", shape, chunks).write())["w"]
    assert (tensor.dtype, tensor.shape, tensor.read()) == ("U8", shape, counting(shape).read())
    middle = tensor.height // 2
    assert tensor.read(middle, tensor.height) == counting(shape).read(middle, tensor.height)


def test_chunks_that_are_no_grid_are_joined_too(tmp_path):
    chunks = [((0, 0), (3, 2)), ((0, 2), (1, 3)), ((1, 2), (2, 3)), ((3, 0), (1, 5))]
    assert read_dcp(Folder(tmp_path, (4, 5), chunks).write())["w"].read() == counting((4, 5)).read()


def test_an_index_of_older_torch_is_read(tmp_path):
    assert read_dcp(Folder(tmp_path, (4, 3), ROWS).write(old=True))["w"].read() == counting((4, 3)).read()


def test_numbers_vectors_and_ranks_without_rows(tmp_path):
    for shape, chunks in (
        ((), [((), ())]),
        ((5,), [((3,), (2,)), ((0,), (3,))]),
        ((2, 3), [((0, 0), (1, 3)), ((1, 0), (1, 3)), ((2, 0), (0, 3)), ((2, 0), (0, 3))]),
        ((0, 3), [((0, 0), (0, 3))]),
        ((3, 0), [((0, 0), (3, 0))]),
    ):
        tensor = read_dcp(Folder(tmp_path, shape, chunks).write())["w"]
        assert (tensor.shape, tensor.read()) == (shape, counting(shape).read())


WRONG_CHUNKS = {
    "a gap": ([((0, 0), (1, 3)), ((2, 0), (2, 3))], "do not cover rows 1 to 2 exactly once"),
    "an end": ([((0, 0), (2, 3)), ((2, 0), (1, 3))], "rows 3 to 4"),
    "an overlap": ([((0, 0), (3, 3)), ((2, 0), (2, 3))], "rows 2 to 3"),
    "twice": ([((0, 0), (4, 3)), ((0, 0), (4, 3))], "rows 0 to 4"),
    "beyond": ([((0, 0), (2, 3)), ((2, 0), (3, 3))], "rows 4 to 5"),
    "too narrow": ([((0, 0), (4, 2))], "rows 0 to 4"),
    "too wide": ([((0, 1), (4, 3))], "rows 0 to 4"),
    "a hole": (grid([0, 2, 4], [0, 1, 3])[:3], "rows 2 to 4"),
    "columns twice": ([((0, 0), (4, 2)), ((0, 1), (4, 2))], "rows 0 to 4"),
    "none": ([], "rows 0 to 4"),
}


@pytest.mark.parametrize("case", WRONG_CHUNKS)
def test_chunks_that_do_not_tile_are_refused(case, tmp_path):
    chunks, message = WRONG_CHUNKS[case]
    with pytest.raises(ValueError, match=message) as error:
        read_dcp(Folder(tmp_path, (4, 3), chunks).write())
    assert f"{tmp_path}: w has shape (4, 3)" in str(error.value)


def test_other_cuts_are_refused(tmp_path):
    with pytest.raises(ValueError, match="third side"):
        read_dcp(Folder(tmp_path, (2, 2, 2), [((0, 0, 0), (2, 2, 1)), ((0, 0, 1), (2, 2, 1))]).write())
    with pytest.raises(ValueError, match="a chunk with"):
        read_dcp(Folder(tmp_path, (2, 2), [((0,), (4,))]).write())
    with pytest.raises(ValueError, match="a chunk with"):
        read_dcp(Folder(tmp_path, (2,), [((-1,), (2,))]).write())


WRONG_PLACES = {
    "another folder": ({"relative_path": "../secret"}, "outside its own folder"),
    "an absolute path": ({"relative_path": "/etc/passwd"}, "outside its own folder"),
    "no path": ({"relative_path": None}, "outside its own folder"),
    "its own folder": ({"relative_path": ""}, "outside its own folder"),
    "a negative start": ({"offset": -1}, "outside its own folder"),
    "a missing file": ({"relative_path": "__1_0.distcp"}, "lacks __1_0.distcp"),
    "a folder": ({"relative_path": ".."}, "outside its own folder"),
    "beyond the end": ({"length": 10**6}, "is truncated"),
    "behind the end": ({"offset": 10**6}, "is truncated"),
    "compression": ({"transform_descriptors": ["zstd"]}, "transformed by"),
}


@pytest.mark.parametrize("case", WRONG_PLACES)
def test_places_that_lie_are_refused(case, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret")
    change, message = WRONG_PLACES[case]
    folder = Folder(tmp_path / "dcp", (4, 3), ROWS)
    folder.places[1] |= change
    with pytest.raises(ValueError, match=message) as error:
        read_dcp(folder.write())
    assert str(folder.path) in str(error.value)


def test_chunks_that_are_something_else_are_refused(tmp_path):
    for dtype, message in (("int8", r"should have I8 .* there lies \('U8', \(2, 3\)\)"), ("quint8", "w is quint8")):
        with pytest.raises(ValueError, match=message):
            read_dcp(Folder(tmp_path / "dcp", (4, 3), ROWS).write(dtype))
    folder = Folder(tmp_path / "dcp", (4, 3), [((0, 0), (3, 3)), ((3, 0), (1, 3))])
    folder.places.reverse()
    with pytest.raises(ValueError, match="should have U8"):
        read_dcp(folder.write())
    folder.places.reverse()
    folder.places.pop()
    with pytest.raises(ValueError, match="lies nowhere"):
        read_dcp(folder.write())


def test_an_index_with_code_is_refused_and_not_run(tmp_path):
    folder = Folder(tmp_path, (4, 3), ROWS).write()
    victim = tmp_path / "victim"
    index = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(index[:-1] + b"cos\nsystem\n" + opcodes(f"touch {victim}") + b"\x85R.")
    with pytest.raises(ValueError, match=r"\.metadata names os\.system.*nothing of it was run"):
        read_dcp(folder)
    assert not victim.exists()


def test_what_is_no_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="interrupted"):
        read_dcp(tmp_path)
    for program in (b"", b"garbage", b"\x80\2}.", b"\x80\2" + opcodes(Made("Metadata", {})) + b"."):
        (tmp_path / ".metadata").write_bytes(program)
        with pytest.raises(ValueError, match=r"\.metadata"):
            read_dcp(tmp_path)
    with (tmp_path / ".metadata").open("wb") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ValueError, match="more than any index"):
        read_dcp(tmp_path)


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=3))
def test_any_change_of_the_index_is_read_or_refused(edits, tmp_path):
    folder = tmp_path / "dcp"
    if not folder.exists():
        whole = Folder(folder, (4, 3), ROWS).write()
        (tmp_path / "whole").write_bytes((whole / ".metadata").read_bytes())
    data = bytearray((tmp_path / "whole").read_bytes())
    for position, byte in edits:
        data[position % len(data)] = byte
    (folder / ".metadata").write_bytes(data)
    try:
        tensors = read_dcp(folder)
    except ValueError as error:
        named = str(folder) in str(error)
    else:
        named = all(len(tensor.read()) == tensor.nbytes for tensor in tensors.values())
    assert named


# --- with torch


def lazy(tensor):
    from mm_convert.tensors.torch import lazy

    return lazy(tensor, lambda: tensor, "a tensor")


def eager(tensor):
    from mm_convert.tensors.torch import rows_of

    assert isinstance(tensor, LazyTensor)
    return rows_of(tensor, 0, tensor.height).view(tensor.shape)


def tensors():
    """As different as they may be."""
    import torch

    torch.manual_seed(0)
    return {
        "blocks.0.weight": torch.randn(9, 7),
        "blocks.0.bias": torch.randn(5),
        "patch_embedding.weight": torch.randn(6, 4, 1, 2, 2).bfloat16(),
        "float8": torch.randn(4, 4).to(torch.float8_e4m3fn),
        "number": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "counts": torch.arange(12).view(4, 3),
    }


@pytest.fixture
def small_chunks(monkeypatch):
    """So that small tensors, too, lie in several chunks and files."""
    monkeypatch.setattr(dcp, "_CHUNK_BYTES", 60)
    monkeypatch.setattr(dcp, "_FILE_BYTES", 200)


def test_what_we_write_torch_reads_and_we_read(small_chunks, tmp_path):
    torch = pytest.importorskip("torch")
    from torch.distributed import checkpoint

    whole, done = tensors(), []
    content = {"model": {name: lazy(tensor) for name, tensor in whole.items()}, "iteration": 7, "version": 3.0}
    write_dcp(tmp_path / "dcp", content, done.append)
    assert sum(done) == sum(tensor.nbytes for tensor in content["model"].values())
    assert len(list((tmp_path / "dcp").glob("__0_*.distcp"))) > 1
    target = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in whole.items()},
        "iteration": 0,
        "version": 0.0,
    }
    checkpoint.load(target, checkpoint_id=tmp_path / "dcp", no_dist=True)
    opened = open_dcp(tmp_path / "dcp", "model")
    assert list(opened) == list(whole)
    for name, tensor in whole.items():
        assert opened.meta(name).is_meta
        assert (opened.meta(name).shape, opened.meta(name).dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(opened[name].view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
    with pytest.raises(ValueError, match="dcp holds no ema; it holds model"):
        open_dcp(tmp_path / "dcp", "ema")
    ours = read_dcp(tmp_path / "dcp")
    assert (target["iteration"], target["version"]) == (7, 3.0)
    assert set(ours) == {f"model.{name}" for name in whole}
    for name, tensor in whole.items():
        assert target["model"][name].equal(tensor), name
        assert eager(ours[f"model.{name}"]).equal(tensor), name
    assert Index(tmp_path / "dcp").value("iteration") == 7
    with pytest.raises(ValueError, match="no value step; it has iteration, version"):
        Index(tmp_path / "dcp").value("step")


def test_the_same_contents_are_the_same_bytes(tmp_path):
    pytest.importorskip("torch")
    content = {"model": {name: lazy(tensor) for name, tensor in tensors().items()}}
    for name in ("first", "second"):
        write_dcp(tmp_path / name, content, lambda done: None)
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes()


def test_names_that_would_be_one_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    one = lazy(torch.ones(1))
    with pytest.raises(ValueError, match=r"a / b and a\.b would both be called a\.b"):
        write_dcp(tmp_path / "dcp", {"a": {"b": one}, "a.b": one}, print)
    assert not (tmp_path / "dcp").exists()


def test_torch_turns_our_folder_into_a_file(small_chunks, tmp_path):
    pytest.importorskip("torch")
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    whole = tensors()
    write_dcp(tmp_path / "dcp", {"model": {name: lazy(tensor) for name, tensor in whole.items()}}, lambda done: None)
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "model.pt")
    read = read_torch_file(tmp_path / "model.pt")["model"]
    assert set(read) == set(whole)
    assert all(eager(read[name]).equal(tensor) for name, tensor in whole.items())


def test_four_ranks_load_ours_and_save_what_we_read(small_chunks, tmp_path):
    torch = pytest.importorskip("torch")
    whole = tensors()
    del whole["float8"]  # gloo cannot send it
    torch.save(whole, tmp_path / "whole.pt")
    write_dcp(tmp_path / "ours", {"model": {name: lazy(tensor) for name, tensor in whole.items()}}, lambda done: None)
    script = Path(__file__).with_name("dcp_ranks.py")
    result = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr

    theirs = read_dcp(tmp_path / "theirs")
    assert len(theirs) == 28
    for name, tensor in theirs.items():
        expected = whole[name.removeprefix("model.").partition("/")[0]]
        assert eager(tensor).equal(expected), name
    assert Index(tmp_path / "theirs").value("step") == 7

    block = torch.load(tmp_path / "block.pt")
    sharded = read_dcp(tmp_path / "block")
    assert set(sharded) == {f"model.{name}" for name in block}
    assert all(eager(sharded[f"model.{name}"]).equal(tensor) for name, tensor in block.items())


@pytest.mark.parametrize("rows", [1, 5, 40_000])
def test_the_index_of_a_thousand_ranks_is_read(tmp_path, monkeypatch, rows):
    """An honest index has fewer instructions for each byte than the limit, whatever its size."""
    torch = pytest.importorskip("torch")
    from torch.distributed.checkpoint import metadata as kinds
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    ranks, described, places = 1024, {}, {}
    for name in ("model.a", "model.b"):
        offsets = [torch.Size((rank * rows,)) for rank in range(ranks)]
        chunks = [kinds.ChunkStorageMetadata(offset, torch.Size((rows,))) for offset in offsets]
        size = torch.Size((ranks * rows,))
        described[name] = kinds.TensorStorageMetadata(kinds.TensorProperties(torch.float32), size, chunks)
        for rank, offset in enumerate(offsets):
            places[kinds.MetadataIndex(name, offset, rank)] = _StorageInfo(f"__{rank}_0.distcp", 0, 9)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(kinds.Metadata(described, {}, places)))
    monkeypatch.setattr("mm_convert.store.dcp._MAX_OPCODES", 0)
    assert len(Index(tmp_path).describe("model.b").chunks) == ranks
