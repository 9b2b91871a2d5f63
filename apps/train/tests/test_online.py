"""Training straight from videos: the losses of training on extracted features, however it is done."""

import json
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mm_data import Geometry, write_video
from mm_models.wan.testing import write_encoders
from mm_parallel.testing import spawn
from mm_train.checks import check
from mm_train.data import training_data
from mm_train.extract import Data, ExtractConfig, extract
from mm_train.objective import build_objective
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from runs import SMALL, as_torchrun, losses

GEOMETRY = {"num_frames": 5, "max_height": 32, "max_width": 48, "dynamic": True, "max_aspect": 4.0}
SIZES = [(32, 48), (32, 48), (48, 32), (32, 48), (48, 32)]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"), text_dim=64, image_dim=32)


def write_clip(path: Path, seed: int, size: tuple[int, int], frames: int = 9) -> None:
    """Every frame one colour of its own."""
    colours = np.random.default_rng(seed).integers(0, 255, (frames, 1, 1, 3), dtype=np.uint8)
    write_video(path, colours.repeat(size[0], axis=1).repeat(size[1], axis=2), fps=8)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Clips of two shapes and lengths, windows to draw, some with two captions; one file is no video."""
    root = tmp_path_factory.mktemp("clips")
    for number, size in enumerate(SIZES):
        write_clip(root / f"{number}.mp4", seed=number, size=size)
    (root / "broken.mp4").write_bytes(b"not a video at all")
    captions = ["one", ["two", "zwei"], "three", ["four", "vier"], "five"]
    entries = [{"path": f"{number}.mp4", "cap": caption} for number, caption in enumerate(captions)]
    entries.insert(2, {"path": "broken.mp4", "cap": "never seen"})
    (root / "data.json").write_text(json.dumps(entries))
    return root / "data.json"


@pytest.fixture(scope="module")
def vace_manifest(tmp_path_factory):
    """A sample with all that VACE can be told, and one with nothing."""
    root = tmp_path_factory.mktemp("vace")
    for number, name in enumerate(("video.mp4", "source.mp4", "mask.mp4", "plain.mp4")):
        write_clip(root / name, seed=number, size=(32, 48))
    for name in ("a.png", "b.png"):
        Image.fromarray(np.random.default_rng(ord(name[0])).integers(0, 255, (40, 20, 3), dtype=np.uint8)).save(
            root / name
        )
    full = {"video": "video.mp4", "cap": "one", "src_video": "source.mp4", "src_video_mask": "mask.mp4"}
    full["src_ref_images"] = ["a.png", "b.png"]
    (root / "data.json").write_text(json.dumps([full, {"video": "plain.mp4", "cap": "two"}]))
    return root / "data.json"


def arguments(output: Path, *more: str, model: str = "wan-tiny", **architecture) -> list[str]:
    small = json.dumps(SMALL | {"text_dim": 64} | architecture)
    return [
        *("--model", model, "--weights", "random", "--dtype", "float32", "--output", str(output)),
        *("--architecture", small, "--data.global_batch", "2", "--optim.lr", "1e-2"),
        *more,
    ]


def from_videos(manifest: Path, encoders: Path) -> list[str]:
    geometry = [word for name, value in GEOMETRY.items() for word in (f"--data.geometry.{name}", str(value).lower())]
    return ["--data.manifest", str(manifest), "--data.encoders", str(encoders), *geometry]


def from_features(manifest: Path, encoders: Path, output: Path, model: str = "wan-tiny") -> list[str]:
    settings = {"model": model, "encoders": encoders, "output": output, "dtype": "float32"}
    extract(ExtractConfig(**settings, data=Data(manifest, workers=0), geometry=Geometry(**GEOMETRY)))
    return ["--data.features", str(output)]


def losses_of(argv: list[str]) -> list[float]:
    config = load_config(argv)
    train(config)
    return losses(config.output)


MANY = ["--data.text_dropout", "0.3", "--data.micro_batch", "2", "--steps", "7"]


@pytest.fixture(scope="module")
def expected(encoders, manifest, tmp_path_factory):
    """The losses of training on extracted features, and the flags for these."""
    folder = tmp_path_factory.mktemp("expected")
    features = from_features(manifest, encoders, folder / "features")
    seen = losses_of(arguments(folder / "run", *features, *MANY))
    assert len(set(seen)) == 7
    return seen, features


def test_losses_are_those_of_extracted_features(encoders, manifest, expected, tmp_path, capsys):
    """…to the last bit, also when several steps are encoded at a time and the run is stopped between two of them, and
    goes on in the other way.
    """
    expected, features = expected
    videos = from_videos(manifest, encoders)
    assert losses_of(arguments(tmp_path / "all", *videos, *MANY, "--data.encode_every", "0")) == expected
    assert "5 of 6 samples" in capsys.readouterr().err
    failures = (tmp_path / "all/failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in failures] == ["broken.mp4"]

    ahead = arguments(tmp_path / "ahead", *videos, *MANY, "--data.encode_every", "3", "--data.workers", "0")
    losses_of([*ahead, "--steps", "4"])  # six were encoded
    losses_of([*ahead, "--steps", "6"])
    assert losses_of(arguments(tmp_path / "ahead", *features, *MANY)) == expected


def test_batches_are_those_of_extracted_features(encoders, manifest, tmp_path):
    """Captions have several lengths, and some are dropped: so are their masks."""
    steps = []
    for name, data in (
        ("v", from_videos(manifest, encoders)),
        ("f", from_features(manifest, encoders, tmp_path / "f")),
    ):
        config = load_config(arguments(tmp_path / name, *data, *MANY))
        config.run_dir.mkdir(parents=True, exist_ok=True)
        made = training_data(config, build_objective(config), None, torch.device("cpu"))
        steps.append(list(islice(made.steps(0), 8)))
    padded = 0
    for batches in zip(*steps, strict=True):
        for one, other in zip(*(step.micro for step in batches), strict=True):
            assert one.tensors.keys() == other.tensors.keys() == {"latents", "text", "text_mask"}
            assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
            assert torch.equal(one.tensors["text_mask"], one.tensors["text"].abs().sum(-1) > 0)
            padded += not one.tensors["text_mask"].all()
    assert padded


def ranks_train(rank: int, world: int, argv: list[str]) -> None:
    as_torchrun(rank, world)
    train(load_config(argv))


def test_ranks_of_one_sample_encode_a_part_each(encoders, manifest, expected, tmp_path):
    argv = arguments(
        tmp_path, *from_videos(manifest, encoders), *MANY, "--data.encode_every", "2", "--parallel.cp", "2"
    )
    spawn(2, ranks_train, argv, timeout=120)
    assert losses(tmp_path) == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize(("model", "architecture"), [("wan-tiny-i2v", {}), ("wan-tiny-vace", {"vace_layers": [0, 1]})])
def test_conditions_are_the_same(encoders, manifest, vace_manifest, tmp_path, model, architecture):
    chosen = vace_manifest if "vace" in model else manifest
    argv = {}
    for name, data in (
        ("cached", from_features(chosen, encoders, tmp_path / "features", model)),
        ("videos", from_videos(chosen, encoders)),
    ):
        argv[name] = arguments(tmp_path / name, *data, "--steps", "3", model=model, **architecture)
        argv[name] += ["--data.global_batch", "1"]
    cached, videos = (losses_of(one) for one in argv.values())
    assert videos == cached


def test_a_clip_that_turns_out_to_be_damaged_is_named(encoders, tmp_path):
    """…when its turn comes: its packets are all there, so looking into it showed nothing."""
    noise = np.random.default_rng(0).integers(0, 255, (17, 64, 96, 3), dtype=np.uint8)
    noise[:9] = noise[0]  # so that there are B-frames: packets in another order tell the order of showing
    write_video(tmp_path / "noise.mp4", noise, fps=8)
    data = bytearray((tmp_path / "noise.mp4").read_bytes())
    for part in (0.6, 0.7, 0.8, 0.9):  # behind what the decoder reads ahead of the first frame
        start = int(part * len(data))
        data[start : start + 100] = bytes(100)
    (tmp_path / "noise.mp4").write_bytes(data)
    (tmp_path / "data.json").write_text(json.dumps([{"path": "noise.mp4", "cap": "noise"}]))
    argv = arguments(tmp_path / "run", *from_videos(tmp_path / "data.json", encoders), "--steps", "1")
    argv += ["--data.global_batch", "1", "--data.geometry.num_frames", "17"]
    with pytest.raises(ValueError, match=r"sample noise\.mp4: .*mend the file .* continues .* mm_train\.extract"):
        losses_of(argv)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no training data: give either --data.features"),
        (["--data.features", ".", "--data.manifest", "data.json"], "two kinds of training data"),
        (["--data.features", ".", "--data.encoders", "."], "--data.encoders is for --data.manifest"),
        (["--data.features", ".", "--data.geometry.fps", "8"], "--data.geometry is for --data.manifest"),
        (["--data.manifest", "nowhere.json"], "nowhere.json is not a file"),
        (["--data.manifest", __file__], "needs --data.encoders"),
    ],
)
def test_what_cannot_be_meant_is_said_at_once(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        check(load_config(arguments(tmp_path, *flags)))


def test_encoders_of_another_model_are_refused(encoders, manifest, tmp_path):
    argv = arguments(tmp_path, *from_videos(manifest, encoders), text_dim=8)
    with pytest.raises(ValueError, match="text width 64 instead of 8"):
        losses_of(argv)
