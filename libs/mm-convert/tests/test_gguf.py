"""GGUF files as city96's tools make them: read lazily, in the values that the package gguf gives them."""

from __future__ import annotations

import struct
import sys

import pytest

from mm_convert import convert, diff, open_checkpoint
from mm_convert.families import UMT5
from mm_convert.store.gguf import read_gguf

gguf = pytest.importorskip("gguf")
np = pytest.importorskip("numpy")

SIZES = dict(dim=256, ffn_dim=512, freq_dim=256, text_dim=256, in_channels=16, out_channels=16, layers=1)
WRITTEN = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")  # gguf quantises them
BLOCKS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")  # and these it only reads
REORDERED = "patch_embedding.weight"  # laid out anew: five sides, and rows of 4


def values_of(shapes):
    draw = np.random.default_rng(0)
    return {name: draw.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write(path, tensors, kind, *, prefix="", architecture="wan"):
    """As city96's convert.py: matrices in blocks, the rest in F32; what has too many sides is laid out anew."""
    type_ = gguf.GGMLQuantizationType[kind]
    values, nbytes = gguf.GGML_QUANT_SIZES[type_]
    writer = gguf.GGUFWriter(path, architecture)
    draw = np.random.default_rng(1)
    for name, tensor in tensors.items():
        if len(tensor.shape) > 4:
            writer.add_array(f"comfy.gguf.orig_shape.{prefix}{name}", tuple(int(side) for side in tensor.shape))
            tensor = tensor.reshape(-1, 256)
        quantised = tensor.ndim == 2 and tensor.shape[1] % values == 0
        if kind in WRITTEN and quantised:
            tensor = gguf.quants.quantize(tensor, type_)
        elif quantised and kind in BLOCKS:
            tensor = draw.integers(0, 255, (tensor.shape[0], tensor.shape[1] // values * nbytes), np.uint8)
            tensor[:, 1::2] &= 0x3F  # scales in fp16 that are numbers, and not too large
        elif quantised:
            tensor = tensor.astype(np.float16) if kind == "F16" else gguf.quants.quantize(tensor, type_)
        writer.add_tensor(f"{prefix}{name}", tensor, raw_dtype=type_ if quantised else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values_in(path):
    """What the package gguf reads, in fp32."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }


def bf16(values):
    """The upper half of fp32, rounded as torch does."""
    torch = pytest.importorskip("torch")
    return torch.from_numpy(values.copy()).bfloat16()


@pytest.mark.parametrize("kind", [*WRITTEN, *BLOCKS, "F16", "BF16"])
def test_values(kind, toys, tmp_path):
    torch = pytest.importorskip("torch")
    tensors = values_of(toys.shapes("original", SIZES))
    prefix = "model.diffusion_model." if kind == "Q8_0" else ""
    path = write(tmp_path / "wan.gguf", tensors, kind, prefix=prefix)
    checkpoint, known = open_checkpoint(path), values_in(path)
    assert checkpoint.layout == "gguf"
    assert checkpoint.config["dim"] == 256
    for name, tensor in tensors.items():
        read, values = checkpoint[name], known[prefix + name].reshape(tensor.shape)
        assert np.isfinite(values).all()
        blocks = tensor.ndim == 2 or name == REORDERED
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.bfloat16) if blocks else torch.float32
        assert (read.dtype, tuple(read.shape)) == (dtype, tensor.shape), name
        assert torch.equal(read, torch.from_numpy(values.copy()).to(dtype)), name
    matrix = checkpoint.tensors["blocks.0.ffn.2.weight"]
    assert matrix.read(7, 19) == matrix.read()[7 * matrix.row_bytes : 19 * matrix.row_bytes]
    blocks = sum(tensor.ndim in (2, 5) for tensor in tensors.values())
    said = f"{kind} ({blocks}), read as bf16" if kind not in ("F16", "BF16") else f"f32 and {kind.lower()}"
    assert f"GGUF file, {said}, {len(tensors)} tensors" in checkpoint.notes


def test_it_is_converted(toys, tmp_path):
    path = write(tmp_path / "wan.gguf", values_of(toys.shapes("original", SIZES)), "Q4_0")
    convert(path, tmp_path / "theirs", to="diffusers")
    assert not any(diff(path, tmp_path / "theirs"))
    (tmp_path / "folder").mkdir()
    path.rename(tmp_path / "folder/wan.gguf")
    assert not any(diff(tmp_path / "folder", tmp_path / "theirs"))


def test_umt5_of_llama_cpp(tmp_path):
    sizes = dict(vocab_size=64, dim=64, ffn_dim=96, num_heads=4, head_dim=16, buckets=32)
    ours = values_of(UMT5.table.shapes("transformers", sizes, {"i": 2}))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, 2)
    tensors = {names.get_name(name, (".weight",)): tensor for name, tensor in ours.items()}
    path = write(tmp_path / "umt5-xxl-encoder-Q8_0.gguf", tensors, "Q8_0", architecture="t5encoder")
    checkpoint, known = open_checkpoint(path), values_in(path)
    assert (checkpoint.family, checkpoint.dialect) == ("umt5", "gguf")
    for name in ours:
        theirs = names.get_name(name, (".weight",))
        assert bytes(checkpoint.tensors[name].read()) in (
            known[theirs].tobytes(),  # in F32
            bf16(known[theirs]).view(-1).view(pytest.importorskip("torch").uint8).numpy().tobytes(),
        ), name
    convert(path, tmp_path / "text_encoder", to="transformers")
    with pytest.raises(ValueError, match="cannot write umt5 as 'gguf'; choose one of mm, transformers, original, comf"):
        convert(path, tmp_path / "no", to="gguf")


def test_what_is_no_whole_file(toys, tmp_path):
    path = write(tmp_path / "wan.gguf", values_of(toys.shapes("original", SIZES)), "Q8_0")
    good = path.read_bytes()
    wrong = {
        r"is truncated or no GGUF file: its header ends within byte 8": b"GGUF",
        r"is not a GGUF file: it does not begin with GGUF": b"GGML" + good[4:],
        r"is GGUF of version 1; 2 and 3 of little endian are read": b"GGUF\1\0\0\0" + good[8:],
        r"is GGUF of version 50331648": b"GGUF\0\0\0\3" + good[8:],
        r"is truncated: .* ends at byte": good[:-100],
        r"is truncated or no GGUF file: its header": good[:300],
        r"its header ends within byte 9,223,": good[:24] + struct.pack("<Q", 2**63) + good[32:],  # letters of a name
    }
    for message, content in wrong.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            open_checkpoint(path)


def header(*, values=b"", count=0, places=b"", tensors=0, data=b""):
    raw = b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + values + places
    return raw + bytes(-len(raw) % 32) + data


def spell(text):
    return struct.pack("<Q", len(text)) + text.encode()


def place(name, sides, kind, offset):
    return spell(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, kind, offset)


def test_hostile_headers_end(tmp_path):
    """What asks for more than there is, and tensors that are none."""
    many = spell("a") + struct.pack("<IIQ", 9, 8, 2**62)  # texts
    one, two = place("a", [4], 0, 0), place("b", [4], 0, 0)
    wrong = {
        "its header ends within byte": header(values=many, count=1),
        "its header ends within": header(tensors=2**60),
        "has type 99, None, which is not known": header(values=spell("a") + struct.pack("<I", 99), count=1),
        "has 4,000,000,000 sides": header(places=spell("a") + struct.pack("<I", 4 * 10**9) + bytes(64), tensors=1),
        "b overlaps the tensor before it": header(places=one + two, tensors=2, data=bytes(32)),
        "a stands in it twice": header(places=one + place("a", [4], 0, 32), tensors=2, data=bytes(64)),
        "a is Q8_0 \\[33\\], but has 32 values a block": header(
            places=place("a", [33], 8, 0), tensors=1, data=bytes(99)
        ),
        "a is of ggml's type 77, which": header(places=place("a", [32], 77, 0), tensors=1, data=bytes(99)),
        "a ends at byte": header(places=place("a", [2**40, 2**20], 8, 0), tensors=1, data=bytes(64)),
        "has an alignment of 0": header(values=spell("general.alignment") + struct.pack("<II", 4, 0), count=1),
        "has a text in its header that is not UTF-8": header(values=spell("a\0").replace(b"a\0", b"\xff\xff"), count=1),
        "orig_shape.a is \\[5\\], but the tensor has shape \\[4\\]": header(
            values=spell("comfy.gguf.orig_shape.a") + struct.pack("<IIQi", 9, 5, 1, 5),
            count=1,
            places=one,
            tensors=1,
            data=bytes(32),
        ),
    }
    for message, content in wrong.items():
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_gguf(tmp_path / "a.gguf")


def test_without_the_package(toys, tmp_path, monkeypatch):
    from mm_convert.store import gguf as store

    tensors = values_of(toys.shapes("original", SIZES))
    quantised = write(tmp_path / "q.gguf", tensors, "Q8_0")
    plain = write(tmp_path / "p.gguf", tensors, "F16")
    store._types.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    assert len(open_checkpoint(plain)) == len(tensors)
    with pytest.raises(ImportError, match=r"pip install 'mm-convert\[gguf\]'"):
        open_checkpoint(quantised)
    store._types.cache_clear()
