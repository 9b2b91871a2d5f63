"""ComfyUI's single files: what is quantised in them is read as the bf16 that it stands for, and they are written."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from math import prod

import pytest

from mm_convert import convert, diff, inspect, open_checkpoint, open_experts, weight_files
from mm_convert.cli import main
from mm_convert.families import UMT5, WAN_VAE
from mm_convert.store.safetensors import read_file, write_file
from mm_convert.tensors.views import Computed

SIZES = dict(dim=128, ffn_dim=256, freq_dim=32, text_dim=64, in_channels=16, out_channels=16, layers=1)
CONTROL = SIZES | dict(control_channels=12, control_blocks=1)
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")
CODED, ROWWISE = "blocks.0.ffn.0", "blocks.0.self_attn.q"


def write(path, tensors, metadata=None):
    """A file of torch tensors, in a header written by hand."""
    torch = pytest.importorskip("torch")
    spelling = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
    spelling |= {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0"}
    header, data = {"__metadata__": metadata or {"format": "pt"}}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": spelling[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def text(said):
    torch = pytest.importorskip("torch")
    return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)


@pytest.fixture
def weights(toys):
    """Of a tiny Wan, in the values that published files have: fp16 where nothing is quantised."""
    torch = pytest.importorskip("torch")
    draw = torch.Generator().manual_seed(0)
    shapes = toys.shapes("original", SIZES)
    return {name: torch.randn(shape, generator=draw).half() / 8 for name, shape in shapes.items()}


# --- old: scale_weight, and a marker


def old_fp8(weights, dtype, prefix=""):
    """As Comfy-Org published Wan 2.2: every linear with two scales, the rest in fp16; and what it stands for."""
    torch = pytest.importorskip("torch")
    file, meant = {}, {}
    for name, tensor in weights.items():
        file[f"{prefix}{name}"] = meant[name] = tensor
        if tensor.ndim == 2:
            layer = name.removesuffix(".weight")
            scale = tensor.float().abs().amax() / torch.finfo(dtype).max
            if layer == ROWWISE:
                scale = tensor.float().abs().amax(1) / torch.finfo(dtype).max
            if layer == CODED:
                scale = torch.empty(0)
            one = scale if scale.numel() else torch.ones(())
            codes = (tensor.float() / one.reshape(-1, 1)).to(dtype)
            scales = {"scale_weight": scale, "scale_input": torch.tensor(0.5)}
            file[f"{prefix}{name}"] = codes
            file |= {f"{prefix}{layer}.{end}": value for end, value in scales.items()}
            meant[name] = (codes.float() * one.reshape(-1, 1)).bfloat16()
    file[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=dtype)
    return file, meant


@pytest.mark.parametrize(("kind", "prefix"), [("e4m3fn", PREFIXES[0]), ("e5m2", PREFIXES[1]), ("e4m3fn", PREFIXES[2])])
def test_old_scaled_fp8(kind, prefix, weights, tmp_path):
    torch = pytest.importorskip("torch")
    file, meant = old_fp8(weights, getattr(torch, f"float8_{kind}"), prefix)
    checkpoint = open_checkpoint(write(tmp_path / "wan.safetensors", file))
    assert all(torch.equal(checkpoint[name], tensor) for name, tensor in meant.items())
    linears = sum(tensor.ndim == 2 for tensor in meant.values())
    said = f"ComfyUI single file, fp8 scaled ({kind}) ({linears}), read as bf16, {len(meant)} tensors"
    assert said in checkpoint.notes
    assert any(f"{linears} scales of activations are left out, {prefix}" in note for note in checkpoint.notes)
    assert "1 scales have no elements: they are taken as 1" in checkpoint.notes
    assert checkpoint.quantised == f"fp8 scaled ({kind})"


def test_it_is_converted_to_what_it_stands_for(weights, tmp_path):
    torch = pytest.importorskip("torch")
    file, meant = old_fp8(weights, torch.float8_e4m3fn)
    metadata = {"format": "pt", "modelspec.title": "a title"}
    convert(write(tmp_path / "wan.safetensors", file, metadata), tmp_path / "theirs", to="diffusers")
    plain = write(tmp_path / "plain.safetensors", meant)
    assert not any(diff(tmp_path / "theirs", plain))
    assert read_file(tmp_path / "theirs" / "diffusion_pytorch_model.safetensors")[1]["modelspec.title"] == "a title"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2"])
def test_plain_files(dtype, weights, tmp_path):
    torch = pytest.importorskip("torch")
    file = {f"model.diffusion_model.{n}": tensor.to(getattr(torch, dtype)) for n, tensor in weights.items()}
    checkpoint = open_checkpoint(write(tmp_path / "wan.safetensors", file))
    assert all(torch.equal(checkpoint[n].float(), file[f"model.diffusion_model.{n}"].float()) for n in weights)
    word = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}.get(dtype, dtype.replace("float8", "f8")[:7])
    assert f"ComfyUI single file, {word}, {len(weights)} tensors" in checkpoint.notes
    assert not checkpoint.quantised


def test_a_published_size_is_recognised(toys, tmp_path):
    """By names and shapes: the whole of Wan2.1 1.3B, in a file that takes no room."""
    shapes = toys.published(toys_family("wan"), "wan2.1-t2v-1.3b")
    tensors = {f"diffusion_model.{name}": ("F16", shape) for name, shape in shapes.items()}
    path = write_sparse(tmp_path / "wan.safetensors", tensors)
    assert f"ComfyUI single file, f16, {len(shapes)} tensors: wan2.1-t2v-1.3b" in inspect(path).notes
    assert inspect(path).preset == "wan2.1-t2v-1.3b"
    assert open_checkpoint(path).config["num_heads"] == 12


def toys_family(name):
    from mm_convert.families import FAMILIES

    return next(family for family in FAMILIES if family.name == name)


def write_sparse(path, tensors, data=None):
    """A file of zeros, but for the tensors whose bytes are given."""
    header, position, data = {}, 0, data or {}
    for name, (dtype, shape) in tensors.items():
        end = position + prod(shape) * {"F8_E4M3": 1, "F16": 2, "F32": 4}[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
        for name, content in data.items():
            file.seek(8 + len(raw) + header[name]["data_offsets"][0])
            file.write(content)
    return path


# --- new: weight_scale, and the format in words


def tiled(scales):
    """Block scales in the order of the tensor cores, by the formula of cuBLAS' manual, one after the other."""
    torch = pytest.importorskip("torch")
    rows, columns = (-(-side // tile) * tile for side, tile in zip(scales.shape, (128, 4), strict=True))
    flat = torch.zeros(rows * columns, dtype=torch.uint8)
    for r in range(scales.shape[0]):
        for c in range(scales.shape[1]):
            tile = r // 128 * (columns // 4) + c // 4
            flat[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scales[r, c]
    return flat.view(rows, columns)


def new_format(weight, format_):
    """What stands for a matrix in a file, beside `X.`; what is said of it; and the matrix that is meant, in bf16."""
    torch = pytest.importorskip("torch")
    wide = weight.float()
    fp8 = torch.float8_e4m3fn
    if format_ in ("float8_e4m3fn", "rows"):
        scale = (wide.abs().amax(1, keepdim=True) if format_ == "rows" else wide.abs().amax()) / 448
        codes = (wide / scale).to(fp8)
        extra = {"input_scale": torch.tensor(1.0)}
        return {"weight": codes, "weight_scale": scale, **extra}, {"format": "float8_e4m3fn"}, codes.float() * scale
    if format_ == "int8_tensorwise":
        scale = wide.abs().amax() / 127
        codes = (wide / scale).round().to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, {"format": format_}, codes.float() * scale
    if format_ == "convrot":  # each 16 neighbours are mixed; the matrix is its own inverse
        four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1.0]])
        mix = torch.block_diag(*[torch.kron(four, four) / 4] * (wide.shape[1] // 16))
        assert torch.equal(mix @ mix, torch.eye(wide.shape[1]))
        scale = (wide @ mix).abs().amax(1, keepdim=True) / 127
        codes = (wide @ mix / scale).round().to(torch.int8)
        said = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
        return {"weight": codes, "weight_scale": scale}, said, codes.float() * scale @ mix
    draw = torch.Generator().manual_seed(1)
    if format_ == "mxfp8":
        exponents = torch.randint(110, 130, (wide.shape[0], wide.shape[1] // 32), generator=draw, dtype=torch.uint8)
        codes = wide.to(fp8)
        meant = codes.float() * 2.0 ** (exponents.float() - 127).repeat_interleave(32, 1)
        return {"weight": codes, "weight_scale": tiled(exponents)}, {"format": format_}, meant
    assert format_ == "nvfp4"
    numbers = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    codes = torch.randint(0, 16, wide.shape, generator=draw, dtype=torch.uint8)
    scales = torch.rand(wide.shape[0], wide.shape[1] // 16, generator=draw).to(fp8)
    whole = torch.tensor(0.0625)
    meant = numbers[codes.int()] * (scales.float() * whole).repeat_interleave(16, 1)
    packed = codes[:, 0::2] << 4 | codes[:, 1::2]
    tensors = {"weight": packed, "weight_scale": tiled(scales.view(torch.uint8)).view(fp8), "weight_scale_2": whole}
    return tensors, {"format": format_}, meant


FORMATS = ("float8_e4m3fn", "rows", "int8_tensorwise", "convrot", "mxfp8", "nvfp4")


@pytest.mark.parametrize("where", ["tensors", "header"])
@pytest.mark.parametrize("format_", FORMATS)
def test_new_formats(format_, where, weights, tmp_path):
    torch = pytest.importorskip("torch")
    layer = "model.diffusion_model.blocks.0.ffn.0"  # 256 rows of 128: two tiles of block scales
    tensors, said, meant = new_format(weights[f"{CODED}.weight"], format_)
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}
    file |= {f"{layer}.{end}": tensor for end, tensor in tensors.items()}
    metadata = {"format": "pt"}
    if where == "header":
        metadata["_quantization_metadata"] = json.dumps({"format_version": "1.0", "layers": {layer: said}})
    else:
        file[f"{layer}.comfy_quant"] = text(said)
    path = write(tmp_path / "wan.safetensors", file, metadata)
    checkpoint = open_checkpoint(path)
    read = checkpoint[f"{CODED}.weight"]
    assert read.dtype == torch.bfloat16
    if format_ == "convrot":  # sums in another order
        torch.testing.assert_close(read.float(), meant, rtol=2**-7, atol=1e-5)
    else:
        assert torch.equal(read, meant.bfloat16())
    part = checkpoint.tensors[f"{CODED}.weight"].read(100, 230)  # rows of two tiles
    assert part == checkpoint.tensors[f"{CODED}.weight"].read()[100 * 256 : 230 * 256]
    convert(path, tmp_path / "ours")
    assert not any(diff(path, tmp_path / "ours"))
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    assert "_quantization_metadata" not in read_file(file)[1], "they are quantised no more"


WRONG = {
    "another format": ({"format": "asym_w4a8_int8"}, {}, r"ffn\.0 is quantised as 'asym_w4a8_int8', which is not read"),
    "a word": (
        {"format": "float8_e4m3fn", "zero": 1},
        {},
        r"ffn\.0 says zero of its format float8_e4m3fn, which is not",
    ),
    "no format": ({"of": "float8_e4m3fn"}, {}, r"not a table with a format"),
    "other codes": ({"format": "int8_tensorwise"}, {}, r"is F8_E4M3 with a scale in F32; int8_tensorwise is I8"),
    "rotated fp8": ({"format": "float8_e4m3fn", "convrot": True}, {}, r"rotated in groups of 256.* only of int8"),
    "block scales": (None, {"weight_scale": (2, 4)}, r"scale of blocks\.0\.ffn\.0 has shape \[2, 4\].*each of its 256"),
    "no scale": ({"format": "float8_e4m3fn"}, {"weight_scale": None}, r"its scale blocks\.0\.ffn\.0\.weight_scale is"),
    "no weight": (None, {"weight": None}, r"has a scale or a format for blocks\.0\.ffn\.0, but no blocks"),
    "another scale": (None, {"pre_quant_scale": (128,)}, r"unknown: blocks\.0\.ffn\.0\.pre_quant_scale \(nearest: "),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_read_is_refused_by_name(what, weights, tmp_path):
    torch = pytest.importorskip("torch")
    said, change, message = WRONG[what]
    tensors, _, _ = new_format(weights[f"{CODED}.weight"], "float8_e4m3fn")
    tensors |= {end: shape and torch.ones(shape) for end, shape in change.items()}
    file = weights | {f"{CODED}.{end}": tensor for end, tensor in tensors.items()}
    file = {name: tensor for name, tensor in file.items() if tensor is not None}
    if said:
        file[f"{CODED}.comfy_quant"] = text(said)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(write(tmp_path / "wan.safetensors", file))


def test_a_scale_that_says_nothing_of_its_codes(weights, tmp_path):
    torch = pytest.importorskip("torch")
    file = weights | {f"{CODED}.weight_scale": torch.ones(())}
    with pytest.raises(ValueError, match=r"ffn\.0\.weight is F16 and has a scale, but nothing says in which format"):
        open_checkpoint(write(tmp_path / "wan.safetensors", file))
    metadata = {"_quantization_metadata": "[1]"}
    with pytest.raises(ValueError, match=r"_quantization_metadata of its header is \[1\], not a table"):
        open_checkpoint(write(tmp_path / "wan.safetensors", weights, metadata))


# --- other models


def test_encoders_and_vae(toys, tmp_path):
    """UMT5 as ComfyUI has it: transformers' names, the tokenizer as a tensor; the VAE under Wan-AI's names."""
    torch = pytest.importorskip("torch")
    sizes = dict(vocab_size=72, dim=24, ffn_dim=40, num_heads=3, head_dim=8, buckets=6)
    shapes = UMT5.table.shapes("transformers", sizes, {"i": 2})
    draw = torch.Generator().manual_seed(0)
    file, meant = old_fp8({n: torch.randn(s, generator=draw).half() for n, s in shapes.items()}, torch.float8_e4m3fn)
    path = write(tmp_path / "umt5_xxl_fp8_e4m3fn_scaled.safetensors", file | {"spiece_model": text("a model")})
    checkpoint = open_checkpoint(path)
    assert checkpoint.family == "umt5"
    assert checkpoint.notes[-1].startswith("1 tensors are left out (the tokenizer's model, no weight)")
    assert any("ComfyUI single file, fp8 scaled (e4m3fn)" in note for note in checkpoint.notes)
    convert(path, tmp_path / "text_encoder", to="transformers")
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["model_type"] == "umt5"
    again = open_checkpoint(tmp_path / "text_encoder")
    assert all(torch.equal(again[name], meant[name]) for name in again)

    vae = dict(base_dim=8, z_dim=16, in_channels=3, out_channels=3)
    toys.write_safetensors(tmp_path / "wan_2.1_vae.safetensors", WAN_VAE.table.shapes("original", vae, {}))
    convert(tmp_path / "wan_2.1_vae.safetensors", tmp_path / "vae", to="diffusers")
    convert(tmp_path / "vae", tmp_path / "back.safetensors", to="comfyui")
    assert not any(diff(tmp_path / "wan_2.1_vae.safetensors", tmp_path / "back.safetensors"))
    with pytest.raises(
        ValueError, match=r"fp8_scaled is for transformers in ComfyUI's single files.*, not for wan-vae"
    ):
        convert(tmp_path / "vae", tmp_path / "fp8.safetensors", to="comfyui", dtype="fp8_scaled")


def test_two_files_are_a_pair(weights, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    folder = tmp_path / "models"
    folder.mkdir()
    for half in ("high", "low"):
        write(folder / f"wan2.2_t2v_{half}_noise_14B_fp8_scaled.safetensors", old_fp8(weights, torch.float8_e4m3fn)[0])
    pair = open_experts(folder)
    assert [path.name.split("_")[2] for path in pair[:2]] == ["high", "low"]
    assert {name.split("_")[2] for name in weight_files(folder)} == {"high", "low"}
    main(["inspect", str(folder)])
    assert "what           two experts" in capsys.readouterr().out
    main(["convert", str(folder), str(tmp_path / "W"), "--to", "comfyui", "--boundary", "0.875", "--dry_run"])
    assert "memory under 180 MB" in capsys.readouterr().out
    main(["convert", str(folder), str(tmp_path / "W"), "--to", "comfyui", "--boundary", "0.875"])
    assert open_experts(tmp_path / "W").boundary == 0.875
    for half in ("high", "low"):
        written = tmp_path / f"W/{half}_noise_model/W_{half}_noise.safetensors"
        assert not any(diff(written, getattr(pair, half)))

    write(folder / "other_low_noise.safetensors", weights)
    with pytest.raises(ValueError, match="holds 3 files of experts, by their names 1 for high noise and 2 for low"):
        open_experts(folder)
    (folder / "other_low_noise.safetensors").rename(folder / "other.safetensors")
    assert open_experts(folder) is None  # what is in it is not clear; `find` names the files
    with pytest.raises(ValueError, match=r"other\.safetensors, wan2\.2_t2v_high.* and no index; name one of them"):
        open_checkpoint(folder)


# --- writing


@pytest.mark.parametrize("sizes", [SIZES, CONTROL], ids=["wan", "vace"])
def test_written_files_come_back(sizes, toys, tmp_path):
    torch = pytest.importorskip("torch")
    source = toys.write_checkpoint(tmp_path / "source", toys.shapes("diffusers", sizes), dtype="BF16")
    convert(source, tmp_path / "wan.safetensors", to="comfyui")
    names, _ = read_file(tmp_path / "wan.safetensors")
    assert set(names) == set(toys.shapes("original", sizes)), "without a prefix, as in diffusion_models/"
    assert not any(diff(source, tmp_path / "wan.safetensors"))
    convert(source, tmp_path / "folder", to="comfyui", dtype="float16")
    assert {t.dtype for t in read_file(tmp_path / "folder/folder.safetensors")[0].values()} == {"F16"}
    with pytest.raises(ValueError, match=r"ComfyUI's single files end in \.safetensors"):
        convert(source, tmp_path / "wan.pt", to="comfyui")
    with pytest.raises(ValueError, match="a size of files is for folders of safetensors"):
        convert(source, tmp_path / "cut", to="comfyui", shard_bytes=1000)
    assert torch.equal(open_checkpoint(source)["head.head.bias"].view(torch.int16),
                       open_checkpoint(tmp_path / "wan.safetensors")["head.head.bias"].view(torch.int16))  # fmt: skip


def test_scaled_fp8_is_written(weights, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    weights["head.head.weight"].zero_()
    source = write(tmp_path / "source.safetensors", weights)
    main(["convert", str(source), str(tmp_path / "fp8.safetensors"), "--to", "comfyui", "--dtype", "fp8_scaled"])
    from safetensors.torch import load_file

    file = load_file(tmp_path / "fp8.safetensors")
    assert file.pop("scaled_fp8").shape == (2,)
    for name, tensor in weights.items():
        if tensor.ndim != 2:
            assert torch.equal(file.pop(name), tensor)
            continue
        scale = file.pop(name.replace(".weight", ".scale_weight"))
        assert scale == (tensor.float().abs().max() / 448 if tensor.any() else 1)
        assert scale.shape == ()
        assert torch.equal(file.pop(name).float(), (tensor.float() / scale).to(torch.float8_e4m3fn).float())
    assert not file
    capsys.readouterr()
    command = ["convert", str(tmp_path / "fp8.safetensors"), str(tmp_path / "again.safetensors"), "--to", "comfyui"]
    main([*command, "--dtype", "fp8_scaled"])
    assert "what was fp8 scaled (e4m3fn) is rounded a second time" in capsys.readouterr().err
    again, once = open_checkpoint(tmp_path / "again.safetensors"), open_checkpoint(tmp_path / "fp8.safetensors")
    for name, tensor in once.items():
        torch.testing.assert_close(again[name].float(), tensor.float(), rtol=2**-3, atol=1e-4)

    with pytest.raises(ValueError, match=r"fp8_scaled is for transformers in ComfyUI's single files \(--to comfyui\)"):
        convert(source, tmp_path / "ours", dtype="fp8_scaled")
    weights[f"{CODED}.weight"][3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"blocks\.0\.ffn\.0\.weight holds numbers that are not finite"):
        convert(write(tmp_path / "wrong.safetensors", weights), tmp_path / "no.safetensors", "comfyui",
                dtype="fp8_scaled")  # fmt: skip
    assert not (tmp_path / "no.safetensors").exists()


# --- memory

PEAK = """
import sys
from mm_convert import convert
convert(sys.argv[1], sys.argv[2], to="original")
lines = open("/proc/self/status", encoding="utf-8").read().splitlines()
print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), "torch" in sys.modules)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_stays_flat_without_torch(toys, tmp_path):
    """A matrix of 134 MB in bf16, which is 268 MB in the fp32 that it is computed in."""
    sizes = SIZES | dict(dim=1024, ffn_dim=65536)
    shapes = toys.shapes("original", sizes)
    tensors = {name: ("F8_E4M3" if len(shape) == 2 else "F16", shape) for name, shape in shapes.items()}
    scales = {name.replace(".weight", ".scale_weight"): ("F32", ()) for name in tensors if len(shapes[name]) == 2}
    path = write_sparse(
        tmp_path / "wan.safetensors", tensors | scales | {"scaled_fp8": ("F8_E4M3", (0,))},
        dict.fromkeys(scales, struct.pack("<f", 0.5)),
    )  # fmt: skip
    command = [sys.executable, "-c", PEAK, str(path), str(tmp_path / "out")]
    peak, torch = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert int(peak) < 180, f"{peak} MB"
    assert torch == "False"


def test_bytes_of_a_computed_scale(tmp_path):
    """The writer asks computed tensors of no sides, and of no elements, for their bytes."""
    tensors = {
        "one": Computed("F32", (), lambda start, stop: struct.pack("<f", 2.0)),
        "none": Computed("F8_E4M3", (0,), lambda start, stop: b""),
    }
    write_file(tmp_path / "a.safetensors", tensors, {}, lambda done: None)
    assert read_file(tmp_path / "a.safetensors")[0]["one"].read() == struct.pack("<f", 2.0)
