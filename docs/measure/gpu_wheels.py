"""Collects what `gpu.py` needs besides torch, transformers, peft and safetensors, for a machine without a network.

    python docs/measure/gpu_wheels.py wheels [--python 3.12]
    python gpu.py --wheels wheels              # there: the two files gpu.py and qwen_step.py, and this folder

Each package that is installed here, and each of ours, becomes a wheel of the version that was tested. These are of pure
Python, and run with every Python and torch; protobuf, which TensorBoard needs, runs without its compiled part. With
--python, that of the other machine, pip downloads what holds compiled code, Pillow and PyAV, for Linux on x86-64.
Where they are not there either, diffusers' models, the VAE and the run of mm_train are named as not run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

FOREIGN = ("einops", "diffusers", "importlib_metadata", "zipp", "tensorboard", "absl-py", "protobuf")
PURE_TOO = ("protobuf",)  # whose compiled part need not be there
COMPILED = ("pillow", "av")
ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", help="version of the other machine's Python, as 3.12, to download compiled wheels")
    args = parser.parse_args()
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    for name in FOREIGN:
        try:
            found = distribution(name)
        except PackageNotFoundError:
            print(f"{name}: not installed here, left out")
            continue
        compiled = [file for file in files_of(found) if file.endswith((".so", ".pyd", ".dylib"))]
        if compiled and name not in PURE_TOO:
            print(f"{name}: holds compiled code ({compiled[0]}), left out")
            continue
        files = [file for file in files_of(found) if file not in compiled]
        pack(folder, name, found.version, ((file, found.locate_file(file)) for file in files))
    for source in sorted([*ROOT.glob("libs/*/src/*"), *ROOT.glob("apps/*/src/*")]):
        if (source / "__about__.py").exists():
            pack(folder, source.name, read_version(source), walk(source))
    if args.python:
        download(folder, args.python)
    else:
        print(f"not pure, so not carried without --python: {', '.join(COMPILED)}")


def download(folder: Path, python: str) -> None:
    """Wheels of the versions that are installed here, for another Python."""
    wanted = [f"{name}=={distribution(name).version}" for name in COMPILED]
    where = [flag for n in (17, 28) for flag in ("--platform", f"manylinux_2_{n}_x86_64")]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *where]
    subprocess.run([*command, "--python-version", python, "--dest", str(folder), *wanted], check=True)
    print(f"for Python {python}: {', '.join(wanted)}")


def files_of(found: Distribution) -> list[str]:
    """Its files within site-packages, without scripts and what Python has compiled."""
    return [str(f) for f in found.files or () if not str(f).startswith("..") and "__pycache__" not in str(f)]


def walk(source: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(source.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            yield str(file.relative_to(source.parent)), file


def read_version(source: Path) -> str:
    about: dict[str, str] = {}
    exec((source / "__about__.py").read_text(encoding="utf-8"), about)
    return about["__version__"]


def pack(folder: Path, name: str, version: str, files: Iterable[tuple[str, Path]]) -> None:
    """Writes a wheel; of ours with the few lines that importlib.metadata asks for."""
    wheel = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info/METADATA"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as out:
        for inside, file in files:
            out.write(file, inside)
        if not any(inside.endswith(".dist-info/METADATA") for inside in out.namelist()):
            out.writestr(info, f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
    print(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
