"""Measure conversions against `cp` of the same bytes, their peak memory, and how long the command takes to answer.

python libs/mm-convert/tests/measure.py [GB; 4] [folder to work in; a temporary one]
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import wan_shapes, write_checkpoint

from mm_convert.families import QWEN2_5_VL

WAN = dict(dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, in_channels=16, out_channels=16)  # 186 MB a layer
QWEN = dict(dim=3584, ffn_dim=18944, q_dim=3584, kv_dim=512, vocab_size=152064, vision_dim=1280, vision_ffn_dim=3420)
QWEN |= dict(merged_dim=5120, channels=3, pt=2, ph=14, pw=14)  # the 7B: 466 MB a layer in bfloat16


STARTER = """
import resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
"""


def run(*words: str | Path) -> tuple[float, float]:
    """Seconds and peak resident MB of a command. A small process starts it, whose own peak Linux counts, too."""
    command = [sys.executable, "-c", STARTER, *(str(w) for w in words)]
    seconds, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(seconds), float(peak)


def compare(title: str, source: Path, target: Path, *options: str, repeats: int = 3) -> None:
    """A conversion beside a copy of its source, turn by turn; the target of the last stays."""
    nbytes = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    convert = [sys.executable, "-m", "mm_convert", "convert", str(source), str(target), *options]
    copies, conversions = [], []
    for _ in range(repeats):
        for command, measured in ((["cp", "-r", str(source), str(target)], copies), (convert, conversions)):
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            measured.append(run(*command))
    copy, (seconds, _) = min(copies)[0], min(conversions)
    peak = max(peak for _, peak in conversions)
    print(f"{title:42} {nbytes / 1e9:4.1f} GB {seconds:6.2f} s {seconds / copy:5.2f} x cp {peak:5.0f} MB", flush=True)


def main(gigabytes: float, work: Path) -> None:
    layers = round(gigabytes / 0.186)
    wan = write_checkpoint(work / "wan", wan_shapes("diffusers", WAN | {"layers": layers}), files=3)
    compare("rename: diffusers -> original", wan, work / "a", "--to", "original")
    compare("regroup: diffusers -> mm, files of 0.3 GB", wan, work / "a", "--shard_gb", "0.3")
    compare("safetensors -> mindspeed, pp 2", wan, work / "tree", "--to", "mindspeed", f"--pp_layers=[1,{layers - 1}]")
    compare("mindspeed, pp 2 -> diffusers", work / "tree", work / "a", "--to", "diffusers")
    compare("mindspeed, pp 2 -> dcp (torch)", work / "tree", work / "dcp", "--to", "dcp", repeats=1)
    compare("dcp -> diffusers", work / "dcp", work / "a", "--to", "diffusers", repeats=1)
    for folder in (wan, work / "tree", work / "dcp", work / "a"):
        shutil.rmtree(folder)

    counts = {"i": max(1, round((gigabytes - 1.1) / 0.466)), "j": 2}
    qwen = write_checkpoint(work / "q", QWEN2_5_VL.table.shapes("transformers", QWEN, counts), files=3, dtype="BF16")
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "vision_config": {"num_heads": 16}}
    (qwen / "config.json").write_text(json.dumps(heads), encoding="utf-8")
    compare("safetensors -> mindspeed, tp 4", qwen, work / "tree", "--to", "mindspeed", "--tp_size", "4")
    compare("mindspeed, tp 4 -> mm", work / "tree", work / "a")
    compare("mindspeed, tp 4 -> tp 2", work / "tree", work / "a", "--to", "mindspeed", "--tp_size", "2")
    for words in (["--help"], ["convert", "--help"], ["inspect", str(work / "tree")]):
        command = [sys.executable, "-m", "mm_convert", *words]
        print(f"mm-convert {' '.join(words)[:20]:20} {min(run(*command)[0] for _ in range(7)):.3f} s")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        main(float(sys.argv[1]) if len(sys.argv) > 1 else 4, Path(folder))
