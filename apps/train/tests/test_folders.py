"""A folder of folders with an annotation.json each: as programs extract its videos and pictures, and train on them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mm_data import FeatureDataset, write_video
from mm_models.opensoraplan.testing import write_encoders as write_opensoraplan
from mm_models.wan.testing import write_encoders as write_wan
from mm_train.checks import CHECKS, Asked, check
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import losses

GEOMETRY = ["num_frames", "9", "min_frames", "9", "fps", "24", "max_height", "32", "max_width", "48"]


WRITERS = {"wan-tiny": write_wan, "opensoraplan-tiny": write_opensoraplan}
SMALL = {"dim": 72, "num_heads": 2, "num_layers": 2, "ffn_dim": 64, "text_dim": 64}  # suits both


@pytest.fixture(scope="module", params=WRITERS)
def model(request):
    return request.param


@pytest.fixture(scope="module")
def encoders(model, tmp_path_factory):
    return WRITERS[model](tmp_path_factory.mktemp("encoders"), text_dim=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """As in a guide: the list above names what those below name too. Some files are damaged, or have another name."""
    top = tmp_path_factory.mktemp("pixabay_v2")
    noise = np.random.default_rng(0)

    def write(name: str, frames: int = 20, fps: float = 24) -> dict:
        (top / name).parent.mkdir(exist_ok=True)
        colours = noise.integers(0, 255, (frames, 1, 1, 3), dtype=np.uint8)
        write_video(top / name, colours.repeat(40, axis=1).repeat(60, axis=2), fps=fps)
        resolution = {"height": 40, "width": 60}
        return {"path": name, "cap": [f"{name} one", f"{name} two"], "resolution": resolution, "fps": fps}

    def picture(name: str) -> dict:
        pixels = noise.integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(top / name)
        return {"path": name, "cap": name, "resolution": {"height": 40, "width": 60}}

    clips = [write(f"folder_0{1 + n % 2}/video{n}.mp4") | {"duration": 20 / 24} for n in range(4)]
    short = write("folder_02/short.mp4", 5) | {"duration": 5 / 24}
    (top / "folder_02/broken.mp4").write_bytes(b"not a video at all")
    pictures = [picture(f"folder_01/{n}.{kind}") for n, kind in enumerate(("jpg", "png", "webp"))]
    renamed = clips[0] | {"path": "folder_02/video1_other.mp4"}
    (top / "annotation.json").write_text(json.dumps([*clips, *pictures, short, renamed]))
    for name in ("folder_01", "folder_02"):
        own = [one | {"path": one["path"].removeprefix(f"{name}/")} for one in clips if one["path"].startswith(name)]
        (top / name / "annotation.json").write_text(json.dumps([*own, {"path": f"{name}/broken.mp4", "cap": "x"}]))
    write("folder_01/long.mp4", 60, fps=48)
    pieces = [{"path": "long.mp4", "cap": "long", "frame_idx": piece} for piece in ("0:30", "30:60", "50:90")]
    listed = json.loads((top / "folder_01/annotation.json").read_text())
    (top / "folder_01/annotation.json").write_text(json.dumps([*listed, *pieces]))
    return top


KEPT = [
    *(f"folder_0{1 + n % 2}/video{n}.mp4" for n in range(4)),
    *("folder_01/0.jpg", "folder_01/1.png", "folder_01/2.webp"),
    *("folder_01/long.mp4[0:30]", "folder_01/long.mp4[30:60]"),
]


def flags(prefix: str) -> list[str]:
    names, values = GEOMETRY[::2], GEOMETRY[1::2]
    return [word for pair in zip(names, values, strict=True) for word in (f"--{prefix}{pair[0]}", pair[1])]


def test_a_folder_is_extracted_and_trained_on_with_every_drop_told(model, encoders, folder, tmp_path, capsys):
    command = [sys.executable, "-m", "mm_train.extract", "--model", model, "--encoders", str(encoders)]
    command += ["--data.manifest", str(folder), "--output", str(tmp_path / "features"), "--dtype", "float32"]
    done = subprocess.run(
        [*command, "--data.workers", "1", *flags("geometry.")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert f"note: {folder}: 4 entries name files that another annotation.json lists too" in done.stderr
    assert "14 samples, 11 kept, 3 dropped" in done.stderr, done.stderr
    assert "kept as clips of one frame, being pictures: 3" in done.stderr
    kinds = "2 missing_file, 1 cut_past_end, 1 too_short, 1 unreadable"
    assert f"9 of 14 samples in {tmp_path}/features, 5 left out ({kinds}): " in done.stderr
    reasons = {}
    for line in (tmp_path / "features/failures.jsonl").read_text().splitlines():
        record = json.loads(line)
        reasons[record["id"]] = record["reason"]
    assert sorted(reasons) == [
        "folder_01/broken.mp4",
        "folder_01/long.mp4[50:90]",
        "folder_02/broken.mp4",
        "folder_02/short.mp4",
        "folder_02/video1_other.mp4",
    ]
    other = folder / "folder_02/video1_other.mp4"
    assert reasons["folder_02/video1_other.mp4"] == f"missing_file: {other} is not there, did you mean video1.mp4?"
    assert reasons["folder_02/short.mp4"].startswith("too_short: 5 frames")
    assert "has 60 frames: it cannot be cut to [50, 90)" in reasons["folder_01/long.mp4[50:90]"]
    data = FeatureDataset(tmp_path / "features")
    assert data.ids == KEPT
    assert [shape[1] for shape in data.buckets] == [3] * 4 + [1] * 3 + [3] * 2

    run = ["--model", model, "--weights", "random", "--dtype", "float32", "--steps", "5", "--optim.lr", "1e-2"]
    run += ["--architecture", json.dumps(SMALL), "--data.global_batch", "4", "--data.micro_batch", "2"]
    run += ["--data.text_dropout", "0.3"]
    online = ["--data.manifest", str(folder), "--data.encoders", str(encoders), *flags("data.geometry.")]
    sources = {"stored": ["--data.features", str(tmp_path / "features")], "raw": online}
    for name, source in sources.items():
        train(load_config([*run, *source, "--output", str(tmp_path / name)]))
    assert losses(tmp_path / "raw") == losses(tmp_path / "stored")
    said = capsys.readouterr().err
    assert f"9 of 14 samples of {folder} can be used, 5 left out ({kinds}): " in said
    assert "kept as clips of one frame, being pictures: 3" in said
    assert said.count("4 entries name files") == 1
    small = [line for line in said.splitlines() if "fewer samples than" in line]
    assert len(small) == 2  # three pictures for a step of four: told by both runs

    # A list that has changed since is another run.
    text = (folder / "folder_02/annotation.json").read_text()
    try:
        (folder / "folder_02/annotation.json").write_text(text.replace('"x"', '"y"'))
        with pytest.raises(ValueError, match=r"other contents of --data\.manifest: .*folder_02/annotation\.json was"):
            train(load_config([*run, *online, "--output", str(tmp_path / "raw"), "--steps", "6"]))
    finally:
        (folder / "folder_02/annotation.json").write_text(text)


def test_a_folder_without_lists_is_refused_before_anything_is_loaded(model, encoders, tmp_path):
    (tmp_path / "empty").mkdir()
    run = ["--model", model, "--weights", "random", "--output", str(tmp_path / "run")]
    run += ["--data.encoders", str(encoders), "--data.manifest"]
    with pytest.raises(ValueError, match=r"--data\.manifest .*/empty is a folder without annotation\.json, and so are"):
        check(load_config([*run, str(tmp_path / "empty")]))
    with pytest.raises(ValueError, match=r"/emtpy is not a file, did you mean .*/empty\?: give a data\.txt, .* folder"):
        check(load_config([*run, str(tmp_path / "emtpy")]))


def test_an_output_that_is_a_link_to_nothing_is_named(tmp_path):
    """It could not be made, though nothing is there."""
    (tmp_path / "away").symlink_to(tmp_path / "unmounted")
    asked = Asked(load_config(["--model", "wan-tiny", "--output", str(tmp_path / "away" / "run")]))
    with pytest.raises(ValueError, match="away is a link to nothing"):
        next(one for one in CHECKS if one.name == "resume").run(asked)
