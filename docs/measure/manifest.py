"""How long a list of many samples takes to be read and checked: `python docs/measure/manifest.py --samples 100000`.

One data.json and one folder of annotations, of the same empty files; a tenth of the entries name a file by another name
than it has, as the released lists of Open-Sora-Plan do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from mm_data import Geometry, read_manifest, select

FOLDERS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=100_000)
    count = parser.parse_args().samples
    with tempfile.TemporaryDirectory() as made:
        top = Path(made)
        names = [f"folder_{n % FOLDERS:02d}/{n:07d}_{'tar' if n % 10 == 3 else 'list'}.mp4" for n in range(count)]
        for name in names:
            (top / name).parent.mkdir(exist_ok=True)
            (top / name).touch()
        facts = {"resolution": {"height": 720, "width": 1280}, "fps": 24.0, "duration": 8.0}
        records = [
            facts | {"path": name.replace("tar", "list"), "cap": [f"what is seen in {name}, at some length"]}
            for name in names
        ]
        (top / "data.json").write_text(json.dumps(records), encoding="utf-8")
        for folder in sorted(top.glob("folder_*")):
            own = [one | {"path": one["path"].split("/")[1]} for one in records if one["path"].startswith(folder.name)]
            (folder / "annotation.json").write_text(json.dumps(own), encoding="utf-8")
        (top / "annotation.json").write_text(json.dumps(records), encoding="utf-8")
        for manifest in (top / "data.json", top):
            start = time.perf_counter()
            samples = read_manifest(manifest, say=print)
            read = time.perf_counter()
            chosen = select(samples, Geometry(num_frames=93, min_frames=93, fps=24, max_height=480, max_width=640))
            checked = time.perf_counter()
            print(f"{manifest}: read in {read - start:.1f} s, checked in {checked - read:.1f} s: {chosen}", flush=True)


if __name__ == "__main__":
    main()
