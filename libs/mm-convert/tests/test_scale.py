"""Large files take no memory, whatever is done to them. `measure.py` has the figures at 4 GB, beside `cp`."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod

import pytest

from mm_convert import convert
from mm_convert.families import QWEN2_5_VL

SIZES = dict(dim=2048, ffn_dim=4096, q_dim=2048, kv_dim=512, vocab_size=32768, vision_dim=1280, vision_ffn_dim=2560)
SIZES |= dict(merged_dim=5120, channels=3, pt=2, ph=14, pw=14)
PEAK = """
import sys
from pathlib import Path
from mm_convert.cli import main
main(sys.argv[1:])
lines = Path("/proc/self/status").read_text().splitlines()
print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))
"""


def write_sparse(folder):
    """Zeros that take no room; the largest tensor has 134 MB."""
    folder.mkdir()
    header, position = {}, 0
    for name, shape in QWEN2_5_VL.table.shapes("transformers", SIZES, {"i": 2, "j": 1}).items():
        end = position + prod(shape) * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + position)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "vision_config": {"num_heads": 16}}
    (folder / "config.json").write_text(json.dumps(heads))
    return position


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_stays_flat(tmp_path):
    assert write_sparse(tmp_path / "source") > 270e6
    steps = [
        ("source", "renamed", "--to", "transformers-v5"),
        ("source", "tree", "--to", "mindspeed", "--tp_size", "4", "--pp_layers", "[1,1]", "--vit_pp_layers", "[1,0]"),
        ("tree", "other", "--to", "mindspeed", "--tp_size", "2"),
        ("other", "file.pt", "--to", "transformers"),
        ("file.pt", "ours", "--shard_gb", "0.1"),
    ]
    for source, target, *options in steps:
        command = [sys.executable, "-c", PEAK, "convert", str(tmp_path / source), str(tmp_path / target), *options]
        peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]
        assert int(peak) < 100, (source, target, peak)
    command = [sys.executable, "-m", "mm_convert", "diff", str(tmp_path / "source"), str(tmp_path / "ours")]
    assert "all equal" in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("to", ["original", "mindspeed"])
def test_a_full_disk_is_said_before_anything_is_written(to, toys, tmp_path):
    source = toys.write_checkpoint(tmp_path / "source", toys.shapes("diffusers", toys.kinds["t2v"] | {"dim": 128}))
    file = source / "diffusion_pytorch_model.safetensors"
    huge = toys.shapes("diffusers", toys.kinds["t2v"] | {"dim": 128, "text_dim": 10**10})  # 5 TB of zeros, sparse
    header, position = {}, 0
    for name, shape in huge.items():
        end = position + prod(shape) * 4
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + position)
    with pytest.raises(ValueError, match=r"needs 5\.12 TB, its disk has .* left"):
        convert(source, tmp_path / "out", to)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
