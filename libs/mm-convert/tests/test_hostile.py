"""Files that lie: each is a clear error, none is read beyond its end or outside its folder."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mm_convert import open_checkpoint
from mm_convert.store.safetensors import read_file


def file_of(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def tensor(start, end, shape=None, dtype="U8"):
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


BROKEN = {
    "short": (b"", b"", "truncated or not a safetensors file"),
    "overlap": ({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6), "the data of b overlaps"),
    "same bytes twice": ({"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4), "overlaps"),
    "gap": ({"a": tensor(0, 4), "b": tensor(6, 8)}, bytes(8), "leaves a gap"),
    "beyond the end": ({"a": tensor(0, 400)}, bytes(4), "is truncated"),
    "before the start": ({"a": tensor(-4, 4, [8])}, bytes(4), "offsets -4, 4"),
    "backwards": ({"a": tensor(4, 0, [4])}, bytes(4), "offsets 4, 0"),
    "surplus": ({"a": tensor(0, 4)}, bytes(5), "bytes that belong to no tensor"),
    "wrong size": ({"a": tensor(0, 4, [3], "F32")}, bytes(4), "12 bytes, but its offsets span 4"),
    "negative side": ({"a": tensor(0, 4, [-4])}, bytes(4), "shape"),
    "float side": ({"a": tensor(0, 4, [4.0])}, bytes(4), "shape"),
    "true side": ({"a": tensor(0, 1, [True])}, bytes(1), "shape"),
    "no shape": ({"a": {"dtype": "U8", "data_offsets": [0, 4]}}, bytes(4), "header"),
    "three offsets": ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, bytes(4), "header"),
    "no object": ([1, 2], b"", "header"),
    "no JSON": (b"{not json", b"", "header"),
    "no UTF-8": (b'{"\xff": 1}', b"", "header"),
    "twice": (b'{"a": {}, "a": {}}', b"", "a stands in it twice"),
    "deep": (b"[" * 200_000, b"", "header"),
    "long number": (b'{"a": ' + b"9" * 10_000 + b"}", b"", "header"),
    "metadata": ({"__metadata__": {"a": 1}}, b"", "something else than text"),
    "metadata list": ({"__metadata__": ["a"]}, b"", "header"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_clear_errors(case, tmp_path):
    header, data, message = BROKEN[case]
    path = tmp_path / "model.safetensors"
    if case == "short":
        path.write_bytes(b"\x01\x00")
    else:
        file_of(path, header, data)
    with pytest.raises(ValueError, match=message) as error:
        read_file(path)
    assert "model.safetensors" in str(error.value)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 100])
def test_a_header_longer_than_the_file_is_not_read(length, tmp_path):
    with pytest.raises(ValueError, match="promises a header of"):
        read_file(file_of(tmp_path / "model.safetensors", {"a": tensor(0, 4)}, bytes(4), length=length))


def test_every_truncation_is_noticed(toys, tmp_path):
    toys.write_safetensors(tmp_path / "whole", {"a": (3,), "b": (2, 2)})
    whole = (tmp_path / "whole").read_bytes()
    read_file(tmp_path / "whole")
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cut"):
            read_file(tmp_path / "cut")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_change_of_the_header_is_read_or_refused(edits, tmp_path):
    header = {"a": tensor(0, 12, [3], "F32"), "b": tensor(12, 20, [2, 2], "BF16")}
    data = bytearray(file_of(tmp_path / "f", header, bytes(20)).read_bytes())
    for position, byte in edits:
        data[position % (len(data) - 20)] = byte
    (tmp_path / "f").write_bytes(data)
    try:
        entries, _ = read_file(tmp_path / "f")
    except ValueError:
        return
    assert all(8 <= t.start <= t.start + t.nbytes <= len(data) for t in entries.values())


# --- indices


def index_of(folder, weight_map):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "sub/f.safetensors", "..", "", 3, "a\\b"])
def test_an_index_cannot_point_outside(place, toys, tmp_path):
    toys.write_safetensors(tmp_path / "secret.safetensors", toys.shapes("original", toys.kinds["t2v"]))
    with pytest.raises(ValueError, match="outside its own folder"):
        open_checkpoint(index_of(tmp_path / "model", {"a": place}))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', "{" * 10_000])
def test_a_broken_index_is_named(text, tmp_path):
    index_of(tmp_path, {})
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not a safetensors index"):
        open_checkpoint(tmp_path)


def test_an_index_must_agree_with_its_files(toys, tmp_path):
    source = toys.diffusers(tmp_path / "model", files=2)
    index = next(source.glob("*.index.json"))
    whole = json.loads(index.read_text())["weight_map"]
    other = whole | {"scale_shift_table": "diffusion_pytorch_model-00001-of-00002.safetensors"}
    index.write_text(json.dumps({"weight_map": other}))
    with pytest.raises(ValueError, match=r"does not have scale_shift_table in .*00002"):
        open_checkpoint(source)
    index.write_text(json.dumps({"weight_map": whole | {"surplus": whole["scale_shift_table"]}}))
    with pytest.raises(ValueError, match=r"has surplus in .*where it is not"):
        open_checkpoint(source)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole.items() if k != "scale_shift_table"}}))
    with pytest.raises(ValueError, match="scale_shift_table"):
        open_checkpoint(source)
    index.write_text(json.dumps({"weight_map": whole}))
    (source / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names diffusion_pytorch_model-00002.*not there"):
        open_checkpoint(source)


def test_a_link_out_of_the_folder_is_refused(toys, tmp_path):
    source = toys.diffusers(tmp_path / "source")
    file = source / "diffusion_pytorch_model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"is a link to .*elsewhere\.safetensors, outside its folder"):
        open_checkpoint(source)
    open_checkpoint(tmp_path / "elsewhere.safetensors")


def test_links_of_the_hub_cache_are_followed(toys, tmp_path):
    cache = tmp_path / "models--Wan-AI--Wan2.1"
    source = toys.diffusers(cache / "snapshots/0123abc/transformer")
    (cache / "blobs").mkdir()
    for file in source.iterdir():
        file.rename(cache / "blobs" / file.name)
        file.symlink_to(cache / "blobs" / file.name)
    assert len(open_checkpoint(cache / "snapshots/0123abc")) > 80
