"""The folder of Open-Sora-Plan's VAE: which weights are taken, what is refused, and that nothing pickled is run."""

import argparse
import json
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mm_models.opensoraplan.testing_vae import TINY, write_vae
from mm_models.opensoraplan.vae import OpenSoraPlanVAE
from mm_models.opensoraplan.vae_config import OLDER, VAEConfig, check_folder, describe, read_config
from mm_models.opensoraplan.vae_model import CausalVAE


@pytest.fixture
def repository(tmp_path):
    write_vae(tmp_path / "vae")
    return tmp_path


@pytest.fixture
def folder(repository):
    return repository / "vae"


@pytest.fixture(scope="module")
def weights():
    """Of another VAE than the one that lies in the folder."""
    torch.manual_seed(7)
    return CausalVAE(TINY).state_dict()


def video(frames: int = 5, height: int = 16, width: int = 24, seed: int = 0) -> torch.Tensor:
    return torch.rand((1, 3, frames, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def holds(codec: OpenSoraPlanVAE, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, weights[name]) for name, tensor in codec.vae.state_dict().items())


def test_videos(repository):
    codec = OpenSoraPlanVAE(repository)
    mean, logvar = codec.posterior(video(9))
    latents = codec.encode(video(9))
    assert latents.shape[1:] == codec.latent_shape(9, 16, 24) == (4, 3, 2, 3)
    assert torch.equal(latents, mean * 0.18215)
    assert not torch.equal(logvar, mean)
    assert torch.equal(codec.encode(video(9)), latents)  # no chance
    again = codec.decode(latents)
    assert again.shape == (1, 3, 9, 16, 24)
    assert again.dtype == torch.float32
    torch.testing.assert_close(again, codec.vae.decode(mean), rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in codec.vae.parameters())


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 8, 16, 16), "8 frames: must be 4k \\+ 1, e.g. 5"),
        ((1, 3, 5, 16, 20), "16x20 pixels: both must be multiples of 8, e.g. 16x16"),
        ((3, 5, 16, 16), "must be B 3 F H W"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(repository, shape, message):
    with pytest.raises(ValueError, match=message):
        OpenSoraPlanVAE(repository).encode(torch.zeros(shape))


def test_identity_changes_with_what_decides_the_latents(repository):
    codec = OpenSoraPlanVAE(repository)
    others = [OpenSoraPlanVAE(repository, tiling=kind).identity for kind in ("training", "inference")]
    others += [OpenSoraPlanVAE(repository, dtype=torch.bfloat16).identity]
    assert OpenSoraPlanVAE(repository).identity == codec.identity
    write_vae(repository / "vae", seed=1)
    others += [OpenSoraPlanVAE(repository).identity]
    assert len({codec.identity, *others}) == 5


# --- which weights


def test_averaged_weights_come_first_then_the_generator(repository, folder, weights):
    other = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    averaged = {f"module.{name}": tensor for name, tensor in weights.items()}
    loss = {"loss.discriminator.main.0.weight": torch.ones(2), "loss.logvar": torch.ones(())}
    for said in (
        {"ema_state_dict": averaged, "state_dict": {"gen_model": other}},
        {"ema_state_dict": {}, "state_dict": {"gen_model": weights, "dics_model": {"main.0.weight": torch.ones(2)}}},
        {"epoch": 3, "state_dict": {**weights, **loss}},
        weights,
    ):
        torch.save(said, folder / "checkpoint.ckpt")
        assert holds(OpenSoraPlanVAE(repository), weights)


def test_every_tensor_must_be_there_and_none_be_left_over(repository, folder, weights):
    name = "encoder.mid.attn_1.q.conv.weight"
    for said, message in (
        ({key: value for key, value in weights.items() if key != name}, f"lacks 1 tensors, first {name}"),
        ({**weights, "decoder.more": torch.ones(2)}, "1 tensors too many, first decoder.more"),
        ({**weights, name: weights[name][:16]}, r"q.conv.weight is \[16, 32, 1, 1, 1\], and must be \[32, 32, 1, 1, 1"),
        ({**weights, 5: torch.ones(2)}, "1 tensors too many, first 5"),
        ({"ema_state_dict": {**weights, 5: torch.ones(2)}}, "1 tensors too many, first 5"),
        ({**weights, name: weights[name].long()}, f"{name} is no dense tensor of floating-point numbers"),
        ({**weights, name: weights[name].to_sparse()}, f"{name} is no dense tensor of floating-point numbers"),
        ({**weights, name: 1.0}, f"{name} is no dense tensor of floating-point numbers"),
        ({**weights, name: weights[name] * torch.nan}, f"1 tensors hold NaN or infinity, first {name}"),
        ({"ema_state_dict": {name: weights[name]}, "state_dict": weights}, "lacks 175 tensors"),
        ([1, 2], "holds a list"),
    ):
        torch.save(said, folder / "checkpoint.ckpt")
        with pytest.raises(ValueError, match=message):
            OpenSoraPlanVAE(repository)


def test_converted_files_are_read(repository, folder, weights):
    (folder / "checkpoint.ckpt").unlink()
    names = sorted(weights)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    assert holds(OpenSoraPlanVAE(repository), weights)

    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(weights, folder / "casualvae_mm.pt")
    assert holds(OpenSoraPlanVAE(repository), weights)
    (folder / "config.json").unlink()  # as mm-convert leaves it: then it is the published one, which these are not
    assert read_config(folder) == VAEConfig()
    with pytest.raises(ValueError, match="lacks"):
        OpenSoraPlanVAE(repository)

    (folder / "casualvae_mm.pt").unlink()
    index = {}
    for i, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, folder / f"model-{i}.safetensors")
        index |= dict.fromkeys(part, f"model-{i}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    ours = {"format": "mm", "family": "opensoraplan-vae", "config": {"base_dim": 32, "attention": OLDER}}
    (folder / "config.json").write_text(json.dumps(ours))
    assert read_config(folder) == VAEConfig(32, attention=OLDER)


def test_one_set_of_weights(repository, folder, weights):
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="one set of weights, and it has checkpoint"):
        check_folder(folder)
    for file in ("diffusion_pytorch_model.safetensors", "checkpoint.ckpt"):
        (folder / file).unlink()
    with pytest.raises(ValueError, match="it has none"):
        check_folder(folder)


# --- which configuration


def test_config_json_there_and_back(folder):
    for config in (VAEConfig(), TINY, VAEConfig(64, (1, 1, 2, 2), 1, 8, 8, OLDER)):
        (folder / "config.json").write_text(json.dumps(describe(config)))
        assert read_config(folder) == config


def test_config_json_decides_the_attention(repository, folder):
    fixed = OpenSoraPlanVAE(repository)
    (folder / "config.json").write_text(json.dumps(describe(VAEConfig(**TINY.__dict__ | {"attention": OLDER}))))
    older = OpenSoraPlanVAE(repository)
    assert older.identity != fixed.identity
    assert (older.encode(video(9)) - fixed.encode(video(9))).abs().max() > 1e-3
    torch.testing.assert_close(older.encode(video(1)), fixed.encode(video(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_attention": OLDER}, "'AttnBlock3DFix' and 'AttnBlock3D', and must both be"),
        ({"encoder_attention": "AttnBlock", "decoder_attention": "AttnBlock"}, "'AttnBlock' and 'AttnBlock'"),
        ({"encoder_resnet_blocks": ["ResnetBlock3D"] * 4}, "encoder_resnet_blocks is .* must be .'ResnetBlock2D'"),
        ({"decoder_temporal_upsample": ["", "", "TimeUpsample2x", "TimeUpsample2x"]}, "decoder_temporal_upsample is"),
        ({"q_conv": "Conv2d"}, "q_conv is 'Conv2d'"),
        ({"attn_resolutions": [16]}, r"attn_resolutions is \[16\]"),
        ({"use_quant_layer": False}, "use_quant_layer is False"),
        ({"_class_name": "AutoencoderKL"}, "_class_name is 'AutoencoderKL'"),
        ({"hidden_size": 40}, "40 channels: must be a multiple of 32"),
        ({"hidden_size": 10**9}, "hidden_size is 1000000000"),
        ({"hidden_size": "32"}, "hidden_size is '32'"),
        ({"hidden_size": 64}, r"encoder.conv_in.weight is \[32, 3, 3, 3\], and must be \[64, 3, 3, 3\]"),
        ({"hidden_size_mult": [1, 2, 4]}, r"hidden_size_mult is \[1, 2, 4\]"),
        ({"num_res_blocks": 2}, "lacks 64 tensors, first decoder.up.0.block.2.conv1.conv.bias"),
        ({"embed_dim": None}, "embed_dim is None"),
    ],
)
def test_other_vaes_are_refused_by_what_differs(repository, folder, changes, message):
    (folder / "config.json").write_text(json.dumps(describe(TINY) | changes))
    with pytest.raises(ValueError, match=message):
        OpenSoraPlanVAE(repository)


@pytest.mark.parametrize("key", ["encoder_conv_in", "decoder_spatial_upsample", "hidden_size", "encoder_attention"])
def test_what_config_json_does_not_say_is_not_guessed(folder, key):
    said = describe(TINY)
    del said[key]
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=key):
        check_folder(folder)


# --- what is pickled is not run


class Calls:
    def __init__(self, function, *args) -> None:
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


HOSTILE = {
    "os": Calls(os.mkdir, "code_was_run"),
    "os.system": Calls(os.system, "mkdir code_was_run"),
    "eval": Calls(eval, "__import__('os').mkdir('code_was_run')"),
    "exec": Calls(exec, "import os; os.mkdir('code_was_run')"),
    "subprocess": Calls(subprocess.check_call, ["mkdir", "code_was_run"]),
    "pathlib": Calls(Path.mkdir, Path("code_was_run")),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("file", ["checkpoint.ckpt", "casualvae_mm.pt"])
def test_a_hostile_checkpoint_runs_nothing(repository, folder, weights, tmp_path, monkeypatch, name, file):
    monkeypatch.chdir(tmp_path)
    (folder / "checkpoint.ckpt").unlink()
    torch.save({"state_dict": weights, "hyper_parameters": HOSTILE[name]}, folder / file)
    with pytest.raises(ValueError, match=r"cannot be read (as weights \(it names .*nothing in it was run|without)"):
        OpenSoraPlanVAE(repository)
    assert not Path("code_was_run").exists()
    torch.load(folder / file, weights_only=False)  # it was hostile indeed
    assert Path("code_was_run").exists()


def test_functions_of_packages_that_write_checkpoints_are_not_called(repository, folder, weights, tmp_path):
    mark = tmp_path / "code_was_run"
    torch.save({"state_dict": weights, "more": Calls(torch.save, torch.ones(2), str(mark))}, folder / "checkpoint.ckpt")
    assert holds(OpenSoraPlanVAE(repository), weights)
    assert not mark.exists()
    torch.load(folder / "checkpoint.ckpt", weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("old", [True, False])
def test_a_bare_pickle_is_refused(repository, folder, weights, tmp_path, monkeypatch, old):
    monkeypatch.chdir(tmp_path)
    if old:
        torch.save({"state_dict": weights}, folder / "checkpoint.ckpt", _use_new_zipfile_serialization=False)
    else:
        (folder / "checkpoint.ckpt").write_bytes(pickle.dumps(HOSTILE["os"]))
    with pytest.raises(ValueError, match="cannot be read"):
        OpenSoraPlanVAE(repository)
    assert not Path("code_was_run").exists()


def test_a_file_that_is_cut_short_is_refused(repository, folder):
    file = folder / "checkpoint.ckpt"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match="cannot be read"):
        OpenSoraPlanVAE(repository)


def test_arguments_of_the_makers_in_a_checkpoint_are_passed_over(repository, folder, weights):
    """Their classes need not be installed: objects that do nothing stand in their place."""
    arguments = argparse.Namespace(lr=1e-5, seed=np.float64(1), nested=argparse.Namespace(a=1))
    torch.save({"state_dict": {"gen_model": weights}, "args": arguments}, folder / "checkpoint.ckpt")
    assert holds(OpenSoraPlanVAE(repository), weights)
