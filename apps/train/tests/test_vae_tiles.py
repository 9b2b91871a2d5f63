"""A VAE that works in tiles: which are used, that features tell it, and that a run is not continued on others."""

import json
import sys
from pathlib import Path

import pytest
import torch

from mm_convert.cli.arguments import parse
from mm_data import FeatureDataset, VideoDataset, read_manifest
from mm_models import preset
from mm_models.opensoraplan import tiles
from mm_models.opensoraplan.testing import write_encoders
from mm_models.opensoraplan.vae import OpenSoraPlanVAE
from mm_models.wan.testing import write_encoders as write_wan
from mm_train.encode import Encoders
from mm_train.extract import Data, ExtractConfig, Geometry, extract
from mm_train.recipe import load_config
from mm_train.train import train

sys.path.insert(0, str(Path(__file__).parent))
from test_extract import write_clip

MODEL = "opensoraplan-tiny"
GEOMETRY = Geometry(num_frames=9, max_height=32, max_width=48)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    return write_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    root = tmp_path_factory.mktemp("clips")
    for number in range(2):
        write_clip(root / f"{number}.mp4", seed=number)
    entries = [{"path": f"{number}.mp4", "cap": caption} for number, caption in enumerate(("one", "two"))]
    (root / "data.json").write_text(json.dumps(entries), encoding="utf-8")
    return root / "data.json"


@pytest.fixture
def small(monkeypatch):
    """Tiles of which these clips take several."""
    monkeypatch.setitem(tiles.TILES, "training", tiles.Tiles(pixels=64, frames=5, latents=8, latent_frames=2))


WORDS = {"true": True, "false": False, "training": "training", "inference": "inference", "null": None}
NEEDED = ["--model", MODEL, "--weights", "random", "--data.manifest", "m"]


@pytest.mark.parametrize("said", WORDS)
def test_flags(said):
    extraction = ["--model", MODEL, "--encoders", "e", "--output", "o", "--data.manifest", "m", "--tiling", said]
    assert parse(ExtractConfig, extraction, prog="extract").tiling == WORDS[said]
    assert load_config([*NEEDED, "--data.tiling", said]).data.tiling == WORDS[said]


@pytest.mark.parametrize("wrong", ["yes", "none", "1", '""'])
def test_other_words_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        load_config([*NEEDED, "--data.tiling", wrong])
    assert "it takes true or false, or one of training, inference, or null" in capsys.readouterr().err


def test_features_are_encoded_in_tiles_of_training(encoders, manifest, tmp_path, capsys, small):
    def run(**more) -> str:
        extract(ExtractConfig(MODEL, encoders, tmp_path / "f", Data(manifest, workers=0), geometry=GEOMETRY, **more))
        return capsys.readouterr().err

    clip = VideoDataset(read_manifest(manifest)[:1], GEOMETRY)[0]["video"][None]
    expected = {kind: OpenSoraPlanVAE(encoders, tiling=kind).encode(clip)[0] for kind in ("none", "training")}
    assert not torch.allclose(expected["none"], expected["training"], atol=1e-3)
    run()
    assert torch.equal(FeatureDataset(tmp_path / "f")[0]["latents"], expected["training"])
    assert "2 in the store" in run(tiling=True)
    assert "2 in the store" in run(tiling="training")
    assert "stale" in run(tiling=False)
    assert torch.equal(FeatureDataset(tmp_path / "f")[0]["latents"], expected["none"])
    assert "stale" in run(tiling="inference")  # larger than these clips; but of others it would not be


def test_wan_is_whole_unless_asked(tmp_path):
    path = write_wan(tmp_path, text_dim=64, image_dim=32)
    usual, whole, cut = (Encoders(path, preset("wan-tiny"), "t2v", tiling=asked).codec for asked in (None, False, True))
    assert usual.identity == whole.identity != cut.identity
    assert (usual.vae.use_tiling, cut.vae.use_tiling) == (False, True)
    assert Encoders(path, preset("wan-tiny"), "t2v", tiling="inference").codec.identity == cut.identity


def test_a_run_says_its_tiles_and_is_not_continued_on_others(encoders, manifest, tmp_path, small):
    def run(steps: int, *more: str) -> Path:
        config = load_config([
            *("--model", MODEL, "--weights", "random", "--dtype", "float32", "--output", str(tmp_path / "run")),
            *("--data.manifest", str(manifest), "--data.encoders", str(encoders), "--data.global_batch", "2"),
            *("--data.geometry.num_frames", "9", "--data.geometry.max_height", "32"),
            *("--data.geometry.max_width", "48", "--steps", str(steps), *more),
        ])  # fmt: skip
        train(config)
        return config.run_dir / "checkpoints" / f"step-{steps:08d}" / "progress.json"

    progress = json.loads(run(1).read_text(encoding="utf-8"))
    assert progress["contents"]["data.encoders"]["the tiles of vae"] == "training"
    run(2, "--data.tiling", "true")
    with pytest.raises(ValueError, match="the tiles of vae was training, and is missing"):
        run(3, "--data.tiling", "false")
