"""Measure a conversion against `cp` of the same bytes, and how long the command takes to answer.

python libs/mm-convert/tests/measure.py [layers, each 186 MB; 8] [folder to work in; a temporary one]
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from conftest import wan_shapes, write_checkpoint


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def main(layers: int, work: Path) -> None:
    sizes = dict(dim=1536, ffn_dim=8960, freq_dim=256, text_dim=4096, in_channels=16, out_channels=16, layers=layers)
    source, target = write_checkpoint(work / "source", wan_shapes("diffusers", sizes), files=3), work / "target"
    nbytes = sum(file.stat().st_size for file in source.iterdir())
    convert = [sys.executable, "-m", "mm_convert.cli", "convert", str(source), str(target)]
    commands = {
        "cp -r": ["cp", "-r", str(source), str(target)],
        "rename": convert,
        "regroup": [*convert, "--shard_gb", "0.3"],
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(5):
        for name, command in commands.items():
            shutil.rmtree(target, ignore_errors=True)
            os.sync()
            times[name].append(seconds(command))
    for name, measured in times.items():
        ratio = min(measured) / min(times["cp -r"])
        print(f"{name:8} {min(measured):.2f} s best of {len(measured)}, {ratio:.2f} x cp; {nbytes / 1e9:.2f} GB")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"peak resident memory of all commands {peak:.0f} MB")
    for name, code in (("bare python", "pass"), ("import mm_convert", "import mm_convert")):
        print(f"{name:18} {min(seconds([sys.executable, '-c', code]) for _ in range(7)):.3f} s")
    for words in (["--help"], ["convert", "--help"], ["inspect", str(source)]):
        command = [sys.executable, "-m", "mm_convert.cli", *words]
        print(f"mm-convert {words[0]:8} {min(seconds(command) for _ in range(7)):.3f} s")


if __name__ == "__main__":
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 8
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        main(layers, Path(folder))
