"""A VAE that decodes in tiles: those of sampling unless something else is asked, and the video says which."""

import numpy as np
import pytest
import torch

from mm_convert import save_checkpoint
from mm_data import made_with, read_video
from mm_infer import load
from mm_infer.__main__ import main
from mm_models import build, preset
from mm_models.families import find
from mm_models.opensoraplan import tiles
from mm_models.opensoraplan.testing import write_encoders

MODEL = "opensoraplan-tiny"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = write_encoders(tmp_path_factory.mktemp("weights"))
    torch.manual_seed(0)
    save_checkpoint(folder / "transformer", build(MODEL).state_dict(), find(MODEL)[0].describe(preset(MODEL)))
    return folder


@pytest.fixture
def command(weights, tmp_path, monkeypatch):
    """With tiles of which these videos take several in time."""
    monkeypatch.setitem(tiles.TILES, "inference", tiles.Tiles(pixels=64, frames=5, latents=8, latent_frames=2))
    words = ["--weights", str(weights / "transformer"), "--encoders", str(weights), "--prompt", "a cat"]
    words += ["--frames", "9", "--height", "32", "--width", "48", "--steps", "2", "--output", str(tmp_path / "out")]
    return words


def test_videos_are_decoded_in_tiles_of_sampling(command, tmp_path, capsys):
    video = tmp_path / "out" / "video_0.mp4"
    main(command)
    assert made_with(video)["vae_tiling"] == "inference"
    tiled = read_video(video).frames
    capsys.readouterr()
    for same in ("true", "inference", "null"):
        main([*command, "--vae_tiling", same])
        assert "kept, made by the same command" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--vae_tiling", "false"])
    assert "already there, made otherwise" in capsys.readouterr().err
    main([*command, "--vae_tiling", "false", "--overwrite", "true"])
    assert made_with(video)["vae_tiling"] == "none"
    assert not np.array_equal(tiled, read_video(video).frames)


def test_latents_do_not_depend_on_tiles(weights):
    options = {"frames": 5, "height": 32, "width": 32, "steps": 2}
    usual, whole = (load(weights / "transformer", weights, vae_tiling=asked) for asked in (None, False))
    assert (usual.encoders.tiling, whole.encoders.tiling) == ("inference", "none")
    assert torch.equal(usual("a cat", **options).latents, whole("a cat", **options).latents)
