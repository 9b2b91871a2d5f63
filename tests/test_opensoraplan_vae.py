"""The VAE of Open-Sora-Plan from its published checkpoint through mm-convert to latents: always the same ones."""

import json

import pytest
import torch

from mm_convert.__main__ import main as mm_convert
from mm_models.opensoraplan.testing_vae import write_vae
from mm_models.opensoraplan.vae import OpenSoraPlanVAE
from mm_models.opensoraplan.vae_config import OLDER, VAEConfig, describe, read_config

VIDEO = torch.rand((1, 3, 9, 16, 24), generator=torch.Generator().manual_seed(0)) * 2 - 1
SMALL = VAEConfig(hidden_size=32)  # the ladder of the released one, a quarter as wide


@pytest.fixture(scope="module", params=["fixed", "older"])
def published(request, tmp_path_factory):
    """config.json and checkpoint.ckpt, in which the averaged weights are others than those trained last."""
    root = tmp_path_factory.mktemp(request.param)
    config = SMALL if request.param == "fixed" else VAEConfig(32, attention=OLDER)
    weights = write_vae(root / "vae", config).state_dict()
    averaged = {f"module.{name}": tensor for name, tensor in weights.items()}
    trained = {name: tensor + 0.1 for name, tensor in weights.items()}
    torch.save({"ema_state_dict": averaged, "state_dict": {"gen_model": trained}}, root / "vae" / "checkpoint.ckpt")
    return root, OpenSoraPlanVAE(root).encode(VIDEO)


@pytest.mark.parametrize("to", ["mm", "original", "mindspeed"])
def test_what_mm_convert_writes_encodes_alike(published, tmp_path, to):
    root, expected = published
    mm_convert(["convert", str(root / "vae"), str(tmp_path / "vae"), *([] if to == "mm" else ["--to", to])])
    codec = OpenSoraPlanVAE(tmp_path)
    assert torch.equal(codec.encode(VIDEO), expected)
    assert codec.vae.config == read_config(root / "vae")


def test_the_guide_command_encodes_alike(published, tmp_path):
    root, expected = published
    words = ["--cfg.source_path", str(root / "vae/checkpoint.ckpt"), "--cfg.target_path", str(tmp_path / "vae")]
    mm_convert(["OpenSoraPlanConverter", "vae_convert", *words])
    assert torch.equal(OpenSoraPlanVAE(tmp_path).encode(VIDEO), expected)


def test_there_and_back(published, tmp_path):
    root, expected = published
    mm_convert(["convert", str(root / "vae"), str(tmp_path / "mm")])
    mm_convert(["convert", str(tmp_path / "mm"), str(tmp_path / "vae"), "--to", "original"])
    assert torch.equal(OpenSoraPlanVAE(tmp_path).encode(VIDEO), expected)
    said = json.loads((tmp_path / "vae" / "config.json").read_text(encoding="utf-8"))
    assert describe(read_config(root / "vae")).items() <= said.items()


def test_a_vae_of_other_blocks_is_not_converted_as_if_it_were_this_one(published, tmp_path):
    """Its tensors may have the same names."""
    root, _ = published
    changed = describe(SMALL) | {"decoder_temporal_upsample": ["", "", "TimeUpsample2x", "TimeUpsample2x"]}
    (tmp_path / "checkpoint.ckpt").symlink_to(root / "vae" / "checkpoint.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(SystemExit, match="decoder_temporal_upsample is"):
        mm_convert(["convert", str(tmp_path), str(tmp_path / "out")])
